"""Every family's config in every spelling becomes the same `DecoderConfig`, and what it cannot mean is refused by name.

llama, whose helpers the others use, has a file of its own.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import oracle
import pytest
from transformers import AutoConfig

from infinilm.models import gemma2, gpt2, mistral, mixtral, qwen2, qwen3
from infinilm_hookspecs import (
    AttentionConfig,
    ConfigError,
    DecoderConfig,
    EmbeddingConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    MoeConfig,
    NormConfig,
)

FAMILIES: dict[str, ModuleType] = {
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "mixtral": mixtral,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def adapt(model_type: str, **config: Any) -> DecoderConfig:
    adapted = FAMILIES[model_type].adapt_config({"model_type": model_type, **config})
    assert adapted is not None
    return adapted


def windows_of(config: DecoderConfig) -> list[int | None]:
    return [layer.mixer.sliding_window for layer in config.layers]


def mixer_of(config: DecoderConfig) -> AttentionConfig:
    mixer = config.layers[0].mixer
    assert isinstance(mixer, AttentionConfig)
    return mixer


# ---------------------------------------------------------------- defaults


def as_transformers_writes_it(model_type: str) -> dict[str, Any]:
    return AutoConfig.for_model(model_type).to_dict()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_default_is_that_of_transformers(model_type):
    written = as_transformers_writes_it(model_type)
    assert adapt(model_type) == adapt(**written)
    assert adapt(model_type) == adapt(**oracle.spelled_as_transformers_4(written))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_key_may_be_left_out(model_type):
    written = as_transformers_writes_it(model_type)
    for key in written.keys() - {"model_type"}:
        assert adapt(**{name: value for name, value in written.items() if name != key}) == adapt(model_type), key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_model_type_is_compared_without_case(model_type):
    family = FAMILIES[model_type]
    assert family.adapt_config({"model_type": model_type.upper()}) == adapt(model_type)
    assert family.model_types == (model_type,)


@pytest.mark.parametrize("model_type", ["llama", "gpt", "qwen", None, 7])
def test_other_families_are_not_their_own(model_type):
    for family in FAMILIES.values():
        assert family.adapt_config({"model_type": model_type}) is None
        if hasattr(family, "remap_weight"):
            assert family.remap_weight({"model_type": model_type}) is None


# ---------------------------------------------------------------- what each of them is


def test_mistral():
    config = adapt("mistral", num_hidden_layers=2)
    assert windows_of(config) == [4096, 4096]
    assert (mixer_of(config).num_kv_heads, mixer_of(config).head_dim) == (8, 128)


def test_qwen2():
    config = adapt("qwen2", num_hidden_layers=2)
    assert mixer_of(config).qkv_bias
    assert not mixer_of(config).output_bias
    assert windows_of(config) == [None, None]


def test_qwen3():
    config = adapt("qwen3", num_hidden_layers=2, rms_norm_eps=0.5)
    assert mixer_of(config).query_key_norm == NormConfig(eps=0.5)
    assert mixer_of(config).head_dim == 128
    assert not mixer_of(config).qkv_bias


def test_gemma2():
    config = adapt("gemma2", num_hidden_layers=3, query_pre_attn_scalar=144)
    norm = NormConfig(offset=1.0)
    assert config.layers[0].norms == LayerNorms(norm, norm, norm, norm)
    assert config.final_norm == norm
    assert config.embedding == EmbeddingConfig(tied=True, scale=48.0)
    assert config.logits == LogitsConfig(softcap=30.0)
    assert mixer_of(config).softcap == 50.0
    assert mixer_of(config).scale == pytest.approx(1 / 12)
    assert windows_of(config) == [4096, None, 4096]
    assert config.layers[0].mlp == MlpConfig(9216, activation="gelu_tanh")


def test_gpt2():
    config = adapt("gpt2", n_layer=2)
    norm = NormConfig(kind="layer", eps=1e-5, bias=True)
    assert config.layers[0].norms == LayerNorms(norm, norm)
    assert config.layers[0].mlp == MlpConfig(3072, activation="gelu_tanh", bias=True, gated=False)
    assert config.embedding == EmbeddingConfig(tied=True, num_positions=1024)
    assert mixer_of(config).rope is None
    assert config.max_position_embeddings == 1024


def test_mixtral():
    config = adapt("mixtral", num_hidden_layers=2)
    assert config.layers[0].mlp == MoeConfig(8, 2, 14336, normalize=True)
    assert windows_of(config) == [None, None]
    assert mixer_of(config).rope.theta == 1e6


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("model_type", ["mistral", "mixtral"])
@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 7}, 7),
        ({"sliding_window": None}, None),
        ({"sliding_window": 7, "layer_types": [SLIDING, SLIDING]}, 7),
        ({"sliding_window": None, "layer_types": [FULL, "attention"]}, None),
        ({"sliding_window": 7, "layer_types": None}, 7),
    ],
)
def test_one_window(model_type, config, window):
    assert windows_of(adapt(model_type, num_hidden_layers=2, **config)) == [window, window]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"sliding_window": 7}, [None, None, None]),
        ({"sliding_window": 7, "use_sliding_window": True}, [None, None, None]),
        ({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, [None, 7, 7]),
        ({"use_sliding_window": True, "max_window_layers": 0}, [4096, 4096, 4096]),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, [None, None, None]),
        (
            {"sliding_window": 7, "use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]},
            [7, None, 7],
        ),
        ({"layer_types": [FULL, FULL, FULL], "use_sliding_window": True, "max_window_layers": 0}, [None, None, None]),
    ],
)
def test_upper_windows(model_type, config, windows):
    assert windows_of(adapt(model_type, num_hidden_layers=3, **config)) == windows


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"sliding_window": 7}, [7, None, 7]),
        ({"sliding_window": 7, "layer_types": [FULL, SLIDING, FULL]}, [None, 7, None]),
        ({"sliding_window": None, "layer_types": [FULL, FULL, FULL]}, [None, None, None]),
    ],
)
def test_alternating_windows(config, windows):
    assert windows_of(adapt("gemma2", num_hidden_layers=3, **config)) == windows


# ---------------------------------------------------------------- null, other names


def test_null_turns_a_softcap_off():
    config = adapt("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert mixer_of(config).softcap is None
    assert config.logits == LogitsConfig()


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "mixtral"])
def test_null_key_value_heads_are_as_many_as_query_heads(model_type):
    assert mixer_of(adapt(model_type, num_attention_heads=4, num_key_value_heads=None)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("model_type", "general", "own"),
    [
        ("gpt2", {"hidden_size": 48, "num_attention_heads": 4}, {"n_embd": 48, "n_head": 4}),
        ("gpt2", {"num_hidden_layers": 3, "max_position_embeddings": 9}, {"n_layer": 3, "n_positions": 9}),
        ("gpt2", {"num_hidden_layers": 3, "n_layer": 3}, {"n_layer": 3}),
        ("gpt2", {"num_hidden_layers": None, "n_layer": 3}, {"n_layer": 3}),
        ("mixtral", {"num_experts": 5}, {"num_local_experts": 5}),
    ],
)
def test_general_names(model_type, general, own):
    assert adapt(model_type, **general) == adapt(model_type, **own)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, [0.5, 0.5]),
        ({"scale_attn_weights": False}, [1.0, 1.0]),
        ({"scale_attn_by_inverse_layer_idx": True}, [0.5, 0.25]),
        ({"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, [1.0, 0.5]),
    ],
)
def test_scales_of_gpt2(config, scales):
    adapted = adapt("gpt2", n_layer=2, n_embd=8, n_head=2, **config)
    assert [layer.mixer.scale for layer in adapted.layers] == scales


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, and must be a positive integer"),
        ("mistral", {"num_key_value_heads": 5}, "num_key_value_heads is 5, and must divide num_attention_heads, 32"),
        ("mistral", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'.*; known: default"),
        ("mistral", {"hidden_act": "mish"}, "hidden_act is 'mish' in the config of .*'mistral'; known: silu"),
        (
            "mistral",
            {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
            "layer_types is .* and sliding_window 4096 .*; known: the same attention in all layers",
        ),
        ("mistral", {"layer_types": [SLIDING]}, "layer_types is .*, and must have 32 entries"),
        ("qwen2", {"num_attention_heads": 4}, "num_key_value_heads is 32, and must divide num_attention_heads, 4"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1, and must be true or false"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers is -1, and must be zero or a positive integer"),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": SLIDING}, "layer_types is 'sliding_attention', and must"),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": [[FULL]]}, r"layer_types has \['full_attention'\]"),
        (
            "qwen2",
            {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "layer_types has 'chunked_attention' in .*; known: full_attention, sliding_attention",
        ),
        (
            "qwen3",
            {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]},
            "layer 1 is of type 'sliding_attention', and there is no sliding_window",
        ),
        ("qwen3", {"head_dim": 7}, "head_dim is 7, and rotary position embedding needs an even one"),
        (
            "qwen3",
            {"rope_parameters": {FULL: {"rope_theta": 7.0}, SLIDING: {"rope_theta": 9.0}}},
            "rope_parameters is .*; known: the same rotation in all layers",
        ),
        ("gemma2", {"sliding_window": None}, "layer 0 is of type 'sliding_attention', and there is no sliding_window"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0, and must be a positive number"),
        ("gemma2", {"final_logit_softcapping": math.inf}, "final_logit_softcapping is inf, and must be a positive"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, and must be a positive number"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True .*; known: False"),
        ("gemma2", {"hidden_activation": "quick_gelu"}, "hidden_activation is 'quick_gelu' .*; known: silu"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True .*; known: False"),
        ("gpt2", {"n_head": 5}, "n_head is 5, and must divide n_embd, 768"),
        ("gpt2", {"n_inner": 0}, "n_inner is 0, and must be a positive integer"),
        ("gpt2", {"activation_function": "gelu_10"}, "activation_function is 'gelu_10' .*; known: silu"),
        ("gpt2", {"n_embd": 48, "hidden_size": 24}, "hidden_size is 24 and n_embd is 48, which are one thing"),
        (
            "gpt2",
            {"layer_norm_epsilon": None, "n_positions": "9"},
            "n_positions is '9', and must be a positive integer",
        ),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 8 experts"),
        ("mixtral", {"num_local_experts": 4, "num_experts": 5}, "num_experts is 5 and num_local_experts is 4"),
    ],
)
def test_what_a_config_cannot_mean(model_type, config, message):
    with pytest.raises(ConfigError, match=message):
        adapt(model_type, **config)
