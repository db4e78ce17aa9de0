"""Read what Hugging Face writes into a `config.json`: typed values, defaults left out, both spellings of rope.

Knows keys and their meaning, not the defaults of any family: those are arguments. A key that is null counts as left
out, except where null has a meaning of its own. Every misfit is a `ConfigError` that names the key, shows the value
and says what would have been understood.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from infinilm_hookspecs import (
    AttentionConfig,
    Config,
    ConfigError,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeConfig,
    YarnRopeScaling,
)
from infinilm_hookspecs.config import Activation, RopeScaling

# transformers has several names for one function: its `ACT2FN` table, grouped by formula.
_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn")
# Whether a layer of this type has a sliding window; "attention" is what transformers 4 called the first of them.
_LAYER_TYPES: Final[Mapping[str, bool]] = {"full_attention": False, "sliding_attention": True, "attention": False}


def is_model_type(config: Config, model_types: Collection[str]) -> bool:
    """Return whether the config's `model_type` is one of `model_types`, which are lower case."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type.lower() in model_types


def with_own_names(config: Config, names: Mapping[str, str]) -> Config:
    """Return the config with every key of `names` called by its value: the name the family gives it.

    Raises `ConfigError` where a config has both, and they differ.
    """
    renamed = dict(config)
    for general, own in names.items():
        value = renamed.pop(general, None)
        if value is None:
            continue
        if renamed.get(own) not in (None, value):
            raise ConfigError(f"{general} is {value!r} and {own} is {renamed[own]!r}, which are one thing{_of(config)}")
        renamed[own] = value
    return renamed


# ---------------------------------------------------------------- typed values


def size(config: Config, key: str, default: int | None = None) -> int:
    """Return a positive integer. Without a default the key is required."""
    value = _value(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} is {value!r}, and must be a positive integer{_of(config)}")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """Return a positive, finite number as a float. Without a default the key is required."""
    value = _value(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{key} is {value!r}, and must be a positive number{_of(config)}")
    return float(value)


def optional_size(config: Config, key: str, default: int | None) -> int | None:
    """Return a positive integer, or `None` where the key is null: off, whatever the default."""
    return None if config.get(key, default) is None else size(config, key, default)


def optional_number(config: Config, key: str, default: float | None) -> float | None:
    """Return a positive, finite number, or `None` where the key is null: off, whatever the default."""
    return None if config.get(key, default) is None else number(config, key, default)


def count(config: Config, key: str, default: int) -> int:
    """Return an integer that may be zero."""
    value = _value(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{key} is {value!r}, and must be zero or a positive integer{_of(config)}")
    return value


def flag(config: Config, key: str, default: bool) -> bool:
    """Return true or false."""
    value = _value(config, key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}, and must be true or false{_of(config)}")
    return value


def activation(config: Config, key: str, default: str) -> Activation:
    """Return the contract's name of an activation function that transformers knows by `config[key]`."""
    value = _value(config, key, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ConfigError(f"{key} is {value!r}{_of(config)}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def require(config: Config, key: str, known: object) -> None:
    """Raise `ConfigError` where a config asks for anything but `known`, which is also what leaving it out means."""
    value = config.get(key)
    if value is not None and value != known:
        raise ConfigError(f"{key} is {value!r}{_of(config)}; known: {known!r}")


def _value(config: Config, key: str, default: object) -> Any:
    value = config.get(key)
    if value is not None:
        return value
    if default is None:
        raise ConfigError(f"{key} is missing{_of(config)}")
    return default


def _of(config: Config) -> str:
    model_type = config.get("model_type")
    return "" if model_type is None else f" in the config of model_type {model_type!r}"


# ---------------------------------------------------------------- attention


def attention(
    config: Config,
    *,
    hidden_size: int,
    num_heads: int,
    rope: RopeConfig | None,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
) -> AttentionConfig:
    """Return grouped-query attention of the sizes in `num_key_value_heads` and `head_dim`, or of their defaults.

    A `None` default means as many key-value heads as query heads, as a null there does, and a `head_dim` of
    `hidden_size / num_heads`.
    """
    num_kv_heads = optional_size(config, "num_key_value_heads", default_kv_heads) or num_heads
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_key_value_heads is {num_kv_heads}, and must divide num_attention_heads, {num_heads}{_of(config)}"
        )
    head_dim = _head_dim(config, hidden_size, num_heads, default_head_dim)
    if rope is not None and head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}, and rotary position embedding needs an even one{_of(config)}")
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
    )


def _head_dim(config: Config, hidden_size: int, num_heads: int, default: int | None) -> int:
    if config.get("head_dim") is not None or default is not None:
        return size(config, "head_dim", default)
    if hidden_size % num_heads:
        raise ConfigError(
            f"head_dim is missing, and hidden_size, {hidden_size}, is no multiple of num_attention_heads, "
            f"{num_heads}{_of(config)}"
        )
    return hidden_size // num_heads


def windows(config: Config, window: int | None, is_sliding: Sequence[bool]) -> tuple[int | None, ...]:
    """Return the sliding window of every layer: `window`, or `None` where a layer attends to everything.

    `layer_types` says which is which. Left out, as in transformers 4, `is_sliding` does.
    """
    chosen = _sliding_layers(config, len(is_sliding)) or is_sliding
    if window is None and any(chosen):
        raise ConfigError(
            f"layer {list(chosen).index(True)} is of type 'sliding_attention', and there is no sliding_window"
            f"{_of(config)}"
        )
    return tuple(window if slides else None for slides in chosen)


