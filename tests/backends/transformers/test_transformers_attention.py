"""The attention function by itself, against scores written out: windows, chunks, caps, sinks, narrow values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from infinilm.backends.transformers.attention import (
    Step,
    StepCache,
    UnpagedError,
    Visible,
    attend,
    describe_mask,
    running,
)
from infinilm.backends.transformers.pages import Pages
from infinilm_hookspecs import ForwardBatch

NUM_HEADS, NUM_KV_HEADS, KEY_SIZE, VALUE_SIZE = 6, 2, 8, 4
LENGTHS = (37, 20, 5)
# Who computes how many tokens in each step: prefills from the start, in the middle, and decodes, mixed.
STEPS = [((0, 10), (1, 19)), ((0, 13), (1, 1), (2, 4)), ((0, 1), (2, 1)), ((0, 13),)]
CPU = torch.device("cpu")


def batch_of(chunks: tuple[tuple[int, int], ...], done: list[int]) -> ForwardBatch:
    """Return the step that computes so many tokens of each sequence; block tables are interleaved."""
    counts = [count for _, count in chunks]
    positions = numpy.concatenate([numpy.arange(done[s], done[s] + n, dtype=numpy.int32) for s, n in chunks])
    rows = numpy.repeat(numpy.arange(len(chunks)), counts)
    tables = numpy.array([[sequence, sequence + 3, sequence + 6] for sequence, _ in chunks], numpy.int32)
    return ForwardBatch(
        token_ids=positions,
        positions=positions,
        query_starts=numpy.cumsum([0, *counts], dtype=numpy.int32),
        context_lengths=numpy.array([done[s] + n for s, n in chunks], numpy.int32),
        block_tables=tables,
        slot_mapping=(tables[rows, positions // 16] * 16 + positions % 16).astype(numpy.int32),
        slots=numpy.array([s for s, _ in chunks], numpy.int32),
        logits_indices=positions,
        extras=[None] * len(chunks),
    )


def written_out(
    query: Tensor, key: Tensor, value: Tensor, seen: Callable[..., Tensor], softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return attention (length, num_heads, size) of a whole sequence, head by head."""
    at = torch.arange(len(query))
    hidden = ~torch.as_tensor(seen(0, 0, at[:, None], at[None]))
    attended = []
    for head in range(NUM_HEADS):
        shared = head // (NUM_HEADS // NUM_KV_HEADS)
        scores = query[:, head] @ key[:, shared].T * 0.3  # (length, length)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores[hidden] = -math.inf
        sink = torch.zeros(len(query), 0) if sinks is None else sinks[head].expand(len(query), 1)
        attended.append(torch.cat([scores, sink], -1).softmax(-1)[:, : len(query)] @ value[:, shared])
    return torch.stack(attended, 1)


KINDS: dict[str, tuple[dict[str, Any], float | None, bool]] = {
    "causal": ({"mask_function": causal_mask_function}, None, False),
    "window": ({"mask_function": sliding_window_causal_mask_function(7), "local_size": 7}, None, False),
    "chunks": (
        {"mask_function": chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int)), "local_size": 8},
        None,
        False,
    ),
    "capped": ({"mask_function": causal_mask_function}, 1.5, False),
    "sinks": ({"mask_function": causal_mask_function}, None, True),
    "capped window with sinks": (
        {"mask_function": sliding_window_causal_mask_function(7), "local_size": 7},
        1.5,
        True,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_steps_attend_as_whole_sequences_do(kind: str) -> None:
    mask, softcap, has_sinks = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": (NUM_HEADS, KEY_SIZE), "key": (NUM_KV_HEADS, KEY_SIZE), "value": (NUM_KV_HEADS, VALUE_SIZE)}
    parts = [{k: torch.randn(n, *size, generator=generator) for k, size in sizes.items()} for n in LENGTHS]
    sinks = torch.randn(NUM_HEADS, generator=generator) if has_sinks else None
    wanted = [written_out(**part, seen=mask["mask_function"], softcap=softcap, sinks=sinks) for part in parts]
    pages, done = Pages(9, CPU), [0, 0, 0]
    for chunks in STEPS:
        step = Step(batch_of(chunks, done), pages, CPU)
        ranges = [(s, slice(done[s], done[s] + n)) for s, n in chunks]
        query, key, value = (
            torch.cat([parts[s][name][rows] for s, rows in ranges]).transpose(0, 1)[None] for name in sizes
        )
        key, value = StepCache(step).update(key, value, 0)
        with running(step):
            visible = describe_mask(**mask)
            found, _ = attend(None, query, key, value, visible, scaling=0.3, softcap=softcap, s_aux=sinks)
        expected = torch.cat([wanted[s][rows] for s, rows in ranges])
        assert torch.allclose(found[0], expected, atol=1e-5)
        for sequence, count in chunks:
            done[sequence] += count
    assert done == list(LENGTHS)


# ---------------------------------------------------------------- what is refused


def start() -> tuple[Step, Tensor, Tensor, Tensor]:
    step = Step(batch_of(((0, 3),), [0, 0, 0]), Pages(9, CPU), CPU)
    key, value = torch.ones(1, NUM_KV_HEADS, 3, KEY_SIZE), torch.ones(1, NUM_KV_HEADS, 3, VALUE_SIZE)
    return step, torch.ones(1, NUM_HEADS, 3, KEY_SIZE), *StepCache(step).update(key, value, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": None}, "masks attention with NoneType"),
        ({"attention_mask": torch.zeros(1)}, "masks attention with Tensor"),
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.zeros(1)}, "takes position_bias"),
        ({"block_indices": 3, "indices": 4}, "takes block_indices, indices"),
    ],
)
def test_what_the_function_does_not_know(options: dict[str, Any], message: str) -> None:
    step, query, key, value = start()
    with running(step), pytest.raises(UnpagedError, match=message):
        attend(None, query, key, value, **{"attention_mask": Visible(), **options})


def test_keys_that_were_never_written() -> None:
    step, query, key, value = start()
    with running(step), pytest.raises(UnpagedError, match="not those it put in the cache"):
        attend(None, query, key.clone(), value, Visible())


def test_masks_that_show_the_future() -> None:
    with pytest.raises(UnpagedError, match="see those after them"):
        describe_mask(mask_function=bidirectional_mask_function)


def test_attention_outside_of_a_step() -> None:
    step, query, key, value = start()
    with running(step):
        attend(None, query, key, value, Visible())
    with pytest.raises(UnpagedError, match="outside of a step"):
        attend(None, query, key, value, Visible())


def test_what_a_model_asks_of_its_cache_and_masks_is_named() -> None:
    step, *_ = start()
    assert not hasattr(StepCache(step), "get_conv_state")
    with pytest.raises(UnpagedError, match="asks its cache for get_conv_state"):
        StepCache(step).get_conv_state(0)
    with pytest.raises(UnpagedError, match="computes with its masks: dtype"):
        _ = Visible().dtype
