"""A reference for `DecoderConfig`s: the torch backend in float64, one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infinilm.backends.torch.backend import TorchBackend
from infinilm.testing.driver import Context, make_batch
from infinilm_hookspecs import DecoderConfig


def decoder_logits(config: DecoderConfig, values: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
    """Return the logits (len(token_ids), vocab_size) of `config` with parameters `values`, by canonical name."""
    backend = TorchBackend(config, dtype="float64", device="cpu")
    for name, spec in backend.parameters().items():
        if spec.tied_to is None:
            backend.destination(name).copy_(values[name])
            backend.loaded(name)
    backend.finish_loading()
    block_size = backend.cache_spec().block_size
    blocks = range(-(-len(token_ids) // block_size))
    backend.allocate_cache(len(blocks), num_slots=1)
    batch = make_batch([(Context(list(token_ids), list(blocks)), len(token_ids))], block_size)
    with torch.inference_mode():
        return backend.forward(batch)
