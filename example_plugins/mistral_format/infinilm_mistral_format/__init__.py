"""Mistral's own checkpoints: `params.json`, `consolidated*.safetensors`, and `tekken.json` or a sentencepiece model.

The names are those of https://github.com/mistralai/mistral-inference. Where a folder holds Hugging Face's layout as
well, this plugin opens it: the two are the same model, and this one is the original.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from infinilm_hookspecs import Config, Weight, WeightRule, hookimpl
from infinilm_mistral_format.params import to_huggingface

if TYPE_CHECKING:
    from infinilm_mistral_format.checkpoint import MistralCheckpoint

overrides = ("safetensors", "pytorch_bin")
model_types = ("mistral_native",)


@hookimpl
def open_checkpoint(source: str) -> MistralCheckpoint | None:
    from infinilm_mistral_format import checkpoint

    return checkpoint.MistralCheckpoint(source) if checkpoint.is_mistral(source) else None


@hookimpl
def adapt_config(config: Config) -> dict[str, Any] | None:
    return to_huggingface(config) if config["model_type"] == "mistral_native" else None


@hookimpl
def remap_weight(config: Config) -> WeightRule | None:
    if config["model_type"] != "mistral_native":
        return None
    stored, ours = "layers.{i}", "model.layers.{i}"
    return {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        f"{stored}.attention_norm.weight": f"{ours}.input_layernorm.weight",
        f"{stored}.ffn_norm.weight": f"{ours}.post_attention_layernorm.weight",
        f"{stored}.attention.wq.weight": partial(halve_heads, num_heads=config["n_heads"], name="q_proj"),
        f"{stored}.attention.wk.weight": partial(halve_heads, num_heads=config["n_kv_heads"], name="k_proj"),
        f"{stored}.attention.wv.weight": f"{ours}.self_attn.v_proj.weight",
        f"{stored}.attention.wo.weight": f"{ours}.self_attn.o_proj.weight",
        f"{stored}.feed_forward.w1.weight": f"{ours}.mlp.gate_proj.weight",
        f"{stored}.feed_forward.w2.weight": f"{ours}.mlp.down_proj.weight",
        f"{stored}.feed_forward.w3.weight": f"{ours}.mlp.up_proj.weight",
        # A mixtral's experts keep their names, the folder they are in does not.
        f"{stored}.feed_forward.gate.weight": f"{ours}.block_sparse_moe.gate.weight",
        f"{stored}.feed_forward.experts.{{e}}.w1.weight": f"{ours}.block_sparse_moe.experts.{{e}}.w1.weight",
        f"{stored}.feed_forward.experts.{{e}}.w2.weight": f"{ours}.block_sparse_moe.experts.{{e}}.w2.weight",
        f"{stored}.feed_forward.experts.{{e}}.w3.weight": f"{ours}.block_sparse_moe.experts.{{e}}.w3.weight",
    }


def halve_heads(weight: Weight, *, i: int, num_heads: int, name: str) -> Weight:
    """Return the rows of every head in Hugging Face's order: those that rotate first in front, their partners behind.

    Here each row is followed by its partner, as `apply_rotary_emb` of mistral_inference/rope.py takes them.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, -1, 2, columns)  # (num_heads, head_dim / 2, 2, hidden_size)
    return pairs.transpose(1, 2).reshape(rows, columns).rename(f"model.layers.{i}.self_attn.{name}.weight")
