"""llama's config in every spelling becomes the same `DecoderConfig`, and what it cannot mean is refused by name."""

from __future__ import annotations

from math import log
from typing import Any

import oracle
import pytest
from transformers import LlamaConfig

from infinilm.models import llama
from infinilm_hookspecs import (
    DROP,
    ConfigError,
    DecoderConfig,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeConfig,
    YarnRopeScaling,
)

SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def adapt(**config: Any) -> DecoderConfig:
    adapted = llama.adapt_config({"model_type": "llama", **SIZES, **config})
    assert adapted is not None
    return adapted


def rope_of(**config: Any) -> RopeConfig:
    return adapt(**config).layers[0].mixer.rope


# ---------------------------------------------------------------- defaults


def test_every_default_is_that_of_transformers():
    written = {"model_type": "llama", **LlamaConfig().to_dict()}
    assert llama.adapt_config({"model_type": "llama"}) == llama.adapt_config(written)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_act", "rms_norm_eps", "head_dim", "rope_parameters"])
def test_null_means_the_default(key):
    assert llama.adapt_config({"model_type": "llama", key: None}) == llama.adapt_config({"model_type": "llama"})


def test_model_type_is_compared_without_case():
    assert llama.adapt_config({"model_type": "LLaMA"}) == llama.adapt_config({"model_type": "llama"})
    assert llama.remap_weight({"model_type": "LLaMA"}) is not None


@pytest.mark.parametrize("model_type", ["mistral", None, 7])
def test_other_families_are_not_its_own(model_type):
    assert llama.adapt_config({"model_type": model_type}) is None
    assert llama.remap_weight({"model_type": model_type}) is None


def test_stored_frequencies_are_dropped():
    assert llama.remap_weight({"model_type": "llama"}) == {
        "model.layers.{layer}.self_attn.rotary_emb.inv_freq": DROP,
    }


# ---------------------------------------------------------------- rotary embedding, in both spellings


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {**LINEAR, "rope_theta": 5e5},
        {"rope_type": "dynamic", "factor": 4, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_both_spellings_mean_the_same(parameters):
    new = {"rope_parameters": parameters, "dtype": "bfloat16"}
    old = oracle.spelled_as_transformers_4(new)
    assert "rope_parameters" not in old
    assert adapt(**new) == adapt(**old)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, RopeConfig(10000.0)),
        ({"rope_theta": 7}, RopeConfig(7.0)),
        ({"rope_theta": 7, "rope_parameters": {"rope_theta": 9.0}}, RopeConfig(9.0)),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 9.0}}, RopeConfig(9.0)),
        ({"rope_scaling": {"type": "dynamic", **LINEAR}}, RopeConfig(scaling=LinearRopeScaling(2.0))),
        ({"rope_scaling": LINEAR, "rope_parameters": {}}, RopeConfig(scaling=LinearRopeScaling(2.0))),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, RopeConfig(scaling=DynamicRopeScaling(2.0, 64))),
    ],
)
def test_rope(config, expected):
    assert rope_of(**config) == expected


def test_a_length_stated_beside_the_scaling_wins():
    scaling = {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4}
    expected = Llama3RopeScaling(2.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)
    inside = {**scaling, "original_max_position_embeddings": 16}
    assert rope_of(rope_scaling=inside).scaling == expected
    outside = {**scaling, "original_max_position_embeddings": 32}
    assert rope_of(rope_scaling=outside, original_max_position_embeddings=16).scaling == expected
    assert rope_of(rope_scaling=scaling).scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize(
    ("options", "attention_factor"),
    [
        ({}, 0.1 * log(4) + 1),
        ({"mscale": 2.0}, 0.1 * log(4) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * log(4) + 1) / (0.1 * log(4) + 1)),
        ({"attention_factor": 0.5}, 0.5),
        ({"factor": 1.0}, 1.0),
        ({"factor": None}, 0.1 * log(64 / 16) + 1),
    ],
)
def test_yarn_attention_factor(options, attention_factor):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **options}
    scaling = rope_of(rope_parameters=yarn).scaling
    assert isinstance(scaling, YarnRopeScaling)
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("parameters", "length"),
    [
        ({}, 64),
        (LINEAR, 128),
        ({"rope_type": "dynamic", "factor": 1.5}, 96),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
    ],
)
def test_usable_length(parameters, length):
    assert adapt(rope_parameters=parameters).max_position_embeddings == length


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": "48"}, "hidden_size is '48', and must be a positive integer in the config of .*'llama'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and must be a positive integer"),
        ({"vocab_size": True}, "vocab_size is True, and must be a positive integer"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', and must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_bias": 1}, "attention_bias is 1, and must be true or false"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu' in the config of .*; known: silu, swish, gelu"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, and must divide num_attention_heads, 4"),
        ({"hidden_size": 50}, "head_dim is missing, and hidden_size, 50, is no multiple of num_attention_heads, 4"),
        ({"head_dim": 7}, "head_dim is 7, and rotary position embedding needs an even one"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0, and must be an object"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'.*; known: default, linear, dynamic"),
        ({"rope_scaling": {"type": "su"}}, "rope_type is 'su'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, and must be a positive number"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor is 4.0, and must be less than high_freq_factor, 4.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_a_llama_cannot_mean(config, message):
    with pytest.raises(ConfigError, match=message):
        adapt(**config)
