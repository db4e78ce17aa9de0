"""Every family but llama against transformers: log-probabilities within 1e-4 and the same greedy tokens.

Alone, in a ragged batch of eight, and with a cache so small that requests are preempted. Windows are shorter than most
prompts, some than what is generated, and lie on, before and behind the edges of cache blocks of 16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from transformers import Gemma2Config, GPT2Config, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
FULL, SLIDING = "full_attention", "sliding_attention"


# ---------------------------------------------------------------- mistral


def mistral(name: str, sizes: dict[str, Any], **options: Any) -> oracle.Case:
    config = MistralConfig(**{**SIZES, "rms_norm_eps": 1e-5, **sizes})
    return oracle.Case(f"mistral_{name}", config, **options)


MISTRAL = [
    mistral("window_5", {"sliding_window": 5}),
    mistral("window_2", {"sliding_window": 2}),
    mistral("window_16", {"sliding_window": 16, "num_key_value_heads": 4}),
    mistral("window_33_tied", {"sliding_window": 33, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    mistral("window_of_a_prompt", {"sliding_window": 45, "head_dim": 22, "num_hidden_layers": 3}),
    mistral("no_window", {"sliding_window": None, "hidden_act": "gelu"}),
    mistral("4", {"sliding_window": 17, "rope_parameters": YARN}, spelling=oracle.spelled_as_transformers_4),
    mistral(
        "defaults",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
        spelling=oracle.without_defaults,
    ),
]

# ---------------------------------------------------------------- qwen2


def qwen2(name: str, sizes: dict[str, Any], **options: Any) -> oracle.Case:
    return oracle.Case(f"qwen2_{name}", Qwen2Config(**{**SIZES, "rms_norm_eps": 1e-5, **sizes}), **options)


UPPER_WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3}
QWEN2 = [
    qwen2("plain", {}),
    qwen2("tied_4", {"tie_word_embeddings": True}, spelling=oracle.spelled_as_transformers_4),
    qwen2("upper_windows", UPPER_WINDOWS),
    qwen2("upper_windows_4", UPPER_WINDOWS, spelling=oracle.spelled_as_transformers_4),
    qwen2(
        "layer_types",
        {"use_sliding_window": True, "sliding_window": 20, "layer_types": [SLIDING, FULL, SLIDING]}
        | {"num_hidden_layers": 3, "rope_parameters": YARN},
    ),
    qwen2(
        "defaults",
        {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 32768, "use_sliding_window": True, "max_window_layers": 0},
        spelling=oracle.without_defaults,
    ),
]

# ---------------------------------------------------------------- qwen3


def qwen3(name: str, sizes: dict[str, Any], **options: Any) -> oracle.Case:
    return oracle.Case(f"qwen3_{name}", Qwen3Config(**{**SIZES, "head_dim": 14, **sizes}), **options)


QWEN3 = [
    qwen3("plain", {}),
    qwen3("tied_eps", {"rms_norm_eps": 0.1, "tie_word_embeddings": True}),
    qwen3("biases_4", {"attention_bias": True}, spelling=oracle.spelled_as_transformers_4),
    qwen3("upper_windows_4", UPPER_WINDOWS, spelling=oracle.spelled_as_transformers_4),
    qwen3(
        "layer_types",
        {"use_sliding_window": True, "sliding_window": 15, "layer_types": [FULL, SLIDING], "attention_bias": True},
    ),
    qwen3("defaults", {"head_dim": 128, "max_position_embeddings": 32768}, spelling=oracle.without_defaults),
]

# ---------------------------------------------------------------- gemma2


def gemma2(name: str, sizes: dict[str, Any], **options: Any) -> oracle.Case:
    config = {**SIZES, "head_dim": 14, "sliding_window": 6, "query_pre_attn_scalar": 9}
    return oracle.Case(f"gemma2_{name}", Gemma2Config(**{**config, **sizes}), **options)


CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA2 = [
    gemma2("caps", {**CAPS, "num_hidden_layers": 3}),
    gemma2("caps_4", {**CAPS, "num_hidden_layers": 3}, spelling=oracle.spelled_as_transformers_4),
    gemma2("no_caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 17}),
    gemma2("final_cap_untied", {**CAPS, "attn_logit_softcapping": None, "tie_word_embeddings": False}),
    gemma2("layer_types", {**CAPS, "layer_types": [FULL, SLIDING], "sliding_window": 30, "rms_norm_eps": 0.1}),
    gemma2("biases_multi_query", {**CAPS, "attention_bias": True, "num_key_value_heads": 1, "rope_parameters": YARN}),
    gemma2("gelu", {**CAPS, "hidden_activation": "gelu", "num_key_value_heads": 4, "query_pre_attn_scalar": 48}),
    gemma2(
        "defaults",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "max_position_embeddings": 8192},
        spelling=oracle.without_defaults,
    ),
]

# ---------------------------------------------------------------- gpt2


def gpt2(name: str, sizes: dict[str, Any], **options: Any) -> oracle.Case:
    own = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return oracle.Case(f"gpt2_{name}", GPT2Config(**{**own, **tokens, **sizes}), **options)


def as_first_published(stored: oracle.Stored) -> oracle.Stored:
    """Return tensors without the prefix, and with the masks that transformers once kept among the weights."""
    old = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(128, 128).tril()[None, None]
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return old


def with_general_names(config: dict[str, Any]) -> dict[str, Any]:
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    return {names.get(key, key): value for key, value in config.items()}


GPT2 = [
    gpt2("plain", {}),
    gpt2("untied_narrow", {"tie_word_embeddings": False, "n_inner": 37, "n_head": 3, "layer_norm_epsilon": 0.1}),
    gpt2("first_published_4", {}, spelling=oracle.spelled_as_transformers_4, names=as_first_published),
    gpt2("general_names", {"activation_function": "relu"}, spelling=with_general_names),
    gpt2("scaled_by_depth", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    gpt2("unscaled", {"scale_attn_weights": False, "activation_function": "gelu", "n_layer": 3}),
    gpt2("defaults", {"n_head": 12, "n_layer": 12, "n_positions": 1024}, spelling=oracle.without_defaults),
]

# ---------------------------------------------------------------- mixtral


def mixtral(name: str, sizes: dict[str, Any], **options: Any) -> oracle.Case:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return oracle.Case(f"mixtral_{name}", MixtralConfig(**{**SIZES, **experts, **sizes}), **options)


MIXTRAL = [
    mixtral("four_experts", {}),
    mixtral(
        "one_of_many_4", {"num_local_experts": 9, "num_experts_per_tok": 1}, spelling=oracle.spelled_as_transformers_4
    ),
    mixtral("all_experts_tied", {"num_experts_per_tok": 4, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    mixtral("window", {"sliding_window": 7, "num_key_value_heads": 4, "rms_norm_eps": 0.1}),
    mixtral("stacked", {"intermediate_size": 37}, options={"save_original_format": False}),
    mixtral(
        "defaults",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 131072},
        spelling=oracle.without_defaults,
    ),
]

CASES = [*MISTRAL, *QWEN2, *QWEN3, *GEMMA2, *GPT2, *MIXTRAL]


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
