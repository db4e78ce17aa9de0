"""llama: Llama 1 to 3, and the many families that write themselves as `model_type: llama`.

The stored names are the canonical ones, so weights pass unchanged.
"""

from __future__ import annotations

from infinilm.models import _huggingface as huggingface
from infinilm_hookspecs import (
    DROP,
    Config,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    NormConfig,
    WeightRule,
    hookimpl,
)

model_types = ("llama",)


@hookimpl
def adapt_config(config: Config) -> DecoderConfig | None:
    """Describe a llama. Sizes left out are those of the first 7B model."""
    if not huggingface.is_model_type(config, model_types):
        return None
    hidden_size = huggingface.size(config, "hidden_size", 4096)
    max_position_embeddings = huggingface.size(config, "max_position_embeddings", 2048)
    rope = huggingface.rope(config, max_position_embeddings=max_position_embeddings)
    attention_bias = huggingface.flag(config, "attention_bias", False)
    norm = NormConfig(eps=huggingface.number(config, "rms_norm_eps", 1e-6))
    layer = LayerConfig(
        mixer=huggingface.attention(
            config,
            hidden_size=hidden_size,
            num_heads=huggingface.size(config, "num_attention_heads", 32),
            rope=rope,
            qkv_bias=attention_bias,
            output_bias=attention_bias,
        ),
        mlp=MlpConfig(
            intermediate_size=huggingface.size(config, "intermediate_size", 11008),
            activation=huggingface.activation(config, "hidden_act", "silu"),
            bias=huggingface.flag(config, "mlp_bias", False),
        ),
        norms=LayerNorms(before_mixer=norm, before_mlp=norm),
    )
    return DecoderConfig(
        model_type="llama",
        vocab_size=huggingface.size(config, "vocab_size", 32000),
        hidden_size=hidden_size,
        layers=(layer,) * huggingface.size(config, "num_hidden_layers", 32),
        embedding=EmbeddingConfig(tied=huggingface.flag(config, "tie_word_embeddings", False)),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=huggingface.usable_length(max_position_embeddings, rope),
    )


@hookimpl
def remap_weight(config: Config) -> WeightRule | None:
    """Drop the rotary frequencies that old versions of transformers stored: they follow from the config."""
    if not huggingface.is_model_type(config, model_types):
        return None
    return {"model.layers.{layer}.self_attn.rotary_emb.inv_freq": DROP}
