"""gemma2: norms on both sides of each half, capped scores and logits, every other layer windowed (arXiv:2408.00118).

Norm weights are stored as what is added to one. The stored names are the canonical ones, so weights need no rule.
"""

from __future__ import annotations

from dataclasses import replace

from infinilm.models import _huggingface as huggingface
from infinilm_hookspecs import (
    Config,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    NormConfig,
    hookimpl,
)

model_types = ("gemma2",)


@hookimpl
def adapt_config(config: Config) -> DecoderConfig | None:
    """Describe a gemma2. What is left out is what transformers' `Gemma2Config` says.

    Configs also have a `hidden_act`, which nothing reads: it is `hidden_activation` that counts.
    """
    if not huggingface.is_model_type(config, model_types):
        return None
    huggingface.require(config, "use_bidirectional_attention", False)
    hidden_size = huggingface.size(config, "hidden_size", 2304)
    max_position_embeddings = huggingface.size(config, "max_position_embeddings", 8192)
    rope = huggingface.rope(config, max_position_embeddings=max_position_embeddings)
    attention_bias = huggingface.flag(config, "attention_bias", False)
    mixer = huggingface.attention(
        config,
        hidden_size=hidden_size,
        num_heads=huggingface.size(config, "num_attention_heads", 8),
        default_kv_heads=4,
        default_head_dim=256,
        rope=rope,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
    mixer = replace(
        mixer,
        scale=huggingface.number(config, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=huggingface.optional_number(config, "attn_logit_softcapping", 50.0),
    )
    norm = NormConfig(eps=huggingface.number(config, "rms_norm_eps", 1e-6), offset=1.0)
    layer = LayerConfig(
        mixer=mixer,
        mlp=MlpConfig(
            intermediate_size=huggingface.size(config, "intermediate_size", 9216),
            activation=huggingface.activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        ),
        norms=LayerNorms(before_mixer=norm, after_mixer=norm, before_mlp=norm, after_mlp=norm),
    )
    num_layers = huggingface.size(config, "num_hidden_layers", 26)
    windows = huggingface.windows(
        config,
        huggingface.optional_size(config, "sliding_window", 4096),
        is_sliding=[index % 2 == 0 for index in range(num_layers)],
    )
    return DecoderConfig(
        model_type="gemma2",
        vocab_size=huggingface.size(config, "vocab_size", 256000),
        hidden_size=hidden_size,
        layers=tuple(replace(layer, mixer=replace(mixer, sliding_window=window)) for window in windows),
        embedding=EmbeddingConfig(
            tied=huggingface.flag(config, "tie_word_embeddings", True),
            scale=hidden_size**0.5,
        ),
        final_norm=norm,
        logits=LogitsConfig(softcap=huggingface.optional_number(config, "final_logit_softcapping", 30.0)),
        max_position_embeddings=huggingface.usable_length(max_position_embeddings, rope),
    )
