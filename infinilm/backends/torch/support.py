"""What the torch backend runs, and the words in which it says no. No torch here: declining must cost nothing."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Final

from infinilm_hookspecs import (
    AttentionConfig,
    BackendRequest,
    DecoderConfig,
    DynamicRopeScaling,
    LayerConfig,
    LinearRopeScaling,
    Llama3RopeScaling,
    MlpConfig,
    MoeConfig,
    Named,
    NormConfig,
    RopeConfig,
    YarnRopeScaling,
)
from infinilm_hookspecs import config as contract

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
NORM_KINDS: Final = ("rms", "layer")
ROPE_SCALINGS: Final = (LinearRopeScaling, DynamicRopeScaling, Llama3RopeScaling, YarnRopeScaling)
_PARTS: Final = frozenset(part for part in vars(contract).values() if isinstance(part, type) and is_dataclass(part))


def named_parts(config: DecoderConfig) -> Iterator[tuple[str, Named]]:
    """Yield every `Named` part, with what the names of its parameters begin with."""
    for index, layer in enumerate(config.layers):
        for name, part in (("self_attn", layer.mixer), ("mlp", layer.mlp)):
            if isinstance(part, Named):
                yield f"model.layers.{index}.{name}", part


def why_not(request: BackendRequest, config: DecoderConfig, supplied: Container[str] = ()) -> str | None:
    """Return the first reason why the torch backend cannot do what is asked, or `None` where it can.

    `supplied` are the paths of the `Named` parts that a plugin has a module for.
    """
    return next(_reasons(request, config, supplied), None)


def why_not_request(request: BackendRequest) -> str | None:
    """Return the first reason why no model in torch can do what is asked, or `None` where one may."""
    return next(_request_reasons(request), None)


def _reasons(request: BackendRequest, config: DecoderConfig, supplied: Container[str]) -> Iterator[str]:
    yield from _request_reasons(request)
    yield from (f"the torch backend does not know {key!r} in the config" for key in _unknown_keys(config))
    if config.quantization is not None:
        yield f"the torch backend does not run weights quantized as {config.quantization.scheme!r}"
    num_positions = config.embedding.num_positions
    if num_positions is not None and request.max_model_len > num_positions:
        yield (
            f"the torch backend finds {num_positions} positions in this model, and max_model_len is "
            f"{request.max_model_len}"
        )
    if config.logits.softcap is not None and config.logits.softcap <= 0:
        yield f"the torch backend cannot cap logits at {config.logits.softcap!r}"
    for path, part in named_parts(config):
        if path not in supplied:
            number, what = path.split(".")[2], "MLP" if path.endswith(".mlp") else "mixer"
            yield (
                f"the torch backend does not run layer {number}: its {what} is {_part_name(part)}, and no plugin "
                "supplies a torch module for that"
            )
    for index, layer in enumerate(config.layers):
        for reason in _layer_reasons(layer):
            yield f"the torch backend does not run layer {index}: {reason}"
    yield from (f"the torch backend does not know the final norm: {reason}" for reason in _norm(config.final_norm))


def _request_reasons(request: BackendRequest) -> Iterator[str]:
    if request.dtype not in DTYPES:
        yield f"the torch backend computes in {', '.join(DTYPES)}, not in {request.dtype!r}"
    if request.world_size != 1:
        yield f"the torch backend runs in one process, and world_size is {request.world_size}"
    if request.quantization is not None:
        yield f"the torch backend does not quantize, and quantization={request.quantization!r} was asked for"
    yield from _unknown_quantization(request)


def _unknown_keys(part: object) -> Iterator[str]:
    """Name every key that a newer contract than this one put into a config."""
    for item in part if isinstance(part, tuple) else ():
        yield from _unknown_keys(item)
    known = next((kind for kind in type(part).__mro__ if kind in _PARTS), None)
    if known is None or known is Named:
        return
    names = [field.name for field in fields(known)]
    yield from (field.name for field in fields(part) if field.name not in names)  # type: ignore[arg-type]  # one of _PARTS
    for name in names:
        yield from _unknown_keys(getattr(part, name))


def _unknown_quantization(request: BackendRequest) -> Iterator[str]:
    """Say that weights are quantized in a way the checkpoint did not understand; what it did is dequantized at load."""
    stated = next((c.get("quantization_config") for c in reversed(request.lineage) if isinstance(c, Mapping)), None)
    if not stated or request.checkpoint.quantization is not None:
        return
    settings = dict(stated) if isinstance(stated, Mapping) else {"": stated}
    method = settings.pop("quant_method", None)
    shown = ", ".join(f"{key} {value!r}" for key, value in settings.items() if not isinstance(value, Mapping))
    yield (
        f"the torch backend does not run weights quantized as {method!r}, and no plugin knows how to dequantize this "
        f"layout of it: {shown[:200] or 'nothing more is stated'}"
    )


def _layer_reasons(layer: LayerConfig) -> Iterator[str]:
    if type(layer.mixer) is AttentionConfig:
        yield from _attention(layer.mixer)
    elif not isinstance(layer.mixer, Named):
        yield f"its mixer is {_part_name(layer.mixer)}"
    if type(layer.mlp) is MlpConfig or type(layer.mlp) is MoeConfig:
        yield from _mlp(layer.mlp)
    elif layer.mlp is not None and not isinstance(layer.mlp, Named):
        yield f"its MLP is {_part_name(layer.mlp)}"
    norms = layer.norms
    for norm in (norms.before_mixer, norms.after_mixer, norms.before_mlp, norms.after_mlp):
        if norm is not None:
            yield from _norm(norm)


def _attention(mixer: AttentionConfig) -> Iterator[str]:
    if mixer.num_heads % mixer.num_kv_heads:
        yield f"{mixer.num_heads} query heads cannot share {mixer.num_kv_heads} key-value heads evenly"
    if mixer.sliding_window is not None and mixer.sliding_window < 1:
        yield f"its sliding window of {mixer.sliding_window} hides every token from itself"
    if mixer.softcap is not None and mixer.softcap <= 0:
        yield f"its scores cannot be capped at {mixer.softcap!r}"
    if mixer.query_key_norm is not None:
        yield from _norm(mixer.query_key_norm)
    if mixer.rope is not None:
        yield from _rope(mixer.rope, mixer.head_dim)


def _rope(rope: RopeConfig, head_dim: int) -> Iterator[str]:
    if head_dim % 2:
        yield f"a head of {head_dim} has no two halves to rotate"
    if rope.scaling is not None and type(rope.scaling) not in ROPE_SCALINGS:
        yield f"its rope scaling is {_part_name(rope.scaling)}"
    if type(rope.scaling) is DynamicRopeScaling and head_dim < 4:
        yield f"dynamic rope scaling has no base for a head of {head_dim}"


def _mlp(mlp: MlpConfig | MoeConfig) -> Iterator[str]:
    if mlp.activation not in ACTIVATIONS:
        yield f"its activation is {mlp.activation!r}"
    if isinstance(mlp, MoeConfig) and mlp.experts_per_token > mlp.num_experts:
        yield f"{mlp.experts_per_token} of {mlp.num_experts} experts cannot be chosen"


def _norm(norm: NormConfig) -> Iterator[str]:
    if norm.kind not in NORM_KINDS:
        yield f"its norm is {norm.kind!r}"


def _part_name(part: object) -> str:
    return f"Named({part.name!r})" if isinstance(part, Named) else type(part).__name__
