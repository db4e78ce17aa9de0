"""Windows, caps, experts and the rest in the torch backend, where parity does not reach.

As in `test_torch_backend`: logits must not depend on how the work is cut up, nor on anything outside of a window.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backend_driver import (
    NUM_BLOCKS,
    Context,
    blocks_for,
    decoder_config,
    forward,
    load,
    loaded_backend,
    prompt,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.backends.torch.backend import TorchBackend
from infinilm.backends.torch.cache import BLOCK_SIZE
from infinilm_hookspecs import (
    DecoderConfig,
    EmbeddingConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    MoeConfig,
    NormConfig,
    RopeConfig,
)

MOE = MoeConfig(num_experts=5, experts_per_token=2, intermediate_size=9, normalize=True)


def with_mixer(config: DecoderConfig, **changes: Any) -> DecoderConfig:
    layers = tuple(replace(layer, mixer=replace(layer.mixer, **changes)) for layer in config.layers)
    return replace(config, layers=layers)


def one_layer(**changes: Any) -> DecoderConfig:
    """Return a model of one layer that does not know positions."""
    config = decoder_config(rope=None)
    return with_mixer(replace(config, layers=config.layers[:1]), **changes)


def every_part() -> DecoderConfig:
    """Return a model of a layer each with a window, with experts, and with neither, and all that a family has."""
    norm, layer_norm = NormConfig(offset=1.0), NormConfig(kind="layer", bias=True)
    config = decoder_config(RopeConfig())
    layer = config.layers[0]
    mixer = replace(layer.mixer, softcap=3.0, query_key_norm=NormConfig(bias=True))
    windowed = replace(
        layer,
        mixer=replace(mixer, sliding_window=21),
        mlp=MlpConfig(7, activation="gelu", bias=True, gated=False),
        norms=LayerNorms(norm, norm, norm, norm),
    )
    routed = replace(layer, mixer=replace(layer.mixer, sliding_window=16), mlp=MOE)
    capped = replace(layer, mixer=mixer, norms=LayerNorms(layer_norm, layer_norm))
    return replace(
        config,
        layers=(windowed, routed, capped),
        embedding=EmbeddingConfig(scale=4.0, num_positions=1024),
        final_norm=layer_norm,
        logits=LogitsConfig(scale=0.5, softcap=2.0),
    )


# ---------------------------------------------------------------- the same logits, however the work is cut up


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return loaded_backend(every_part())


@given(cuts=st.sets(st.integers(1, 69)), order=st.permutations(range(5)))
@settings(max_examples=40, deadline=None)
def test_any_chunks_in_any_blocks_give_the_same_logits(backend, cuts, order):
    tokens = prompt(70)
    sequence = Context(tokens, list(order))
    bounds = [0, *sorted(cuts), 70]
    pieces = [forward(backend, [(sequence, stop - start)]) for start, stop in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(pieces), whole(backend, tokens), atol=1e-5, rtol=0)


def test_prefill_tiles_give_the_same_logits(backend, monkeypatch):
    tokens = prompt(70)
    expected = whole(backend, tokens)
    monkeypatch.setattr("infinilm.backends.torch.attention._QUERY_TILE", 8)
    monkeypatch.setattr("infinilm.backends.torch.attention._SMALL_QUERY_TILE", 5)
    sequence = Context(tokens, blocks_for(70))
    pieces = [forward(backend, [(sequence, 11)]), forward(backend, [(sequence, 59)])]
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=0)


def test_ragged_batch_of_prefills_chunks_and_decodes(backend):
    lengths = [1, 5, 17, 33, 40, 64, 2, 90, 16, 22]
    prompts = [prompt(length, seed=length) for length in lengths]
    first = np.cumsum([0, *(len(blocks_for(length)) for length in lengths)])
    sequences = [
        Context(tokens, blocks_for(len(tokens), int(block))) for tokens, block in zip(prompts, first, strict=False)
    ]
    done = [0, 0, 16, 20, 39, 63, 1, 3, 15, 21]
    for sequence, count in zip(sequences, done, strict=True):
        if count:
            forward(backend, [(sequence, count)])
    counts = [length - count for length, count in zip(lengths, done, strict=True)]
    pieces = forward(backend, list(zip(sequences, counts, strict=True))).split(counts)
    for tokens, count, piece in zip(prompts, done, pieces, strict=True):
        torch.testing.assert_close(piece, whole(backend, tokens)[count:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32(backend, dtype):
    tokens = prompt(40)
    # A rounding may send a token to another expert: one in ten may differ, and most must not.
    difference = (whole(loaded_backend(every_part(), dtype=dtype), tokens) - whole(backend, tokens)).abs().amax(-1)
    assert difference.quantile(0.9) < 0.1


def test_a_step_runs_on_another_device():
    # The meta device computes nothing, so nothing can be routed there; most of torch refuses to mix it with the CPU.
    config = every_part()
    backend = TorchBackend(replace(config, layers=config.layers[::2]), dtype="bfloat16", device="meta")
    load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    sequences = [Context(prompt(40), [3 * row, 3 * row + 1, 3 * row + 2]) for row in range(4)]
    forward(backend, list(zip(sequences, [40, 20, 39, 5], strict=True)), [])
    assert forward(backend, list(zip(sequences[1:], [20, 1, 1], strict=True))).shape == (22, 31)


# ---------------------------------------------------------------- windows


@given(
    window=st.integers(1, 40), length=st.integers(1, 60), chunk=st.integers(1, 60), softcap=st.sampled_from([None, 2.0])
)
@settings(max_examples=60, deadline=None)
def test_a_token_sees_its_window_and_no_more(window, length, chunk, softcap):
    backend = loaded_backend(one_layer(sliding_window=window, softcap=softcap))
    everything = loaded_backend(one_layer(softcap=softcap))
    tokens = prompt(length, seed=length)
    expected = torch.stack([whole(everything, tokens[max(0, end - window) : end])[-1] for end in range(1, length + 1)])
    sequence = Context(tokens, [4, 1, 3, 2])
    counts = [min(chunk, length - start) for start in range(0, length, chunk)]
    pieces = [forward(backend, [(sequence, count)]) for count in counts]
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [1, 5, 16, 17, 40])
def test_decodes_of_different_lengths_share_a_window(window):
    backend = loaded_backend(one_layer(sliding_window=window))
    lengths = [3, 200, 1, 31, 33, 90, 16, 17]
    first = np.cumsum([0, *(len(blocks_for(length)) for length in lengths)])
    sequences = [
        Context(prompt(length), blocks_for(length, int(block))) for length, block in zip(lengths, first, strict=False)
    ]
    for sequence in sequences:
        if len(sequence.tokens) > 1:
            forward(backend, [(sequence, len(sequence.tokens) - 1)], [])
    rows = forward(backend, [(sequence, 1) for sequence in sequences])
    for row, length in zip(rows, lengths, strict=True):
        torch.testing.assert_close(row, whole(backend, prompt(length))[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_what_lies_before_a_window_is_not_read(count):
    window = 20
    backend = loaded_backend(one_layer(sliding_window=window))
    tokens = prompt(80 + count)
    expected = whole(backend, tokens)[-count:]
    sequence = Context(tokens, blocks_for(len(tokens)))
    forward(backend, [(sequence, 80)], [])
    for slots in (*backend._cache._keys, *backend._cache._values):
        slots[: 80 - window + 1] = float("nan")
    torch.testing.assert_close(forward(backend, [(sequence, count)]), expected, atol=1e-5, rtol=0)


def test_a_window_wider_than_the_context_is_none():
    tokens = prompt(40)
    wide = whole(loaded_backend(one_layer(sliding_window=40)), tokens)
    torch.testing.assert_close(wide, whole(loaded_backend(one_layer()), tokens), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- caps


def test_a_cap_that_nothing_reaches_changes_nothing():
    tokens = prompt(40)
    capped = whole(loaded_backend(with_mixer(decoder_config(), softcap=1e5)), tokens)
    torch.testing.assert_close(capped, whole(loaded_backend(), tokens), atol=1e-5, rtol=0)


def test_capped_logits():
    capped = replace(decoder_config(), logits=LogitsConfig(scale=0.5, softcap=0.25))
    expected = (whole(loaded_backend(), prompt(9)) * 0.5 / 0.25).tanh() * 0.25
    torch.testing.assert_close(whole(loaded_backend(capped), prompt(9)), expected)


# ---------------------------------------------------------------- experts


def moe_backend(moe: MoeConfig) -> TorchBackend:
    config = one_layer()
    return loaded_backend(replace(config, layers=(replace(config.layers[0], mlp=moe),)))


def expected_experts(moe: MoeConfig, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return what experts make of one token, one after another, as the formula has it."""
    probabilities = (weights["gate.weight"] @ x).softmax(0)
    chosen = probabilities.sort(descending=True).indices[: moe.experts_per_token]
    total = probabilities[chosen].sum() if moe.normalize else 1.0
    result = torch.zeros_like(x)
    for expert in chosen.tolist():
        gate, up, down = (weights[f"experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        result += probabilities[expert] / total * (down @ (F.silu(gate @ x) * (up @ x)))
    return result


@pytest.mark.parametrize(
    "moe",
    [MOE, replace(MOE, normalize=False), replace(MOE, experts_per_token=1), replace(MOE, experts_per_token=5)],
    ids=["normalised", "as they are", "one", "all"],
)
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_experts(moe, num_tokens):
    backend = moe_backend(moe)
    prefix = "model.layers.0.mlp."
    names = [name for name in backend.parameters() if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): backend.destination(name) for name in names}
    x = torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([expected_experts(moe, weights, token) for token in x])
    torch.testing.assert_close(backend._run._layers[0]._mlp(x), expected, atol=1e-5, rtol=1e-5)


def test_experts_of_a_layer_lie_in_two_buffers():
    backend = TorchBackend(moe_backend(MOE).config, dtype="float32", device="cpu")
    parts = {
        name: backend.destination(f"model.layers.0.mlp.experts.{name}.weight")
        for expert in range(5)
        for name in (f"{expert}.gate_proj", f"{expert}.up_proj", f"{expert}.down_proj")
    }
    assert all(part.is_contiguous() for part in parts.values())
    storages = {name: part.untyped_storage().data_ptr() for name, part in parts.items()}
    assert len({storages[name] for name in storages if "down" not in name}) == 1
    assert len(set(storages.values())) == 2
    size = parts["0.gate_proj"].nbytes
    order = [name for expert in range(5) for name in (f"{expert}.gate_proj", f"{expert}.up_proj")]
    starts = [parts[name].data_ptr() - parts["0.gate_proj"].data_ptr() for name in order]
    assert starts == [size * place for place in range(10)]


def test_destinations_have_the_shapes_of_the_parameters():
    backend = TorchBackend(every_part(), dtype="float32", device="cpu")
    for name, spec in backend.parameters().items():
        assert backend.destination(name).shape == spec.shape, name


def test_a_second_load_changes_every_part():
    backend, other = loaded_backend(every_part()), loaded_backend(every_part())
    before = whole(backend, prompt(30))
    load(backend, seed=1)
    load(other, seed=1)
    torch.testing.assert_close(whole(backend, prompt(30)), whole(other, prompt(30)))
    assert (whole(backend, prompt(30)) - before).abs().max() > 1e-2


# ---------------------------------------------------------------- embeddings and norms


def test_embedding_scale_is_rounded_to_the_dtype_of_the_model():
    scale = 2304**0.5 + 0.1  # 48.1, and 48.0 in bfloat16
    configs = [replace(one_layer(), embedding=EmbeddingConfig(scale=scale)) for scale in (scale, 48.0)]
    one, other = (whole(loaded_backend(config, dtype="bfloat16"), prompt(9)) for config in configs)
    assert torch.equal(one, other)
    one, other = (whole(loaded_backend(config), prompt(9)) for config in configs)
    assert not torch.equal(one, other)


def test_positions_are_those_of_the_tokens_and_not_of_the_batch():
    backend = loaded_backend(replace(one_layer(), embedding=EmbeddingConfig(num_positions=30)))
    tokens = [7] * 30
    every = whole(backend, tokens)
    assert len({tuple(row) for row in every.tolist()}) == 30
    sequence = Context(tokens, [NUM_BLOCKS - 1, 5])
    forward(backend, [(sequence, BLOCK_SIZE)], [])
    torch.testing.assert_close(forward(backend, [(sequence, 14)]), every[BLOCK_SIZE:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_norms(kind, offset, bias):
    norm = NormConfig(kind=kind, eps=0.1, offset=offset, bias=bias)
    backend = TorchBackend(replace(one_layer(), final_norm=norm), dtype="float32", device="cpu")
    stored = load(backend)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) + 2
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * (offset + stored["model.norm.weight"])
    if bias:
        expected = expected + stored["model.norm.bias"]
    torch.testing.assert_close(backend._run._final_norm(x), expected, atol=1e-5, rtol=1e-5)
