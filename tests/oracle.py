"""The oracle: transformers on seeded random checkpoints. The kit is `infinilm.testing.parity`; here are spellings."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from infinilm.testing.parity import (
    MARGIN,
    MAX_TOKENS,
    PROMPT_LENGTHS,
    Answer,
    Stored,
    assert_parity,
    check_parity,
    edit_config,
    edit_tensors,
    examine,
    write_checkpoint,
)
from infinilm.testing.parity import ParityCase as Case
from infinilm.testing.parity import ParitySubject as Subject
from infinilm.testing.parity import chosen_logprobs as _chosen
from infinilm.testing.parity import logprobs_of as _logprobs
from infinilm.testing.parity import worst_difference as _worst

__all__ = [
    "BACKENDS",
    "MARGIN",
    "MAX_TOKENS",
    "PROMPT_LENGTHS",
    "Answer",
    "Case",
    "Stored",
    "Subject",
    "_chosen",
    "_logprobs",
    "_worst",
    "assert_parity",
    "check_parity",
    "edit_config",
    "edit_tensors",
    "examine",
    "spelled_as_transformers_4",
    "without_defaults",
    "write_checkpoint",
]

BACKENDS = ("torch", "cpu")
"""The backends that every parity test of a family is run on."""

# Models this small lose more to threads waiting for each other than they gain: minutes, where the machine is busy.
torch.set_num_threads(1)


def spelled_as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of transformers 5 as version 4 would have written it."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        old["rope_theta"] = rope.pop("rope_theta")
    rope_type = rope.pop("rope_type", "default")
    old["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
    return {**old, "torch_dtype": config.get("dtype", "float32")}


def without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the keys whose values are the family's defaults."""
    default = AutoConfig.for_model(config["model_type"]).to_dict()
    kept = ("model_type", "architectures")
    return {key: value for key, value in config.items() if key in kept or value != default.get(key)}
