"""Rotations of the installed cpu backend against transformers', for any parameters, as the logits of a layer show them.

The parameters are those that the torch backend's rotations are tried with.
"""

from __future__ import annotations

from typing import Any

import torch
from backend_driver import blocks_for, forward, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_torch_rope import HEADS, default, factors, head_dims, linear, llama3, thetas, yarn
from transformers import LlamaConfig, LlamaForCausalLM

from infinilm.backends.cpu import provide_backend
from infinilm.models import llama
from infinilm.testing import Context, make_request
from infinilm.testing.subject import load

LENGTH = 130
dynamic = st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factors})


def layer(head_dim: int, parameters: dict[str, Any]) -> LlamaForCausalLM:
    """Return a llama of one layer whose every parameter is random, with scores large enough to tell angles apart."""
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=HEADS * head_dim,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=48,  # which dynamic scaling begins at
        rope_parameters=dict(parameters),
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    return model


@given(head_dims, thetas, default | linear | llama3 | yarn | dynamic)
@settings(max_examples=80, deadline=None)
def test_rotations(head_dim, theta, parameters):
    model = layer(head_dim, {"rope_theta": theta, **parameters})
    tokens = prompt(LENGTH)
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    decoder = llama.adapt_config(model.config.to_dict())
    assert decoder is not None
    backend = provide_backend(make_request(decoder))
    assert backend is not None
    load(backend, model.state_dict())
    backend.allocate_cache(len(blocks_for(LENGTH)), num_slots=1)
    logits = forward(backend, [(Context(tokens, blocks_for(LENGTH)), LENGTH)])
    backend.close()
    torch.testing.assert_close(logits.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4, rtol=0)
