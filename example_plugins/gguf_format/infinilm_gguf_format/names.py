"""From GGUF's tensor names to Hugging Face's: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from infinilm_hookspecs import DROP, Config, Weight, WeightRule

LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
    **{
        f"attn_{ours}.{kind}": f"self_attn.{theirs}_proj.{kind}"
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "output": "o"}.items()
        for kind in ("weight", "bias")
    },
}
EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_down_exps.weight": "w2", "ffn_up_exps.weight": "w3"}


def weight_table(config: Config) -> WeightRule:
    """Return the rule for a file of the architecture that the config names."""
    table = {f"blk.{{i}}.{ours}": f"model.layers.{{i}}.{theirs}" for ours, theirs in LAYER.items()}
    split = {f"blk.{{i}}.{ours}": partial(split_experts, name=theirs) for ours, theirs in EXPERTS.items()}
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "rope_freqs.weight": DROP,  # in the config
        **table,
        **split,
        **(_rotated(config) if config["general.architecture"] == "llama" else {}),
    }


def _rotated(config: Config) -> dict[str, partial[Weight]]:
    """Return the entries of llama's q and k, whose rows llama.cpp keeps as its rotation takes them: in pairs."""
    num_heads = config["llama.attention.head_count"]
    counts = {"q": num_heads, "k": config.get("llama.attention.head_count_kv", num_heads)}
    return {
        f"blk.{{i}}.attn_{letter}.{kind}": partial(halve_heads, num_heads=count, name=f"{letter}_proj.{kind}")
        for letter, count in counts.items()
        for kind in ("weight", "bias")
    }


def halve_heads(weight: Weight, *, i: int, num_heads: int, name: str) -> Weight:
    """Return the rows of every head with those that rotate first in front, their partners behind."""
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])  # (num_heads, head_dim / 2, 2[, hidden_size])
    return pairs.transpose(1, 2).reshape(weight.shape).rename(f"model.layers.{i}.self_attn.{name}")


def split_experts(weight: Weight, *, i: int, name: str) -> Sequence[Weight]:
    """Return each expert's matrix of (num_experts, rows, columns)."""
    return [
        part.rename(f"model.layers.{i}.block_sparse_moe.experts.{expert}.{name}.weight")
        for expert, part in enumerate(weight.unbind())
    ]
