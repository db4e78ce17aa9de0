"""What the torch backend runs, and the words in which it says no. No torch here: declining must cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
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
    Named,
    NormConfig,
    YarnRopeScaling,
)

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
NORM_KINDS: Final = ("rms",)
ROPE_SCALINGS: Final = (LinearRopeScaling, DynamicRopeScaling, Llama3RopeScaling, YarnRopeScaling)


def why_not(request: BackendRequest, config: DecoderConfig) -> str | None:
    """Return the first reason why the torch backend cannot do what is asked, or `None` where it can."""
    return next(_reasons(request, config), None)


def _reasons(request: BackendRequest, config: DecoderConfig) -> Iterator[str]:
    if request.dtype not in DTYPES:
        yield f"the torch backend computes in {', '.join(DTYPES)}, not in {request.dtype!r}"
    if request.world_size != 1:
        yield f"the torch backend runs in one process, and world_size is {request.world_size}"
    if request.quantization is not None:
        yield f"the torch backend does not quantize, and quantization={request.quantization!r} was asked for"
    for quantization in (config.quantization, request.checkpoint.quantization):
        if quantization is not None:
            yield f"the torch backend does not run weights quantized as {quantization.scheme!r}"
    for index, layer in enumerate(config.layers):
        for reason in _layer_reasons(layer):
            yield f"the torch backend does not run layer {index}: {reason}"
    yield from (f"the torch backend does not know the final norm: {reason}" for reason in _norm(config.final_norm))


def _layer_reasons(layer: LayerConfig) -> Iterator[str]:
    if type(layer.mixer) is AttentionConfig:
        yield from _attention(layer.mixer)
    else:
        yield f"its mixer is {_part_name(layer.mixer)}"
    if type(layer.mlp) is MlpConfig:
        if layer.mlp.activation not in ACTIVATIONS:
            yield f"its activation is {layer.mlp.activation!r}"
    elif layer.mlp is not None:
        yield f"its MLP is {_part_name(layer.mlp)}"
    for norm in (layer.norms.before_mixer, layer.norms.before_mlp):
        if norm is not None:
            yield from _norm(norm)


def _attention(mixer: AttentionConfig) -> Iterator[str]:
    if mixer.num_heads % mixer.num_kv_heads:
        yield f"{mixer.num_heads} query heads cannot share {mixer.num_kv_heads} key-value heads evenly"
    if mixer.rope is None:
        return
    if mixer.head_dim % 2:
        yield f"a head of {mixer.head_dim} has no two halves to rotate"
    if mixer.rope.scaling is not None and type(mixer.rope.scaling) not in ROPE_SCALINGS:
        yield f"its rope scaling is {_part_name(mixer.rope.scaling)}"
    if type(mixer.rope.scaling) is DynamicRopeScaling and mixer.head_dim < 4:
        yield f"dynamic rope scaling has no base for a head of {mixer.head_dim}"


def _norm(norm: NormConfig) -> Iterator[str]:
    if norm.kind not in NORM_KINDS:
        yield f"its norm is {norm.kind!r}"


def _part_name(part: object) -> str:
    return f"Named({part.name!r})" if isinstance(part, Named) else type(part).__name__
