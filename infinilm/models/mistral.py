"""mistral: a llama whose every layer may have a sliding window (Jiang et al. 2023, arXiv:2310.06825).

The stored names are the canonical ones, so weights need no rule.
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

model_types = ("mistral",)


@hookimpl
def adapt_config(config: Config) -> DecoderConfig | None:
    """Describe a mistral. Sizes left out are those of the first 7B model, its window of 4096 included."""
    if not huggingface.is_model_type(config, model_types):
        return None
    hidden_size = huggingface.size(config, "hidden_size", 4096)
    max_position_embeddings = huggingface.size(config, "max_position_embeddings", 131072)
    rope = huggingface.rope(config, max_position_embeddings=max_position_embeddings)
    mixer = huggingface.attention(
        config,
        hidden_size=hidden_size,
        num_heads=huggingface.size(config, "num_attention_heads", 32),
        default_kv_heads=8,
        rope=rope,
    )
    num_layers = huggingface.size(config, "num_hidden_layers", 32)
    window = huggingface.one_window(config, num_layers=num_layers, default_window=4096)
    norm = NormConfig(eps=huggingface.number(config, "rms_norm_eps", 1e-6))
    layer = LayerConfig(
        mixer=replace(mixer, sliding_window=window),
        mlp=MlpConfig(
            intermediate_size=huggingface.size(config, "intermediate_size", 14336),
            activation=huggingface.activation(config, "hidden_act", "silu"),
        ),
        norms=LayerNorms(before_mixer=norm, before_mlp=norm),
    )
    return DecoderConfig(
        model_type="mistral",
        vocab_size=huggingface.size(config, "vocab_size", 32000),
        hidden_size=hidden_size,
        layers=(layer,) * num_layers,
        embedding=EmbeddingConfig(tied=huggingface.flag(config, "tie_word_embeddings", False)),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=huggingface.usable_length(max_position_embeddings, rope),
    )
