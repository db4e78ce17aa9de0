"""From `params.json` to Hugging Face's config: keys of mistral_inference/args.py, and those that came after it.

A key that is not known may change what the model computes, so it is an error unless it says that something is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infinilm_hookspecs import Config, ConfigError

SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
OPTIONS = (
    *("rope_theta", "yarn", "max_position_embeddings", "max_seq_len", "sliding_window", "_sliding_window"),
    *("tied_embeddings", "moe", "activation"),
)
WITHOUT_MEANING = ("model_type", "max_batch_size")  # to a model that runs
YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta": "beta_fast",
    "alpha": "beta_slow",
}
MAX_LENGTH = 128_000  # that mistral_inference computes rotations for


def to_huggingface(config: Config) -> dict[str, Any]:
    """Return the config of a mistral, or of a mixtral where there are experts. Raises `ConfigError`."""
    _check_keys(config, "params.json", needed=SIZES, known=[*OPTIONS, *WITHOUT_MEANING])
    window = _sliding_window(config)
    adapted: dict[str, Any] = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        **{theirs: config[ours] for ours, theirs in SIZES.items()},
        "hidden_act": config.get("activation") or "silu",
        "max_position_embeddings": config.get("max_position_embeddings") or config.get("max_seq_len") or MAX_LENGTH,
        "rope_parameters": _rope(config, window),
        "sliding_window": window,
        "tie_word_embeddings": config.get("tied_embeddings") or False,
    }
    if config.get("moe"):
        experts = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
        _check_keys(config["moe"], "moe of params.json", needed=experts)
        adapted |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        adapted |= {theirs: config["moe"][ours] for ours, theirs in experts.items()}
    return adapted


def _rope(config: Config, window: int | None) -> dict[str, Any]:
    # Left out, it is what the first model with a window was trained with, or what all models after it were.
    theta = config.get("rope_theta") or (1e4 if window else 1e6)
    yarn = config.get("yarn")
    if not yarn:
        return {"rope_type": "default", "rope_theta": theta}
    _check_keys(yarn, "yarn of params.json", needed=list(YARN)[:2], known=[*YARN, "apply_scale"])
    scaling = {theirs: yarn[ours] for ours, theirs in YARN.items() if ours in yarn}
    unscaled = {} if yarn.get("apply_scale", True) else {"attention_factor": 1.0}
    return {"rope_type": "yarn", "rope_theta": theta, **scaling, **unscaled}


def _sliding_window(config: Config) -> int | None:
    """Return the window of all layers. It may be a pattern of windows, which repeats."""
    stated = config.get("sliding_window") or config.get("_sliding_window")
    windows = stated if isinstance(stated, Sequence) else [stated]
    if any(window != windows[0] for window in windows):
        raise ConfigError(f"sliding_window of params.json is {list(windows)!r}, and the same in all layers is wanted")
    window: int | None = windows[0]
    return window


def _check_keys(config: Any, what: str, *, needed: Any, known: Sequence[str] = ()) -> None:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{what} is {config!r:.80}, and an object is wanted")
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ConfigError(f"{what} lacks {', '.join(missing)}")
    unknown = [key for key, value in config.items() if key not in needed and key not in known and value]
    if unknown:
        raise ConfigError(
            f"{what} has {', '.join(unknown)}, which this plugin does not know; where Hugging Face's layout lies "
            "beside it, -p no:mistral_format takes that"
        )
