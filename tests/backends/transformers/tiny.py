"""Tiny configs of transformers' families, made from their default ones by the names of what they hold."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 99
_NOT_SIZES = ("transformers_version", "model_type", "dtype", "architectures")

# The first pattern that matches the whole name of an integer says what it becomes.
_SIZES: list[tuple[str, int]] = [
    (r".*vocab_size.*|n_vocab|n_words", VOCAB_SIZE),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|seq_length|max_target_positions", 256),
    (
        r"hidden_size|d_model|n_embd|emb_dim|dim|n_embed|embedding_size|word_embed_proj_dim|lru_width|attention_hidden_size",
        64,
    ),
    (r"(first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|mtp_num_hidden_layers|num_hash_layers)", 1),
    (r"(num_|n_)?(hidden_layers|decoder_layers|layers?|encoder_layers|num_layers)|encoder_layers|decoder_layers", 4),
    (r".*(num_key_value_heads|num_kv_heads|n_head_kv|num_local_heads|multi_query_group_num).*", 2),
    (r".*(num_attention_heads|n_heads?|num_heads|attention_heads|num_query_heads)", 4),
    (r"qk_rope_head_dim", 8),
    (r".*(head_dim|head_size|d_head|dim_head|kv_channels)", 16),
    (r".*(num_experts_per_tok|moe_topk|moe_k|num_selected_experts|top_k_experts|moe_top_k|experts_per_token|top_k)", 2),
    (r"(num_|n_)?(shared_experts|num_shared_experts)", 1),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts)", 4),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|feed_forward_size|dim_ff|mlp_dim).*", 48),
    (r"q_lora_rank", 24),
    (r"kv_lora_rank", 16),
    (r".*(state_size|d_state|ssm_state_size)", 8),
    (r"sliding_window|window_size|local_attention|attention_window_size|attention_window|window_size_left", 9),
    (r"attention_chunk_size", 16),
    (r".*chunk_size", 8),
    (r"rotary_dim", 8),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"index_topk", 8),
    (r"index_n_heads", 8),
]
_NAMES = [(re.compile(pattern), size) for pattern, size in _SIZES]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}


def families() -> list[str]:
    """Return every model type that transformers has a causal language model for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return a tiny config of a family. `overrides` are what its default config does not tell by names."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_merge(_shrunk(config_class()), overrides))


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            made[name] = _shrunk(part)
    for key, value in config.to_dict().items():
        if (
            key in made
            or key.startswith("_")
            or key in ("transformers_version", "model_type", "dtype", "architectures")
        ):
            continue
        if key in _TOKENS:
            made[key] = _TOKENS[key]
        elif key == "is_decoder":
            made[key] = True
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _NAMES if pattern.fullmatch(key)), None)
            if size is not None:
                made[key] = size
        elif key in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
            made[key] = _few(value)
    if "kv_lora_rank" in made:  # one latent for all heads: each has keys of its own
        made |= {"num_key_value_heads": 4, "head_dim": ..., "qk_head_dim": ...}
    return {key: value for key, value in made.items() if value is not ...}


def _few(kinds: Any) -> Any:
    """Return four layers with every kind there is among them, in the order they come."""
    if not isinstance(kinds, list):
        return kinds
    distinct = list(dict.fromkeys(kinds))
    return (distinct * 4)[:4] if len(distinct) <= 4 else distinct


def _merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = dict(one)
    for key, value in other.items():
        if value is ...:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
