"""The canonical parameters of a `DecoderConfig`: their one definition, pure and without torch.

Names are Hugging Face llama's, at the finest grain (q, k and v apart, gate and up apart, one of each per expert), so
most checkpoints need no rule. What llama lacks is called as in another family of transformers: `embed_positions` as in
opt, `q_norm` as in qwen3, `post_feedforward_layernorm` as in gemma2, `mlp.gate` (the router) and
`mlp.experts.3.up_proj` as in qwen2_moe. Planning, sharding and export are tested against this function without any
backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from infinilm_hookspecs.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    LayerNorms,
    MlpConfig,
    MoeConfig,
    NormConfig,
)


@dataclass(frozen=True, slots=True)
class Shard:
    """How tensor parallelism cuts a parameter: along `dim`, only at multiples of `multiple` elements.

    `segments` are the sizes of the pieces a fused dimension is made of; each is cut by itself.
    """

    dim: int
    multiple: int = 1
    segments: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter a backend wants: the shape of the whole, all ranks together, and the dtype it is kept in.

    `shard=None` means that every rank has all of it. A parameter that is `tied_to` another has no storage of its own.

    A backend that runs quantized checkpoints as they are asks for `NAME:weight`, `NAME:zero`, `NAME:scale` and whatever
    else `Quantization.groups` has for a weight, in stored shape and dtype, in the place of `NAME`.
    """

    shape: tuple[int, ...]
    dtype: str
    shard: Shard | None = None
    tied_to: str | None = None


def parameters(config: DecoderConfig, dtype: str = "float32") -> Mapping[str, ParameterSpec]:
    """Return every parameter of `config` by canonical name, in the order a forward pass meets them.

    `dtype` is the one they are all kept in. Parts that are `Named` have whatever parameters their plugin says, and none
    here. Matrices are stored (output features, input features).
    """
    # (vocab_size, hidden_size)
    embedding = ParameterSpec((config.vocab_size, config.hidden_size), dtype, Shard(0))
    specs = {"model.embed_tokens.weight": embedding}
    if config.embedding.num_positions is not None:
        shape = (config.embedding.num_positions, config.hidden_size)
        specs["model.embed_positions.weight"] = ParameterSpec(shape, dtype)
    kinds: list[tuple[LayerConfig, list[tuple[str, ParameterSpec]]]] = []  # few, and each may have a thousand experts
    for index, layer in enumerate(config.layers):
        listed = next((listed for kind, listed in kinds if kind == layer), None)
        if listed is None:
            listed = list(_layer(layer, config.hidden_size, dtype))
            kinds.append((layer, listed))
        specs |= {f"model.layers.{index}.{name}": spec for name, spec in listed}
    specs.update(_norm("model.norm", config.final_norm, config.hidden_size, dtype))
    tied_to = "model.embed_tokens.weight" if config.embedding.tied else None
    specs["lm_head.weight"] = replace(embedding, tied_to=tied_to)
    return specs


def norm_names(norms: LayerNorms) -> Mapping[str, str]:
    """Return what the parameters of each norm of a layer are called, by the name of its field.

    llama calls the norm before the MLP `post_attention_layernorm`. Where a layer has one after the mixer that name is
    taken, as in gemma2, and the norm before the MLP is `pre_feedforward_layernorm`.
    """
    return {
        "before_mixer": "input_layernorm",
        "after_mixer": "post_attention_layernorm",
        "before_mlp": "post_attention_layernorm" if norms.after_mixer is None else "pre_feedforward_layernorm",
        "after_mlp": "post_feedforward_layernorm",
    }


_Specs = Iterator[tuple[str, ParameterSpec]]


def _layer(layer: LayerConfig, hidden: int, dtype: str) -> _Specs:
    norms, names = layer.norms, norm_names(layer.norms)
    yield from _norm(names["before_mixer"], norms.before_mixer, hidden, dtype)
    if isinstance(layer.mixer, AttentionConfig):
        yield from _attention(layer.mixer, hidden, dtype)
    yield from _norm(names["after_mixer"], norms.after_mixer, hidden, dtype)
    yield from _norm(names["before_mlp"], norms.before_mlp, hidden, dtype)
    if isinstance(layer.mlp, MlpConfig):
        yield from _mlp(layer.mlp, hidden, dtype)
    elif isinstance(layer.mlp, MoeConfig):
        yield from _moe(layer.mlp, hidden, dtype)
    yield from _norm(names["after_mlp"], norms.after_mlp, hidden, dtype)


def _norm(name: str, norm: NormConfig | None, size: int, dtype: str) -> _Specs:
    if norm is None:
        return
    yield f"{name}.weight", ParameterSpec((size,), dtype)
    if norm.bias:
        yield f"{name}.bias", ParameterSpec((size,), dtype)


def _attention(mixer: AttentionConfig, hidden: int, dtype: str) -> _Specs:
    heads = Shard(0, multiple=mixer.head_dim)
    for letter, num_heads in (("q", mixer.num_heads), ("k", mixer.num_kv_heads), ("v", mixer.num_kv_heads)):
        rows = num_heads * mixer.head_dim
        yield f"self_attn.{letter}_proj.weight", ParameterSpec((rows, hidden), dtype, heads)
        if mixer.qkv_bias:
            yield f"self_attn.{letter}_proj.bias", ParameterSpec((rows,), dtype, heads)
    for letter in "qk":
        yield from _norm(f"self_attn.{letter}_norm", mixer.query_key_norm, mixer.head_dim, dtype)
    columns = mixer.num_heads * mixer.head_dim
    yield "self_attn.o_proj.weight", ParameterSpec((hidden, columns), dtype, Shard(1, multiple=mixer.head_dim))
    if mixer.output_bias:
        yield "self_attn.o_proj.bias", ParameterSpec((hidden,), dtype)


def _mlp(mlp: MlpConfig, hidden: int, dtype: str) -> _Specs:
    for part in ("gate", "up") if mlp.gated else ("up",):
        yield f"mlp.{part}_proj.weight", ParameterSpec((mlp.intermediate_size, hidden), dtype, Shard(0))
        if mlp.bias:
            yield f"mlp.{part}_proj.bias", ParameterSpec((mlp.intermediate_size,), dtype, Shard(0))
    yield "mlp.down_proj.weight", ParameterSpec((hidden, mlp.intermediate_size), dtype, Shard(1))
    if mlp.bias:
        yield "mlp.down_proj.bias", ParameterSpec((hidden,), dtype)


def _moe(moe: MoeConfig, hidden: int, dtype: str) -> _Specs:
    yield "mlp.gate.weight", ParameterSpec((moe.num_experts, hidden), dtype)
    into = ParameterSpec((moe.intermediate_size, hidden), dtype, Shard(0))
    out = ParameterSpec((hidden, moe.intermediate_size), dtype, Shard(1))
    for expert in range(moe.num_experts):
        yield f"mlp.experts.{expert}.gate_proj.weight", into
        yield f"mlp.experts.{expert}.up_proj.weight", into
        yield f"mlp.experts.{expert}.down_proj.weight", out
