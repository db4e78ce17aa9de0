"""llama against transformers: log-probabilities within 1e-4 and the same greedy tokens, on every variant of the family.

Alone, in a ragged batch of eight, and with a cache so small that requests are preempted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
from transformers import LlamaConfig

from infinilm import LLM

Spelling = Callable[[dict[str, Any]], dict[str, Any]]

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


def as_written(config: dict[str, Any]) -> dict[str, Any]:
    return config


def defaults_left_out(config: dict[str, Any]) -> dict[str, Any]:
    return oracle.without_defaults(config, LlamaConfig())


@dataclass(frozen=True)
class Case:
    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] | None = None
    spelling: Spelling = as_written

    def config(self) -> LlamaConfig:
        return LlamaConfig(**{**SIZES, **self.sizes, "rope_parameters": self.rope and dict(self.rope)})


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
    Case("multi_head", {"hidden_size": 40, "num_key_value_heads": None}),
    Case("grouped_query"),
    Case("multi_query_tied", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    Case("odd_sizes", {"vocab_size": 101, "intermediate_size": 37, "num_hidden_layers": 3, "head_dim": 22}),
    Case("small_heads", {"hidden_size": 30, "num_attention_heads": 6, "head_dim": 4, "num_key_value_heads": 3}),
    Case("attention_bias", {"attention_bias": True}, spelling=oracle.spelled_as_transformers_4),
    Case("mlp_bias", {"mlp_bias": True, "hidden_act": "gelu"}),
    Case("both_biases_tied", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Case("gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"}),
    Case("relu", {"hidden_act": "relu", "rms_norm_eps": 0.1}),
    *(Case(name, sizes, rope) for name, (sizes, rope) in ROPES.items()),
    *(Case(f"{name}_4", sizes, rope, oracle.spelled_as_transformers_4) for name, (sizes, rope) in ROPES.items()),
    Case(
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
        spelling=defaults_left_out,
    ),
    Case(
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
        spelling=defaults_left_out,
    ),
]


@dataclass(frozen=True)
class Subject:
    """A checkpoint, the prompts to ask it, and what transformers says to them."""

    folder: Path
    prompts: list[list[int]]
    expected: list[oracle.Answer]

    def load(self, **options: Any) -> LLM:
        return LLM(str(self.folder), platform="cpu", dtype="float32", max_model_len=128, **options)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def subject(request, tmp_path_factory) -> Subject:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    model = oracle.write_checkpoint(folder, case.config())
    oracle.edit_config(folder, case.spelling)
    return Subject(folder, *oracle.examine(model))


def test_alone(subject):
    llm = subject.load()
    for prompt, expected in zip(subject.prompts, subject.expected, strict=True):
        oracle.check_parity(llm, [prompt], [expected])


def test_in_a_ragged_batch_of_eight(subject):
    llm = subject.load(max_num_seqs=8, max_num_batched_tokens=64)
    assert len(subject.prompts) == 8
    oracle.check_parity(llm, subject.prompts, subject.expected)


def test_with_preemption(subject):
    layers = subject.load().lineage.configs[-1].layers
    block_bytes = sum(2 * 16 * layer.mixer.num_kv_heads * layer.mixer.head_dim * 4 for layer in layers)
    llm = subject.load(kv_cache_memory=11 * block_bytes)
    oracle.check_parity(llm, subject.prompts, subject.expected)
    assert llm.engine.num_preemptions > 0
