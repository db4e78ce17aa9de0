"""The canonical parameters of a `DecoderConfig`: their one definition, pure and without torch.

Names are Hugging Face llama's, at the finest grain (q, k and v apart, gate and up apart), so most checkpoints need no
rule. Planning, sharding and export are tested against this function without any backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from infinilm_hookspecs.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig


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
    for index, layer in enumerate(config.layers):
        for name, spec in _layer(layer, config.hidden_size, dtype):
            specs[f"model.layers.{index}.{name}"] = spec
    specs["model.norm.weight"] = ParameterSpec((config.hidden_size,), dtype)
    tied_to = "model.embed_tokens.weight" if config.embedding.tied else None
    specs["lm_head.weight"] = replace(embedding, tied_to=tied_to)
    return specs


def _layer(layer: LayerConfig, hidden: int, dtype: str) -> Iterator[tuple[str, ParameterSpec]]:
    if layer.norms.before_mixer is not None:
        yield "input_layernorm.weight", ParameterSpec((hidden,), dtype)
    if isinstance(layer.mixer, AttentionConfig):
        yield from _attention(layer.mixer, hidden, dtype)
    if layer.norms.before_mlp is not None:
        yield "post_attention_layernorm.weight", ParameterSpec((hidden,), dtype)
    if isinstance(layer.mlp, MlpConfig):
        yield from _mlp(layer.mlp, hidden, dtype)


def _attention(mixer: AttentionConfig, hidden: int, dtype: str) -> Iterator[tuple[str, ParameterSpec]]:
    heads = Shard(0, multiple=mixer.head_dim)
    for letter, num_heads in (("q", mixer.num_heads), ("k", mixer.num_kv_heads), ("v", mixer.num_kv_heads)):
        rows = num_heads * mixer.head_dim
        yield f"self_attn.{letter}_proj.weight", ParameterSpec((rows, hidden), dtype, heads)
        if mixer.qkv_bias:
            yield f"self_attn.{letter}_proj.bias", ParameterSpec((rows,), dtype, heads)
    columns = mixer.num_heads * mixer.head_dim
    yield "self_attn.o_proj.weight", ParameterSpec((hidden, columns), dtype, Shard(1, multiple=mixer.head_dim))
    if mixer.output_bias:
        yield "self_attn.o_proj.bias", ParameterSpec((hidden,), dtype)


def _mlp(mlp: MlpConfig, hidden: int, dtype: str) -> Iterator[tuple[str, ParameterSpec]]:
    for part in ("gate", "up"):
        yield f"mlp.{part}_proj.weight", ParameterSpec((mlp.intermediate_size, hidden), dtype, Shard(0))
        if mlp.bias:
            yield f"mlp.{part}_proj.bias", ParameterSpec((mlp.intermediate_size,), dtype, Shard(0))
    yield "mlp.down_proj.weight", ParameterSpec((hidden, mlp.intermediate_size), dtype, Shard(1))
    if mlp.bias:
        yield "mlp.down_proj.bias", ParameterSpec((hidden,), dtype)
