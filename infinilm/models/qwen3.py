"""qwen3: a llama that normalises every head of queries and keys, and has wide heads (Qwen Team 2025, arXiv:2505.09388).

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

model_types = ("qwen3",)


@hookimpl
def adapt_config(config: Config) -> DecoderConfig | None:
    """Describe a qwen3. What is left out is what transformers' `Qwen3Config` says."""
    if not huggingface.is_model_type(config, model_types):
        return None
    hidden_size = huggingface.size(config, "hidden_size", 4096)
    max_position_embeddings = huggingface.size(config, "max_position_embeddings", 32768)
    rope = huggingface.rope(config, max_position_embeddings=max_position_embeddings)
    attention_bias = huggingface.flag(config, "attention_bias", False)
    norm = NormConfig(eps=huggingface.number(config, "rms_norm_eps", 1e-6))
    mixer = huggingface.attention(
        config,
        hidden_size=hidden_size,
        num_heads=huggingface.size(config, "num_attention_heads", 32),
        default_kv_heads=32,
        default_head_dim=128,
        rope=rope,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
    mixer = replace(mixer, query_key_norm=norm)
    layer = LayerConfig(
        mixer=mixer,
        mlp=MlpConfig(
            intermediate_size=huggingface.size(config, "intermediate_size", 22016),
            activation=huggingface.activation(config, "hidden_act", "silu"),
        ),
        norms=LayerNorms(before_mixer=norm, before_mlp=norm),
    )
    windows = huggingface.upper_windows(
        config,
        num_layers=huggingface.size(config, "num_hidden_layers", 32),
        default_window=4096,
        default_full_layers=28,
    )
    return DecoderConfig(
        model_type="qwen3",
        vocab_size=huggingface.size(config, "vocab_size", 151936),
        hidden_size=hidden_size,
        layers=tuple(replace(layer, mixer=replace(mixer, sliding_window=window)) for window in windows),
        embedding=EmbeddingConfig(tied=huggingface.flag(config, "tie_word_embeddings", False)),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=huggingface.usable_length(max_position_embeddings, rope),
    )
