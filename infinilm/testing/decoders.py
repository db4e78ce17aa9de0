"""Small `DecoderConfig`s that between them have every part there is, and configs with what nobody knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, make_dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    DynamicRopeScaling,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LinearRopeScaling,
    LogitsConfig,
    MlpConfig,
    MoeConfig,
    Named,
    NormConfig,
    RopeConfig,
)

UNKNOWN_NAME: Final = "part_nobody_knows"
UNKNOWN_KEY: Final = "key_of_a_newer_contract"

_RMS: Final = NormConfig()
_LAYER_NORM: Final = NormConfig(kind="layer", eps=1e-5, bias=True)
_ATTENTION: Final = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig())
_PLAIN: Final = LayerConfig(_ATTENTION, MlpConfig(48), LayerNorms(before_mixer=_RMS, before_mlp=_RMS))


def _decoder(name: str, *layers: LayerConfig, **changes: Any) -> DecoderConfig:
    stated: dict[str, Any] = {
        "model_type": f"conformance_{name}",
        "vocab_size": 101,
        "hidden_size": 32,
        "layers": layers,
        "embedding": EmbeddingConfig(),
        "final_norm": _RMS,
        "logits": LogitsConfig(),
        "max_position_embeddings": 1024,
    }
    return DecoderConfig(**stated | changes)


def _dynamic_rope() -> DecoderConfig:
    """Whose keys depend on where the prompt ends."""
    rope = RopeConfig(scaling=DynamicRopeScaling(factor=2.0, original_max_position_embeddings=16))
    layer = replace(_PLAIN, mixer=replace(_ATTENTION, rope=rope, qkv_bias=True))
    return _decoder("dynamic_rope", layer, layer)


def _sliding_window() -> DecoderConfig:
    """Two windows of different widths, caps, and norms on both sides of each half."""
    norm = replace(_RMS, offset=1.0)
    norms = LayerNorms(norm, norm, norm, norm)
    mixer = replace(_ATTENTION, softcap=5.0, scale=0.2)
    mlp = MlpConfig(48, activation="gelu_tanh")
    wide, narrow = (LayerConfig(replace(mixer, sliding_window=width), mlp, norms) for width in (21, 13))
    return _decoder(
        "sliding_window",
        wide,
        narrow,
        embedding=EmbeddingConfig(tied=True, scale=32**0.5),
        final_norm=norm,
        logits=LogitsConfig(softcap=8.0),
    )


def _experts() -> DecoderConfig:
    """Two of five experts, under every way to weigh them, normalised heads, and one key-value head for all."""
    mixer = replace(_ATTENTION, num_kv_heads=1, query_key_norm=_RMS, rope=RopeConfig(scaling=LinearRopeScaling(4.0)))
    experts = MoeConfig(num_experts=5, experts_per_token=2, intermediate_size=24)
    layers = (replace(_PLAIN, mixer=mixer, mlp=mlp) for mlp in (experts, replace(experts, normalize=True)))
    return _decoder("experts", *layers, logits=LogitsConfig(scale=0.5))


def _learned_positions() -> DecoderConfig:
    """Learned positions instead of rope, layer norms, biases everywhere, and an MLP without a gate."""
    mixer = replace(_ATTENTION, num_kv_heads=4, rope=None, qkv_bias=True, output_bias=True)
    mlp = MlpConfig(48, activation="gelu", bias=True, gated=False)
    layer = LayerConfig(mixer, mlp, LayerNorms(_LAYER_NORM, _LAYER_NORM))
    embedding = EmbeddingConfig(tied=True, num_positions=1024)
    return _decoder("learned_positions", layer, layer, embedding=embedding, final_norm=_LAYER_NORM)


DECODERS: Final[Mapping[str, DecoderConfig]] = MappingProxyType(
    {
        "dense": _decoder("dense", _PLAIN, _PLAIN),
        "dynamic_rope": _dynamic_rope(),
        "sliding_window": _sliding_window(),
        "experts": _experts(),
        "learned_positions": _learned_positions(),
    }
)
"""The models that `decoder_cases` asks a backend to run; "dense" is the plainest."""


def enlarged(config: DecoderConfig) -> DecoderConfig:
    """Return `config` with matrices of hundreds of megabytes, and parameters of gigabytes in all."""
    layers = tuple(replace(layer, mlp=_enlarged_mlp(layer.mlp)) for layer in config.layers)
    return replace(config, hidden_size=1 << 13, vocab_size=1 << 16, layers=layers)


def _enlarged_mlp(mlp: MlpConfig | MoeConfig | Named | None) -> MlpConfig | MoeConfig | Named | None:
    return replace(mlp, intermediate_size=1 << 14) if isinstance(mlp, MlpConfig | MoeConfig) else mlp


def with_all_experts(config: DecoderConfig) -> DecoderConfig:
    """Return `config` without a choice of experts: all of them are run for every token."""
    layers = (
        replace(layer, mlp=replace(layer.mlp, experts_per_token=layer.mlp.num_experts))
        if isinstance(layer.mlp, MoeConfig)
        else layer
        for layer in config.layers
    )
    return replace(config, layers=tuple(layers))


def is_position_aware(config: DecoderConfig) -> bool:
    """Return whether a token's place in its sequence matters to the model."""
    mixers = [layer.mixer for layer in config.layers]
    knows = any(isinstance(mixer, Named) or mixer.rope is not None for mixer in mixers)
    return knows or config.embedding.num_positions is not None


