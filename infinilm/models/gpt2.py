"""gpt2: learned positions, layer norms and biases everywhere, an MLP without a gate (Radford et al. 2019).

Matrices are stored (input features, output features), with queries, keys and values in one. The oldest checkpoints lack
the prefix `transformer.`, and have causal masks beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from infinilm.models import _huggingface as huggingface
from infinilm_hookspecs import (
    DROP,
    AttentionConfig,
    Config,
    ConfigError,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    NormConfig,
    Weight,
    WeightRule,
    hookimpl,
)

model_types = ("gpt2",)

# transformers reads the names that other families use as well.
_OWN_NAMES: Final = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@hookimpl
def adapt_config(config: Config) -> DecoderConfig | None:
    """Describe a gpt2. Sizes left out are those of the smallest model.

    `reorder_and_upcast_attn` is how to round on the way to the same scores, and not read.
    """
    if not huggingface.is_model_type(config, model_types):
        return None
    huggingface.require(config, "add_cross_attention", False)
    config = huggingface.with_own_names(config, _OWN_NAMES)
    hidden_size = huggingface.size(config, "n_embd", 768)
    num_positions = huggingface.size(config, "n_positions", 1024)
    norm = NormConfig(kind="layer", eps=huggingface.number(config, "layer_norm_epsilon", 1e-5), bias=True)
    mlp = MlpConfig(
        intermediate_size=huggingface.size(config, "n_inner", 4 * hidden_size),
        activation=huggingface.activation(config, "activation_function", "gelu_new"),
        bias=True,
        gated=False,
    )
    return DecoderConfig(
        model_type="gpt2",
        vocab_size=huggingface.size(config, "vocab_size", 50257),
        hidden_size=hidden_size,
        layers=tuple(
            LayerConfig(mixer, mlp, LayerNorms(before_mixer=norm, before_mlp=norm))
            for mixer in _mixers(config, hidden_size)
        ),
        embedding=EmbeddingConfig(
            tied=huggingface.flag(config, "tie_word_embeddings", True),
            num_positions=num_positions,
        ),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=num_positions,
    )


def _mixers(config: Config, hidden_size: int) -> Sequence[AttentionConfig]:
    num_heads = huggingface.size(config, "n_head", 12)
    if hidden_size % num_heads:
        raise ConfigError(f"n_head is {num_heads}, and must divide n_embd, {hidden_size}")
    head_dim = hidden_size // num_heads
    scale = head_dim**-0.5 if huggingface.flag(config, "scale_attn_weights", True) else 1.0
    is_scaled_by_depth = huggingface.flag(config, "scale_attn_by_inverse_layer_idx", False)
    return [
        AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            rope=None,
            scale=scale / (index + 1) if is_scaled_by_depth else scale,
            qkv_bias=True,
            output_bias=True,
        )
        for index in range(huggingface.size(config, "n_layer", 12))
    ]


@hookimpl
def remap_weight(config: Config) -> WeightRule | None:
    """Turn the matrices, split queries, keys and values, and drop the masks."""
    if not huggingface.is_model_type(config, model_types):
        return None
    return {f"{prefix}{name}": value for name, value in _RULE.items() for prefix in ("", "transformer.")}


def _split_qkv(weight: Weight, layer: int) -> Sequence[Weight]:
    """Return q, k and v of a matrix (hidden_size, 3 * hidden_size), or of a bias (3 * hidden_size)."""
    kind = "weight" if weight.ndim == 2 else "bias"
    return [
        part.t().rename(f"model.layers.{layer}.self_attn.{letter}_proj.{kind}")
        for letter, part in zip("qkv", weight.chunk(3, dim=-1), strict=True)
    ]


def _turned(name: str) -> Callable[..., Weight]:
    """Return what makes the parameter `name` of a matrix (input features, output features)."""
    return lambda weight, layer: weight.t().rename(name.format(layer=layer))


_RULE: Final[Mapping[str, Any]] = {
    "wte.weight": "model.embed_tokens.weight",
    "wpe.weight": "model.embed_positions.weight",
    "h.{layer}.ln_1.weight": "model.layers.{layer}.input_layernorm.weight",
    "h.{layer}.ln_1.bias": "model.layers.{layer}.input_layernorm.bias",
    "h.{layer}.attn.c_attn.weight": _split_qkv,
    "h.{layer}.attn.c_attn.bias": _split_qkv,
    "h.{layer}.attn.c_proj.weight": _turned("model.layers.{layer}.self_attn.o_proj.weight"),
    "h.{layer}.attn.c_proj.bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "h.{layer}.attn.bias": DROP,
    "h.{layer}.attn.masked_bias": DROP,
    "h.{layer}.ln_2.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "h.{layer}.ln_2.bias": "model.layers.{layer}.post_attention_layernorm.bias",
    "h.{layer}.mlp.c_fc.weight": _turned("model.layers.{layer}.mlp.up_proj.weight"),
    "h.{layer}.mlp.c_fc.bias": "model.layers.{layer}.mlp.up_proj.bias",
    "h.{layer}.mlp.c_proj.weight": _turned("model.layers.{layer}.mlp.down_proj.weight"),
    "h.{layer}.mlp.c_proj.bias": "model.layers.{layer}.mlp.down_proj.bias",
    "ln_f.weight": "model.norm.weight",
    "ln_f.bias": "model.norm.bias",
}
