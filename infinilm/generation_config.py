"""What a checkpoint says about generating with it: `generation_config.json`, in transformers' terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infinilm.plugins import Lineage
from infinilm.sampling_params import SamplingParams
from infinilm_hookspecs import Checkpoint, CheckpointError, DecoderConfig

_SAME_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the checkpoint's generation config, empty where it has none. Raises `CheckpointError` for a broken one."""
    path = checkpoint.file("generation_config.json")
    if path is None:
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {err}") from err
    if not isinstance(stored, dict):
        raise CheckpointError(f"{str(path)!r} holds a JSON {type(stored).__name__}, and an object is wanted")
    return stored


def default_sampling_params(stored: Mapping[str, Any]) -> SamplingParams:
    """Return the engine's defaults, replaced by what a generation config says. `do_sample: false` is greedy."""
    said = {key: stored[key] for key in _SAME_NAMES if stored.get(key) is not None}
    if stored.get("max_new_tokens") is not None:
        said["max_tokens"] = stored["max_new_tokens"]
    if stored.get("do_sample") is False:
        said["temperature"] = 0.0
    if stored.get("no_repeat_ngram_size"):  # 0 is off there
        said["extra_args"] = {"no_repeat_ngram_size": stored["no_repeat_ngram_size"]}
    return SamplingParams(**said)


def eos_token_ids(stored: Mapping[str, Any], lineage: Lineage) -> frozenset[int]:
    """Return the tokens that end a sequence, for a model without a processor to say so."""
    configs = [config for config in lineage.configs if not isinstance(config, DecoderConfig)]
    for config in (stored, *configs):
        found = config.get("eos_token_id")
        if isinstance(found, int):
            return frozenset([found])
        if isinstance(found, list | tuple):
            return frozenset(found)
    return frozenset()