def windows(config: object) -> list[int | None]:
    """Return the width of the sliding window of every layer, `None` where a layer sees all or nobody knows."""
    if not isinstance(config, DecoderConfig):
        return [None]
    return [getattr(layer.mixer, "sliding_window", None) for layer in config.layers]


def reach(config: object) -> int | None:
    """Return how many places before a token anything can matter to it, through all layers; `None`: all there are."""
    widths = [width for width in windows(config) if width is not None]
    return sum(width - 1 for width in widths) if len(widths) == len(windows(config)) else None


# ---------------------------------------------------------------- what nobody knows


def with_unknown_parts(config: DecoderConfig) -> Iterator[tuple[str, DecoderConfig]]:
    """Yield `config` with a mixer, then with an MLP, that no backend knows, and where that is."""
    *layers, last = config.layers
    unknown = Named(UNKNOWN_NAME, MappingProxyType({"size": 3}))
    yield "the mixer of the last layer", replace(config, layers=(*layers, replace(last, mixer=unknown)))
    yield "the MLP of the last layer", replace(config, layers=(*layers, replace(last, mlp=unknown)))


def with_unknown_keys(config: DecoderConfig) -> Iterator[tuple[str, DecoderConfig]]:
    """Yield `config` with a key that no backend knows in one of its parts after the other, and where that is.

    The key is not at its default, so that `to_json` writes it: whoever overlooks it runs another model.
    """
    yield "the config itself", _with_key(config)
    for path, part in _parts(config):
        yield ".".join(map(str, path)), _replaced(config, path, _with_key(part))


def _with_key(part: Any) -> Any:
    """Return a part of the class that a newer contract would have, with one field more."""
    newer = make_dataclass(
        type(part).__name__, [(UNKNOWN_KEY, float, 0.0)], bases=(type(part),), frozen=True, slots=True
    )
    return newer(**{field.name: getattr(part, field.name) for field in fields(part)}, **{UNKNOWN_KEY: 1.0})


def _parts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield every part inside of `value`, with the fields and indices that lead there. Of layers, only the last."""
    if isinstance(value, tuple) and value:
        inner = [(len(value) - 1, value[-1])]
    else:
        inner = [(field.name, getattr(value, field.name)) for field in fields(value)]  # type: ignore[misc]
    for key, part in inner:
        if is_dataclass(part):
            yield (*path, key), part
        if is_dataclass(part) or (isinstance(part, tuple) and part):
            yield from _parts(part, (*path, key))


def _replaced(value: Any, path: tuple[str | int, ...], part: Any) -> Any:
    if not path:
        return part
    key, *rest = path
    if isinstance(key, int):
        return (*value[:key], _replaced(value[key], tuple(rest), part), *value[key + 1 :])
    return replace(value, **{key: _replaced(getattr(value, key), tuple(rest), part)})
