"""qwen2: a llama with biases on queries, keys and values, and a sliding window in its upper layers if it says so.

Yang et al. 2024, arXiv:2407.10671. The stored names are the canonical ones, so weights need no rule.
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

model_types = ("qwen2",)


@hookimpl
def adapt_config(config: Config) -> DecoderConfig | None:
    """Describe a qwen2. What is left out is what transformers' `Qwen2Config` says."""
    if not huggingface.is_model_type(config, model_types):
        return None
    hidden_size = huggingface.size(config, "hidden_size", 4096)
    max_position_embeddings = huggingface.size(config, "max_position_embeddings", 32768)
    rope = huggingface.rope(config, max_position_embeddings=max_position_embeddings)
    mixer = huggingface.attention(
        config,
        hidden_size=hidden_size,
        num_heads=huggingface.size(config, "num_attention_heads", 32),
        default_kv_heads=32,
        rope=rope,
        qkv_bias=True,
    )
    norm = NormConfig(eps=huggingface.number(config, "rms_norm_eps", 1e-6))
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
        model_type="qwen2",
        vocab_size=huggingface.size(config, "vocab_size", 151936),
        hidden_size=hidden_size,
        layers=tuple(replace(layer, mixer=replace(mixer, sliding_window=window)) for window in windows),
        embedding=EmbeddingConfig(tied=huggingface.flag(config, "tie_word_embeddings", False)),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=huggingface.usable_length(max_position_embeddings, rope),
    )
