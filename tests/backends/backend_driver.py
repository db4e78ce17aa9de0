"""A small model for the torch backend, driven by hand as `infinilm.testing` does it, in blocks a test can choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from infinilm.backends.torch.backend import TorchBackend
from infinilm.backends.torch.cache import BLOCK_SIZE
from infinilm.testing import Context, make_batch
from infinilm.testing.driver import advance
from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    DynamicRopeScaling,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    NormConfig,
    RopeConfig,
)

NUM_BLOCKS = 64
DYNAMIC = RopeConfig(scaling=DynamicRopeScaling(factor=2.0, original_max_position_embeddings=16))


def decoder_config(rope: RopeConfig | None = DYNAMIC, *, tied: bool = False) -> DecoderConfig:
    norm = NormConfig()
    layer = LayerConfig(
        mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope=rope, qkv_bias=True),
        mlp=MlpConfig(intermediate_size=20),
        norms=LayerNorms(before_mixer=norm, before_mlp=norm),
    )
    return DecoderConfig(
        model_type="test",
        vocab_size=31,
        hidden_size=16,
        layers=(layer, layer),
        embedding=EmbeddingConfig(tied=tied),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=1024,
    )


def load(backend: TorchBackend, seed: int = 0) -> dict[str, torch.Tensor]:
    """Fill every parameter with random numbers, last parameter first, and return them."""
    generator = torch.Generator().manual_seed(seed)
    stored = {name: torch.randn(spec.shape, generator=generator) * 0.5 for name, spec in backend.parameters().items()}
    for name, spec in reversed(backend.parameters().items()):
        if spec.tied_to is None:
            backend.destination(name).copy_(stored[name])
            backend.loaded(name)
    backend.finish_loading()
    return stored


def loaded_backend(config: DecoderConfig | None = None, *, dtype: str = "float32") -> TorchBackend:
    backend = TorchBackend(config or decoder_config(), dtype=dtype, device="cpu")
    load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    return backend


def forward(
    backend: TorchBackend, work: Sequence[tuple[Context, int]], logits_indices: Sequence[int] | None = None
) -> torch.Tensor:
    """Compute the next so many tokens of each sequence in one step. By default all rows' logits are wanted.

    A sequence's slot is its place in the batch: this backend keeps nothing there.
    """
    for row, (sequence, _) in enumerate(work):
        sequence.slot = row
    batch = make_batch(work, BLOCK_SIZE, logits_indices)
    advance(work)
    return backend.forward(batch)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 31, length).tolist()


def blocks_for(length: int, first: int = 0) -> list[int]:
    return list(range(first, first - (-length // BLOCK_SIZE)))


def whole(backend: TorchBackend, tokens: list[int], prompt_length: int | None = None) -> torch.Tensor:
    """Return the logits of all tokens, computed in one step in blocks nobody else uses."""
    sequence = Context(tokens, blocks_for(len(tokens), NUM_BLOCKS // 2), prompt_length)
    return forward(backend, [(sequence, len(tokens))])
