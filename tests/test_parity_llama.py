"""llama against transformers: log-probabilities within 1e-4 and the same greedy tokens, on every variant of the family.

Alone, in a ragged batch of eight, and with a cache so small that requests are preempted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import pytest
from transformers import LlamaConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
ORIGINAL = 32  # the length before scaling: most prompts are longer
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def case(
    name: str,
    sizes: dict[str, Any] | None = None,
    rope: dict[str, Any] | None = None,
    spelling: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> oracle.Case:
    config = LlamaConfig(**{**SIZES, **(sizes or {}), "rope_parameters": rope and dict(rope)})
    return oracle.Case(name, config, spelling)


SHORT = {"max_position_embeddings": ORIGINAL}
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta": ({}, {"rope_type": "default", "rope_theta": 500000.0}),
    "linear": (SHORT, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (SHORT, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 2000.0}),
    "llama3": ({}, LLAMA3),
    "yarn": ({}, YARN),
    "yarn_options": ({}, {**YARN, "beta_fast": 8.0, "beta_slow": 2, "attention_factor": 0.8, "truncate": False}),
    "yarn_mscale": ({}, {**YARN, "rope_theta": 500.0, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn_no_factor": ({}, {**YARN, "factor": None}),
}
CASES = [
    case("multi_head", {"hidden_size": 40, "num_key_value_heads": None}),
    case("grouped_query"),
    case("multi_query_tied", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    case("odd_sizes", {"vocab_size": 101, "intermediate_size": 37, "num_hidden_layers": 3, "head_dim": 22}),
    case("small_heads", {"hidden_size": 30, "num_attention_heads": 6, "head_dim": 4, "num_key_value_heads": 3}),
    case("attention_bias", {"attention_bias": True}, spelling=oracle.spelled_as_transformers_4),
    case("mlp_bias", {"mlp_bias": True, "hidden_act": "gelu"}),
    case("both_biases_tied", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    case("gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"}),
    case("relu", {"hidden_act": "relu", "rms_norm_eps": 0.1}),
    *(case(name, sizes, rope) for name, (sizes, rope) in ROPES.items()),
    *(case(f"{name}_4", sizes, rope, oracle.spelled_as_transformers_4) for name, (sizes, rope) in ROPES.items()),
    case(
        "default_width",
        {
            "hidden_size": 128,
            "intermediate_size": 11008,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
        },
        spelling=oracle.without_defaults,
    ),
    case(
        "default_depth",
        {
            "vocab_size": 32000,
            "hidden_size": 32,
            "head_dim": 2,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
        },
        spelling=oracle.without_defaults,
    ),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def examined(request, tmp_path_factory) -> oracle.Subject:
    return request.param.examine(tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(params=oracle.BACKENDS)
def subject(request, examined) -> oracle.Subject:
    return replace(examined, backend=request.param)


def test_alone(subject):
    subject.check_alone()


def test_in_a_ragged_batch_of_eight(subject):
    subject.check_in_a_ragged_batch_of_eight()


def test_with_preemption(subject):
    subject.check_with_preemption()
