"""Rotary frequencies and rotations against transformers', for any parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from infinilm.backends.torch.rope import Rotary, dynamic_frequencies, fixed_frequencies, rotate
from infinilm.models import llama
from infinilm_hookspecs import DynamicRopeScaling, RopeConfig

HEADS = 2

factors = st.floats(1.0, 64.0)
yarn = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": factors, "original_max_position_embeddings": st.integers(8, 8192)},
    optional={
        "beta_fast": st.floats(8.0, 64.0),
        "beta_slow": st.floats(0.5, 4.0),
        "attention_factor": st.floats(0.25, 2.0),
        "mscale": st.floats(0.25, 2.0),
        "mscale_all_dim": st.floats(0.25, 2.0),
        "truncate": st.booleans(),
    },
)
llama3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": factors,
        "original_max_position_embeddings": st.integers(8, 8192),
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(2.5, 16.0),
    }
)
linear = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors})
default = st.fixed_dictionaries({"rope_type": st.just("default")})
thetas = st.floats(100.0, 1e6)
head_dims = st.integers(2, 64).map(lambda half: 2 * half)


def configs(head_dim: int, parameters: dict[str, Any]) -> tuple[LlamaConfig, RopeConfig]:
    config = LlamaConfig(
        hidden_size=HEADS * head_dim,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        rope_parameters=dict(parameters),
    )
    adapted = llama.adapt_config(config.to_dict())
    assert adapted is not None
    return config, adapted.layers[0].mixer.rope


@given(head_dims, thetas, default | linear | llama3 | yarn)
@settings(max_examples=200, deadline=None)
def test_rotations(head_dim, theta, parameters):
    config, rope = configs(head_dim, {"rope_theta": theta, **parameters})
    theirs = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(fixed_frequencies(rope, head_dim), theirs.inv_freq, rtol=1e-5, atol=0)

    positions = torch.tensor([0, 1, 7, 100, 511])
    heads = torch.randn(5, HEADS, head_dim, generator=torch.Generator().manual_seed(0))
    rotated = rotate(heads, Rotary(rope, head_dim, torch.device("cpu")).rotation(positions, positions, torch.float32))
    cosine, sine = theirs(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cosine, sine)
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-3)


@given(head_dims, thetas, factors, st.integers(1, 100_000))
@settings(max_examples=100, deadline=None)
def test_dynamic_frequencies(head_dim, theta, factor, length):
    parameters = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
    config, rope = configs(head_dim, parameters)
    assert isinstance(rope.scaling, DynamicRopeScaling)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=length)
    ours = dynamic_frequencies(rope.theta, rope.scaling, head_dim, torch.tensor([1, length]))
    torch.testing.assert_close(ours[1], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[0], fixed_frequencies(rope, head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_float32_whatever_the_model_runs_in(dtype):
    rotary = Rotary(RopeConfig(), 8, torch.device("cpu"))
    positions = torch.tensor([4097])
    cosine, sine = rotary.rotation(positions, positions, torch.float32)
    low_cosine, low_sine = rotary.rotation(positions, positions, dtype)
    torch.testing.assert_close(low_cosine, cosine.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(low_sine, sine.to(dtype), rtol=0, atol=0)
