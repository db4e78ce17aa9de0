"""mixtral: a mistral whose MLPs are experts, two of eight run for a token (Jiang et al. 2024, arXiv:2401.04088).

Checkpoints on the hub keep the experts apart, as `w1` (gate), `w2` (down) and `w3` (up). transformers 5 stacks them
in memory, and on disk where it is told not to go back to the original names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from infinilm.models import _huggingface as huggingface
from infinilm_hookspecs import (
    Config,
    ConfigError,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MoeConfig,
    NormConfig,
    Weight,
    WeightRule,
    hookimpl,
)

model_types = ("mixtral",)


@hookimpl
def adapt_config(config: Config) -> DecoderConfig | None:
    """Describe a mixtral. Sizes left out are those of the 8x7B model, which has no window."""
    if not huggingface.is_model_type(config, model_types):
        return None
    hidden_size = huggingface.size(config, "hidden_size", 4096)
    max_position_embeddings = huggingface.size(config, "max_position_embeddings", 131072)
    rope = huggingface.rope(config, max_position_embeddings=max_position_embeddings, default_theta=1e6)
    mixer = huggingface.attention(
        config,
        hidden_size=hidden_size,
        num_heads=huggingface.size(config, "num_attention_heads", 32),
        default_kv_heads=8,
        rope=rope,
    )
    num_layers = huggingface.size(config, "num_hidden_layers", 32)
    window = huggingface.one_window(config, num_layers=num_layers, default_window=None)
    norm = NormConfig(eps=huggingface.number(config, "rms_norm_eps", 1e-5))
    layer = LayerConfig(
        mixer=replace(mixer, sliding_window=window),
        mlp=_experts(config),
        norms=LayerNorms(before_mixer=norm, before_mlp=norm),
    )
    return DecoderConfig(
        model_type="mixtral",
        vocab_size=huggingface.size(config, "vocab_size", 32000),
        hidden_size=hidden_size,
        layers=(layer,) * num_layers,
        embedding=EmbeddingConfig(tied=huggingface.flag(config, "tie_word_embeddings", False)),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=huggingface.usable_length(max_position_embeddings, rope),
    )


def _experts(config: Config) -> MoeConfig:
    config = huggingface.with_own_names(config, {"num_experts": "num_local_experts"})
    num_experts = huggingface.size(config, "num_local_experts", 8)
    experts_per_token = huggingface.size(config, "num_experts_per_tok", 2)
    if experts_per_token > num_experts:
        raise ConfigError(f"num_experts_per_tok is {experts_per_token}, and there are {num_experts} experts")
    return MoeConfig(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        intermediate_size=huggingface.size(config, "intermediate_size", 14336),
        activation=huggingface.activation(config, "hidden_act", "silu"),
        normalize=True,
    )


@hookimpl
def remap_weight(config: Config) -> WeightRule | None:
    """Call experts by the canonical names, and take those apart that are stored as one."""
    if not huggingface.is_model_type(config, model_types):
        return None
    stored, canonical = "model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.mlp"
    return {
        f"{stored}.gate.weight": f"{canonical}.gate.weight",
        f"{stored}.experts.{{expert}}.w1.weight": f"{canonical}.experts.{{expert}}.gate_proj.weight",
        f"{stored}.experts.{{expert}}.w2.weight": f"{canonical}.experts.{{expert}}.down_proj.weight",
        f"{stored}.experts.{{expert}}.w3.weight": f"{canonical}.experts.{{expert}}.up_proj.weight",
        f"{canonical}.experts.gate_up_proj": _split_gate_up,
        f"{canonical}.experts.down_proj": _split_down,
    }


def _split_gate_up(weight: Weight, layer: int) -> Sequence[Weight]:
    """Return each expert's gate and up projection of (num_experts, 2 * intermediate_size, hidden_size)."""
    return [
        part.rename(f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight")
        for expert, both in enumerate(weight.unbind())
        for name, part in zip(("gate", "up"), both.chunk(2), strict=True)
    ]


def _split_down(weight: Weight, layer: int) -> Sequence[Weight]:
    """Return each expert's down projection of (num_experts, hidden_size, intermediate_size)."""
    return [
        part.rename(f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight")
        for expert, part in enumerate(weight.unbind())
    ]