def upper_windows(
    config: Config, *, num_layers: int, default_window: int, default_full_layers: int
) -> tuple[int | None, ...]:
    """Return the sliding window of every layer of a family that has none in its first `max_window_layers` layers.

    And none at all without `use_sliding_window`.
    """
    is_used = flag(config, "use_sliding_window", False)
    window = optional_size(config, "sliding_window", default_window) if is_used else None
    num_full = count(config, "max_window_layers", default_full_layers)
    return windows(config, window, [window is not None and index >= num_full for index in range(num_layers)])


def one_window(config: Config, *, num_layers: int, default_window: int | None) -> int | None:
    """Return the sliding window of a family whose layers are all alike. A `layer_types` must not say otherwise."""
    window = optional_size(config, "sliding_window", default_window)
    if any(slides is (window is None) for slides in _sliding_layers(config, num_layers)):
        raise ConfigError(
            f"layer_types is {config['layer_types']!r} and sliding_window {window!r}{_of(config)}; "
            "known: the same attention in all layers"
        )
    return window


def _sliding_layers(config: Config, num_layers: int) -> Sequence[bool]:
    """Return for every layer whether its type has a window; nothing where a config does not say."""
    layer_types = config.get("layer_types")
    if layer_types is None:
        return ()
    if isinstance(layer_types, str) or not isinstance(layer_types, Sequence) or len(layer_types) != num_layers:
        raise ConfigError(f"layer_types is {layer_types!r}, and must have {num_layers} entries{_of(config)}")
    for layer_type in layer_types:
        if not isinstance(layer_type, str) or layer_type not in _LAYER_TYPES:
            raise ConfigError(f"layer_types has {layer_type!r}{_of(config)}; known: {', '.join(_LAYER_TYPES)}")
    return [_LAYER_TYPES[layer_type] for layer_type in layer_types]


# ---------------------------------------------------------------- rotary position embedding


def rope(config: Config, *, max_position_embeddings: int, default_theta: float = 10000.0) -> RopeConfig:
    """Return the rotary embedding, in either spelling.

    transformers 5 keeps everything in `rope_parameters`; transformers 4 has `rope_theta` beside `rope_scaling`, whose
    `type` became `rope_type`. `max_position_embeddings` is the config's own, before any scaling.
    """
    parameters = _rope_parameters(config)
    fraction = number(parameters, "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise ConfigError(f"partial_rotary_factor is {fraction!r}{_of(config)}; only whole heads can be rotated")
    theta = number(parameters, "rope_theta", number(config, "rope_theta", default_theta))
    return RopeConfig(theta, _rope_scaling(config, parameters, max_position_embeddings))


def usable_length(max_position_embeddings: int, rope: RopeConfig) -> int:
    """Return the longest sequence a model is made for, from the `max_position_embeddings` its config states.

    Configs state the length before linear and dynamic scaling, and after llama3 and yarn scaling.
    """
    scaling = rope.scaling
    if isinstance(scaling, LinearRopeScaling | DynamicRopeScaling):
        return int(max_position_embeddings * scaling.factor)
    if isinstance(scaling, YarnRopeScaling):
        return max(max_position_embeddings, int(scaling.original_max_position_embeddings * scaling.factor))
    return max_position_embeddings


def _rope_parameters(config: Config) -> Config:
    # The old spelling wins where a config has both, as in transformers.
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key)
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ConfigError(f"{key} is {parameters!r}, and must be an object{_of(config)}")
        if parameters and any(isinstance(value, Mapping) for value in parameters.values()):
            raise ConfigError(f"{key} is {parameters!r}{_of(config)}; known: the same rotation in all layers")
        if parameters:
            return parameters
    return {}


def _rope_scaling(config: Config, parameters: Config, max_position_embeddings: int) -> RopeScaling | None:
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return LinearRopeScaling(number(parameters, "factor"))
    if rope_type == "dynamic":
        return DynamicRopeScaling(number(parameters, "factor"), max_position_embeddings)
    if rope_type not in _ROPE_TYPES:
        raise ConfigError(f"rope_type is {rope_type!r}{_of(config)}; known: {', '.join(_ROPE_TYPES)}")
    key = "original_max_position_embeddings"
    original = size(config, key, size(parameters, key, max_position_embeddings))
    if rope_type == "llama3":
        return _llama3(parameters, original)
    return _yarn(parameters, original, max_position_embeddings)


def _llama3(parameters: Config, original: int) -> Llama3RopeScaling:
    low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
    if low >= high:
        raise ConfigError(f"low_freq_factor is {low!r}, and must be less than high_freq_factor, {high!r}")
    return Llama3RopeScaling(
        factor=number(parameters, "factor"),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(parameters: Config, original: int, max_position_embeddings: int) -> YarnRopeScaling:
    factor = number(parameters, "factor", max_position_embeddings / original)
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=number(parameters, "attention_factor", _yarn_attention_factor(parameters, factor)),
        beta_fast=number(parameters, "beta_fast", 32.0),
        beta_slow=number(parameters, "beta_slow", 1.0),
        truncate=flag(parameters, "truncate", True),
    )


def _yarn_attention_factor(parameters: Config, factor: float) -> float:
    """Return `0.1 ln(factor) + 1` (arXiv:2309.00071, eq. 22), or DeepSeek's ratio of two such numbers."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(number(parameters, "mscale")) / magnitude(number(parameters, "mscale_all_dim"))
    return magnitude(1.0)
