"""The torch backend driven by hand: ragged batches, block tables, loading and the cache.

Whether its logits are right is for the parity tests; here they must not depend on how the work is cut up.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
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
from infinilm.backends.torch.cache import BLOCK_SIZE, SCRATCH_TOKENS
from infinilm_hookspecs import LogitsConfig, MlpConfig, NormConfig, PlanError, UnavailableError, parameters

# ---------------------------------------------------------------- the same logits, however the work is cut up


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return loaded_backend()


@given(cuts=st.sets(st.integers(1, 69)), order=st.permutations(range(5)))
@settings(max_examples=40, deadline=None)
def test_any_chunks_in_any_blocks_give_the_same_logits(backend, cuts, order):
    tokens = prompt(70)
    sequence = Context(tokens, list(order))
    bounds = [0, *sorted(cuts), 70]
    pieces = [forward(backend, [(sequence, stop - start)]) for start, stop in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(pieces), whole(backend, tokens), atol=1e-5, rtol=0)


def test_prefill_tiles_give_the_same_logits(backend, monkeypatch):
    monkeypatch.setattr("infinilm.backends.torch.attention._QUERY_TILE", 8)
    tokens = prompt(70)
    sequence = Context(tokens, blocks_for(70))
    pieces = [forward(backend, [(sequence, 11)]), forward(backend, [(sequence, 59)])]
    torch.testing.assert_close(torch.cat(pieces), whole(backend, tokens), atol=1e-5, rtol=0)


def test_ragged_batch_of_prefills_chunks_and_decodes(backend):
    lengths = [1, 5, 17, 33, 40, 64, 2, 90]
    prompts = [prompt(length, seed=length) for length in lengths]
    first = np.cumsum([0, *(len(blocks_for(length)) for length in lengths)])
    sequences = [
        Context(tokens, blocks_for(len(tokens), int(block))) for tokens, block in zip(prompts, first, strict=False)
    ]
    done = [0, 0, 16, 20, 39, 63, 1, 3]  # a whole prompt of one token and of five, two chunks, three decodes, a chunk
    for sequence, count in zip(sequences, done, strict=True):
        if count:
            forward(backend, [(sequence, count)])
    counts = [length - count for length, count in zip(lengths, done, strict=True)]
    pieces = forward(backend, list(zip(sequences, counts, strict=True))).split(counts)
    for tokens, count, piece in zip(prompts, done, pieces, strict=True):
        torch.testing.assert_close(piece, whole(backend, tokens)[count:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scratch", [SCRATCH_TOKENS, 40])
def test_decodes_of_very_different_lengths(monkeypatch, scratch):
    monkeypatch.setattr("infinilm.backends.torch.attention._CHEAP_PADDING", 0)
    monkeypatch.setattr("infinilm.backends.torch.attention.SCRATCH_TOKENS", scratch)
    monkeypatch.setattr("infinilm.backends.torch.cache.SCRATCH_TOKENS", scratch)
    backend = loaded_backend()
    lengths = [3, 200, 1, 31, 33, 90]
    first = np.cumsum([0, *(len(blocks_for(length)) for length in lengths)])
    sequences = [
        Context(prompt(length), blocks_for(length, int(block))) for length, block in zip(lengths, first, strict=False)
    ]
    for sequence in sequences[:2] + sequences[3:]:
        forward(backend, [(sequence, len(sequence.tokens) - 1)], [])
    rows = forward(backend, [(sequence, 1) for sequence in sequences])
    for row, length in zip(rows, lengths, strict=True):
        torch.testing.assert_close(row, whole(backend, prompt(length))[-1], atol=1e-5, rtol=0)


def test_logits_of_the_rows_asked_for(backend):
    tokens = prompt(20)
    every = whole(backend, tokens)
    for rows in ([], [19], [0, 3, 4, 19]):
        some = forward(backend, [(Context(tokens, [3, 1]), 20)], rows)
        assert some.dtype == torch.float32
        torch.testing.assert_close(some, every[rows])


def test_whoever_held_a_block_before_leaves_no_trace():
    backend = loaded_backend()
    tokens = prompt(20)
    expected = whole(backend, tokens)[-1]
    for slots in (*backend._cache._keys, *backend._cache._values):
        slots[: 32 * BLOCK_SIZE] = float("nan")
    long, short = Context(prompt(40), [0, 1, 2]), Context(tokens, [3, 4])
    forward(backend, [(long, 39), (short, 19)], [])
    _, last = forward(backend, [(long, 1), (short, 1)])
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=0)


def test_copied_blocks_serve_another_sequence(backend):
    tokens = prompt(33)
    expected = whole(backend, tokens)[-1]
    original = Context(tokens, [0, 1, 2])
    forward(backend, [(original, 32)], [])
    backend.copy_blocks([])
    backend.copy_blocks([(0, 1), (1, 0)])
    copy = replace(original, blocks=[1, 0, 5])
    copy.num_computed = 32
    torch.testing.assert_close(forward(backend, [(copy, 1)])[0], expected, atol=1e-5, rtol=0)


def test_dynamic_rope_tells_prompt_from_generated_tokens(backend):
    tokens = prompt(40)
    expected = whole(backend, tokens, prompt_length=25)
    # One step a token, as decoding does it, and once more after a preemption in other chunks.
    for counts in ([25] + [1] * 15, [7, 20, 13], [40]):
        sequence = Context(tokens, [2, 0, 1], prompt_length=25)
        pieces = [forward(backend, [(sequence, count)]) for count in counts]
        torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=0)
    assert (expected - whole(backend, tokens, prompt_length=40)).abs().max() > 1e-2


def test_without_rope_the_order_of_the_context_does_not_matter():
    backend = loaded_backend(decoder_config(rope=None))
    tokens = prompt(12)
    one_layer = replace(backend.config, layers=backend.config.layers[:1])
    shallow = loaded_backend(one_layer)
    torch.testing.assert_close(
        whole(shallow, tokens)[-1], whole(shallow, [*reversed(tokens[:-1]), tokens[-1]])[-1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32(backend, dtype):
    tokens = prompt(40)
    low = whole(loaded_backend(dtype=dtype), tokens)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, whole(backend, tokens), atol=0.1, rtol=0.05)


def test_a_step_runs_on_another_device():
    # The meta device computes nothing, and most of torch refuses to mix it with the CPU.
    backend = TorchBackend(decoder_config(), dtype="bfloat16", device="meta")
    load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    sequences = [Context(prompt(40), [3 * row, 3 * row + 1, 3 * row + 2]) for row in range(4)]
    assert forward(backend, list(zip(sequences, [40, 20, 39, 5], strict=True)), []).shape == (0, 31)
    logits = forward(backend, list(zip(sequences[1:], [20, 1, 1], strict=True)))
    assert logits.device.type == "meta"
    assert logits.shape == (22, 31)
    backend.copy_blocks([(0, 1)])


# ---------------------------------------------------------------- loading


def test_parameters_are_the_canonical_ones_and_allocate_nothing():
    layer = decoder_config().layers[0]
    wide = replace(layer, mlp=MlpConfig(intermediate_size=1 << 30))
    config = replace(decoder_config(), hidden_size=1 << 20, layers=(wide,) * 4)
    tracemalloc.start()
    backend = TorchBackend(config, dtype="bfloat16", device="cpu")
    assert backend.parameters() == parameters(config, "bfloat16")
    assert backend.cache_spec().bytes_per_block == 16 * 4 * 2 * 2 * 6 * 2
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_destinations_have_the_shapes_of_the_parameters():
    backend = TorchBackend(decoder_config(tied=True), dtype="float32", device="cpu")
    for name, spec in backend.parameters().items():
        if spec.tied_to is None:
            assert backend.destination(name).shape == spec.shape


def test_fused_parameters_share_one_buffer():
    backend = TorchBackend(decoder_config(), dtype="float32", device="cpu")
    names = [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkv"]
    for kind in ("weight", "bias"):
        parts = [backend.destination(f"{name}.{kind}") for name in names]
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
        assert [part.data_ptr() - parts[0].data_ptr() for part in parts[1:]] == [
            parts[0].nbytes,
            parts[0].nbytes + parts[1].nbytes,
        ]


def test_a_second_load_goes_to_the_same_addresses_and_changes_the_model():
    backend = loaded_backend()
    before = whole(backend, prompt(9))
    names = [name for name, spec in backend.parameters().items() if spec.tied_to is None]
    addresses = [backend.destination(name).data_ptr() for name in names]
    load(backend, seed=1)
    assert [backend.destination(name).data_ptr() for name in names] == addresses
    other = loaded_backend()
    load(other, seed=1)
    torch.testing.assert_close(whole(backend, prompt(9)), whole(other, prompt(9)))
    assert (whole(backend, prompt(9)) - before).abs().max() > 1e-2


def test_a_second_load_refreshes_norms_with_an_offset():
    config = replace(decoder_config(), final_norm=NormConfig(offset=1.0))
    backend = loaded_backend(config)
    stored = load(backend, seed=1)
    plain = TorchBackend(decoder_config(), dtype="float32", device="cpu")
    for name, tensor in stored.items():
        plain.destination(name).copy_(tensor + 1 if name == "model.norm.weight" else tensor)
        plain.loaded(name)
    plain.finish_loading()
    plain.allocate_cache(NUM_BLOCKS, num_slots=1)
    torch.testing.assert_close(whole(backend, prompt(9)), whole(plain, prompt(9)))


def test_a_tied_output_projection_is_the_embedding():
    backend = TorchBackend(decoder_config(tied=True), dtype="float32", device="cpu")
    stored = load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=1)
    untied = TorchBackend(decoder_config(), dtype="float32", device="cpu")
    for name in untied.parameters():
        source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        untied.destination(name).copy_(stored[source])
        untied.loaded(name)
    untied.finish_loading()
    untied.allocate_cache(NUM_BLOCKS, num_slots=1)
    torch.testing.assert_close(whole(backend, prompt(9)), whole(untied, prompt(9)))


def test_what_was_never_loaded_is_named():
    backend = TorchBackend(decoder_config(), dtype="float32", device="cpu")
    for name in backend.parameters():
        if name != "model.layers.1.self_attn.k_proj.bias":
            backend.loaded(name)
    with pytest.raises(PlanError, match=r"1 of \d+ parameters were not loaded: model\.layers\.1\.self_attn\.k_proj"):
        backend.finish_loading()


def test_logits_scale():
    scaled = replace(decoder_config(), logits=LogitsConfig(scale=0.5))
    expected = whole(loaded_backend(), prompt(9)) * 0.5
    torch.testing.assert_close(whole(loaded_backend(scaled), prompt(9)), expected)


def test_close_twice():
    backend = loaded_backend()
    backend.close()
    backend.close()


# ---------------------------------------------------------------- the cache


def test_a_cache_that_is_too_big_is_refused_with_numbers():
    backend = TorchBackend(decoder_config(), dtype="float32", device="cpu", memory=lambda device: (10_000, 20_000))
    assert backend.cache_spec().bytes_per_block == 3072
    with pytest.raises(UnavailableError, match="the cache needs 33792 bytes, and 'cpu' has 10000 of 20000 bytes free"):
        backend.allocate_cache(10, num_slots=1)
    backend.allocate_cache(2, num_slots=1)


def test_a_cache_the_device_cannot_allocate_is_refused():
    backend = TorchBackend(decoder_config(), dtype="float32", device="cpu")
    with pytest.raises(UnavailableError, match="no room for a cache of 1099511627776 blocks"):
        backend.allocate_cache(1 << 40, num_slots=1)
