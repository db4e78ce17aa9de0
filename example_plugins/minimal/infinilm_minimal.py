"""Runs `abacus` checkpoints: a llama by other names, with q, k and v in one tensor, gate and up in another."""

from infinilm_hookspecs import hookimpl

KEYS = {"vocabulary": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers",
        "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "ffn_width": "intermediate_size",
        "context": "max_position_embeddings", "rope_base": "rope_theta", "norm_epsilon": "rms_norm_eps"}  # fmt: skip


@hookimpl
def adapt_config(config):
    if config["model_type"] == "abacus":
        return {"model_type": "llama", "tie_word_embeddings": True, **{KEYS[key]: config[key] for key in KEYS}}


@hookimpl
def remap_weight(config):
    if config["model_type"] == "abacus":
        q, kv, ffn = config["width"], config["width"] // config["heads"] * config["kv_heads"], config["ffn_width"]
        return {
            "tok.weight": "model.embed_tokens.weight",
            "blocks.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
            "blocks.{i}.attn.qkv.weight": split("self_attn", q_proj=q, k_proj=kv, v_proj=kv),
            "blocks.{i}.attn.out.weight": "model.layers.{i}.self_attn.o_proj.weight",
            "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
            "blocks.{i}.mlp.gate_up.weight": split("mlp", gate_proj=ffn, up_proj=ffn),
            "blocks.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
            "final_norm.weight": "model.norm.weight",
        }


def split(at, **rows):
    return lambda w, i: [x.rename(f"model.layers.{i}.{at}.{n}.weight") for n, x in zip(rows, w.split([*rows.values()]))]
