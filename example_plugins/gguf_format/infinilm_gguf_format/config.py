"""From GGUF's metadata to Hugging Face's config. What is known by no key here and changes the model is an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from infinilm_hookspecs import Config, ConfigError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# What llama.cpp's converter knows of llama 3.1 and after, and leaves out of the file but for what follows from it.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What else is said of an architecture, besides `rope.scaling...`: read here, or checked to say nothing new.
OPTIONS = (
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("rope.freq_base", "rope.dimension_count", "vocab_size", "expert_count", "expert_used_count"),
    "tensor_data_layout",
)
OFF = ("", "none", 0, 1, False, None)  # values that switch nothing on; a scale of 1 scales nothing


def to_huggingface(config: Config) -> dict[str, Any]:
    """Return the config of a llama, a mixtral, a qwen2 or a qwen3. Raises `ConfigError`."""
    family = config.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ConfigError(f"general.architecture is {family!r:.80}; known: {', '.join(ARCHITECTURES)}")
    _check_keys(config, family)
    adapted: dict[str, Any] = {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "vocab_size": config["vocab_size"],
        **{theirs: config[f"{family}.{ours}"] for ours, theirs in SIZES.items()},
        "tie_word_embeddings": not config["tensors"]["output"],
        **_token_ids(config),
    }
    num_heads = adapted["num_attention_heads"]
    head_dim = config.get(f"{family}.attention.key_length", adapted["hidden_size"] // num_heads)
    adapted["num_key_value_heads"] = config.get(f"{family}.attention.head_count_kv", num_heads)
    adapted["head_dim"] = head_dim
    if family == "llama":
        adapted["attention_bias"] = config["tensors"]["biases"]
    _expect(config, f"{family}.attention.value_length", head_dim)
    _expect(config, f"{family}.rope.dimension_count", head_dim)
    _expect(config, f"{family}.attention.sliding_window", 0)
    adapted["rope_parameters"] = _rope(config, family, head_dim)
    return _with_experts(config, family, adapted)


def _check_keys(config: Config, family: str) -> None:
    for key in (*(f"{family}.{key}" for key in SIZES), "vocab_size"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{key} is {value!r:.80}, and a number is wanted")
    known = {f"{family}.{key}" for key in (*SIZES, *OPTIONS)}
    unknown = [
        key
        for key, value in config.items()
        if key.startswith(f"{family}.") and key not in known and ".rope.scaling." not in key and value not in OFF
    ]
    if unknown:
        raise ConfigError(f"the file has {', '.join(unknown)}, which this plugin does not know")


def _token_ids(config: Config) -> dict[str, Any]:
    """Return the ids that begin and end a text; a turn may end with another one than a text."""
    ends = [config.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    found = {"bos_token_id": config.get("tokenizer.ggml.bos_token_id")}
    found["eos_token_id"] = list(dict.fromkeys(end for end in ends if end is not None)) or None
    return {key: value for key, value in found.items() if value is not None}


def _with_experts(config: Config, family: str, adapted: dict[str, Any]) -> dict[str, Any]:
    num_experts = config.get(f"{family}.expert_count", 0)
    if not num_experts:
        return adapted
    if family != "llama":
        raise ConfigError(f"{family}.expert_count is {num_experts}, and experts are known of llama alone")
    return {
        **adapted,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": num_experts,
        "num_experts_per_tok": config.get(f"{family}.expert_used_count"),
    }


def _rope(config: Config, family: str, head_dim: int) -> dict[str, Any]:
    theta = config.get(f"{family}.rope.freq_base", 10000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    factors = config["tensors"]["rope_freqs"]
    scaling = {
        key.rpartition(".")[2]: value for key, value in config.items() if key.startswith(f"{family}.rope.scaling.")
    }
    kind = scaling.pop("type", "none")
    if kind in OFF:
        return _llama3(parameters, factors, head_dim) if factors is not None else parameters
    parameters |= {"rope_type": kind, "factor": scaling.pop("factor", None)}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = scaling.pop("original_context_length", None)
    unknown = [key for key, value in scaling.items() if value not in OFF and key != "finetuned"]
    if kind not in ("linear", "yarn") or None in parameters.values() or unknown or factors is not None:
        stated = ", ".join(sorted({*parameters, *unknown} - {"rope_type", "rope_theta"}))
        raise ConfigError(
            f"{family}.rope.scaling is of the type {kind!r:.80}, with {stated}; known: linear with a factor, yarn with "
            "a factor and original_context_length"
        )
    return parameters


def _llama3(parameters: dict[str, Any], factors: Sequence[float], head_dim: int) -> dict[str, Any]:
    """Return the scaling that these factors, one for each frequency, follow from (`generate_extra_tensors` of llama in
    llama.cpp's convert_hf_to_gguf.py). Raises `ConfigError` where it is another one."""
    factor = max(factors, default=1.0)
    found = {**parameters, "rope_type": "llama3", "factor": factor, **LLAMA3}
    expected = [_llama3_factor(found, head_dim, at) for at in range(head_dim // 2)]
    if len(factors) == len(expected) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected)):
        return found if factor != 1.0 else parameters
    raise ConfigError(
        f"rope_freqs.weight, {len(factors)} numbers up to {factor:.4g}, does not follow from the scaling of llama 3.1 "
        f"({', '.join(f'{key} {value:.4g}' for key, value in LLAMA3.items())})"
    )


def _llama3_factor(scaling: dict[str, Any], head_dim: int, at: int) -> float:
    wavelength = 2 * math.pi * scaling["rope_theta"] ** (2 * at / head_dim)
    low, high, original = (scaling[key] for key in LLAMA3)
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return float(scaling["factor"])
    smooth = (original / wavelength - low) / (high - low)
    return float(1 / ((1 - smooth) / scaling["factor"] + smooth))


def _expect(config: Config, key: str, wanted: int) -> None:
    if config.get(key, wanted) != wanted:
        raise ConfigError(f"{key} is {config[key]!r:.80}, and {wanted} is what is known")
