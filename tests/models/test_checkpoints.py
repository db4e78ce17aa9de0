"""What transformers stores of a family is, through the family's rule, exactly what `parameters` asks for.

Sizes are hypothesis's; models are made on the meta device, which has shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from infinilm.models import gemma2, gpt2, llama, mistral, mixtral, qwen2, qwen3
from infinilm_hookspecs import DROP, Weight, parameters
from infinilm_hookspecs.rules import compile_rule

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "mixtral": mixtral,
}
Shapes = dict[str, tuple[int, ...]]

small = st.integers(1, 5)


@st.composite
def sizes(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    """Return the keys of a config that shapes depend on."""
    num_kv_heads, group, half_head_dim = draw(small), draw(small), draw(small)
    num_heads = num_kv_heads * group
    common = {"vocab_size": draw(st.integers(3, 40)), "tie_word_embeddings": draw(st.booleans())}
    if model_type == "gpt2":
        own = {"n_embd": num_heads * draw(small), "n_head": num_heads, "n_layer": draw(small)}
        return {**common, **own, "n_inner": draw(st.none() | small), "n_positions": draw(small)}
    keys: dict[str, Any] = {
        "hidden_size": 2 * half_head_dim * num_heads,
        "intermediate_size": draw(small),
        "num_hidden_layers": draw(small),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
    }
    if model_type != "qwen2":
        keys["head_dim"] = 2 * draw(small)
    if model_type in ("llama", "qwen3", "gemma2"):
        keys["attention_bias"] = draw(st.booleans())
    if model_type == "llama":
        keys["mlp_bias"] = draw(st.booleans())
    if model_type == "mixtral":
        keys["num_local_experts"] = draw(st.integers(2, 5))
    return {**common, **keys}


def stored_by_transformers(config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """Return the shapes of what a checkpoint holds: under its original names, and as transformers has it in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    in_memory = dict(model.named_parameters())  # a tied one is named once
    original = revert_weight_conversion(model, dict(in_memory))
    return shapes_of(original), shapes_of(in_memory)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def mapped(family: ModuleType, config: Mapping[str, Any], stored: Shapes) -> Shapes:
    """Return the names and shapes that the rule of a family makes of stored tensors."""
    rule = family.remap_weight(config) if hasattr(family, "remap_weight") else {}
    run = compile_rule(rule)
    result: Shapes = {}
    for name, shape in stored.items():
        weight = Weight.stored(name, shape, "float32")
        made = run(weight)
        if made is DROP:
            continue
        for one in [weight] if made is None else [made] if isinstance(made, Weight) else made:
            assert one.name not in result
            result[one.name] = one.shape
    return result


@pytest.mark.parametrize("model_type", FAMILIES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_checkpoint_holds_the_parameters_of_its_config(model_type, data):
    family = FAMILIES[model_type]
    config = {"model_type": model_type, **data.draw(sizes(model_type))}
    wanted = {
        name: spec.shape for name, spec in parameters(family.adapt_config(config)).items() if spec.tied_to is None
    }
    for stored in stored_by_transformers(config):
        assert mapped(family, config, stored) == wanted


def test_what_the_first_gpt2_also_held_is_dropped():
    stored = {"h.3.attn.bias": (1, 1, 8, 8), "transformer.h.3.attn.bias": (1, 1, 8, 8), "h.0.attn.masked_bias": ()}
    assert mapped(gpt2, {"model_type": "gpt2"}, stored) == {}


def test_names_of_gpt2_need_no_prefix():
    config = {"model_type": "gpt2", "n_embd": 6, "n_head": 2, "n_layer": 2, "vocab_size": 5}
    stored, _ = stored_by_transformers(config)
    bare = {name.removeprefix("transformer."): shape for name, shape in stored.items()}
    assert bare != stored
    assert mapped(gpt2, config, bare) == mapped(gpt2, config, stored)
