"""Trying out a loaded model on a few tokens: may it run on the paged cache, how may prompts be cut, what does it keep?

What a model says to a prompt at once, on its own cache, is what every other way is held against: the way `generate`
goes after that, token by token, then larger chunks, then the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy
import torch
from torch import Tensor

from infinilm.backends.torch.cache import BLOCK_SIZE
from infinilm.backends.transformers.attention import UnpagedError
from infinilm.backends.transformers.families import describe
from infinilm.backends.transformers.sequences import Cut, Sequence, Stepper, state_bytes
from infinilm_hookspecs import ForwardBatch, UnavailableError

UNSUPPORTED: Final = "its class does not say that it supports other attention"

_LENGTH: Final = 13
_FIRST: Final = 6  # tokens of the first chunk
_CHUNKS: Final = (6, 9, 10, 13)
_ID_BYTES: Final = 8  # of a token whose id is kept
# How far two ways to the same logits may be apart: so many roundings of the dtype, and never so much that a token too
# many or too few could hide in it.
_ROUNDINGS: Final = 1 << 13
_MOST: Final = 0.1
# Layers of caches that continue with any number of tokens. What others keep may hang on where a prompt was cut, beyond
# lengths that can be tried.
_PLAIN_LAYERS: Final = frozenset(
    {
        "DummyLayer",
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "LinearAttentionLayer",
    }
)


@dataclass(frozen=True, slots=True)
class Findings:
    """How a model may be run: `unpaged` says why not on the paged cache, `None` where it may.

    `bytes_per_token` and `bytes_per_sequence` are what its own cache takes. A row of logits has `num_logits`.
    """

    cut: Cut
    unpaged: str | None
    bytes_per_token: int
    bytes_per_sequence: int
    num_logits: int


def try_out(
    stepper: Stepper, vocab_size: int, dtype: torch.dtype, paged: Callable[[ForwardBatch], Tensor] | None
) -> Findings:
    """Try a model. `paged` runs a batch on pages of its own, or raises `UnpagedError`; `None`: that is out of question.

    Raises `UnavailableError` for a model that cannot be run at all.
    """
    prompt = _prompt(vocab_size)
    try:
        stepper.learn_memory(lambda: _say(stepper, prompt, [_LENGTH - 1, _LENGTH]))
        whole, sequence = _say(stepper, prompt, [_LENGTH])
        singles, _ = _say(stepper, prompt, [*range(_FIRST, _LENGTH + 1)])
    except Exception as err:  # whatever the code of a model raises is the reason why it cannot be run
        raise UnavailableError(f"the model does not run: {describe(err)}") from err
    # Models compute parts of themselves in float32, whatever they are asked for.
    limit = min(_MOST, _ROUNDINGS * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))
    odd = _odd_layers(sequence)
    cut = Cut.NOWHERE
    if not stepper.memory.has_stateful_rope and not odd and _apart(singles, whole, dtype) <= limit:
        cut = _find_cut(stepper, prompt, whole, dtype, limit)
    reason = _why_not_try(stepper, odd)
    if reason is None:
        reason = UNSUPPORTED if paged is None else _why_not_paged(paged, prompt, whole, dtype, limit)
    return Findings(cut, reason, *_sizes(stepper, sequence, prompt), whole.shape[-1])


def _why_not_try(stepper: Stepper, odd: set[str]) -> str | None:
    """Return what keeps a model off the paged cache that a few tokens would not show, or `None`."""
    if stepper.memory.has_stateful_rope:
        return "its rotary frequencies depend on the length of a sequence"
    if not stepper.memory.is_empty:
        return "its modules keep a state of their own"
    return f"its cache has layers of {', '.join(sorted(odd))}" if odd else None


def _prompt(vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size // 2, vocab_size, (_LENGTH,), generator=generator).tolist()


def _say(stepper: Stepper, prompt: list[int], stops: list[int]) -> tuple[Tensor, Sequence]:
    """Return the logits (num_tokens, vocab_size) of a prompt that is computed up to each of `stops`."""
    sequence = Sequence(list(prompt))
    rows = [stepper.advance(sequence, stop, stop - sequence.num_seen) for stop in stops]
    logits = torch.cat(rows)
    if logits.shape[0] != len(prompt):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(prompt)} tokens")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits that are not finite")
    return logits, sequence


def _apart(one: Tensor, other: Tensor, dtype: torch.dtype) -> float:
    """Return by how much rows of logits differ, in parts of what a row varies.

    Of the worst row in float32; in low precision of the middle one, because rounding may send single tokens to other
    experts, but what is wrong is wrong for most.
    """
    scale = (other - other.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-30)
    apart = ((one - other).norm(dim=-1) / scale)[_FIRST:]
    return float(apart.max() if torch.finfo(dtype).eps < 1e-4 else apart.median())


def _odd_layers(sequence: Sequence) -> set[str]:
    caches = [value for value in sequence.state.values() if isinstance(getattr(value, "layers", None), list)]
    return {type(layer).__name__ for cache in caches for layer in cache.layers} - _PLAIN_LAYERS


def _find_cut(stepper: Stepper, prompt: list[int], whole: Tensor, dtype: torch.dtype, limit: float) -> Cut:
    try:
        chunked, _ = _say(stepper, prompt, list(_CHUNKS))
    except Exception:  # a model that cannot continue with several tokens says so in its own ways
        return Cut.ONE_BY_ONE
    return Cut.ANYWHERE if _apart(chunked, whole, dtype) <= limit else Cut.ONE_BY_ONE


def _why_not_paged(
    paged: Callable[[ForwardBatch], Tensor], prompt: list[int], whole: Tensor, dtype: torch.dtype, limit: float
) -> str | None:
    """Run two copies of the prompt as the engine would, mixed and cut differently, and compare what comes."""
    try:
        first = paged(_batch(prompt, [(0, 0, 5), (1, 0, 9)]))
        second = paged(_batch(prompt, [(0, 5, 6), (1, 9, 13)]))
        third = paged(_batch(prompt, [(0, 6, 13)]))
    except UnpagedError as err:
        return str(err)
    except Exception as err:  # a model that does something else with its cache than the interface says
        return f"on the paged cache it raises {describe(err)}"
    zero = torch.cat([first[:5], second[:1], third])
    one = torch.cat([first[5:], second[1:]])
    apart = max(_apart(zero, whole, dtype), _apart(one, whole, dtype))
    return None if apart <= limit else f"on the paged cache its logits are off by {apart:.1e}"


def _batch(prompt: list[int], chunks: list[tuple[int, int, int]]) -> ForwardBatch:
    """Return a batch of (sequence, start, stop) of copies of the prompt, a block for each; logits of all tokens."""
    counts = [stop - start for _, start, stop in chunks]
    positions = numpy.concatenate([numpy.arange(start, stop, dtype=numpy.int32) for _, start, stop in chunks])
    blocks = numpy.repeat([sequence for sequence, _, _ in chunks], counts).astype(numpy.int32)
    return ForwardBatch(
        token_ids=numpy.array(prompt, numpy.int32)[positions],
        positions=positions,
        query_starts=numpy.cumsum([0, *counts], dtype=numpy.int32),
        context_lengths=numpy.array([stop for _, _, stop in chunks], numpy.int32),
        block_tables=numpy.array([[sequence] for sequence, _, _ in chunks], numpy.int32),
        slot_mapping=blocks * BLOCK_SIZE + positions,
        slots=numpy.array([sequence for sequence, _, _ in chunks], numpy.int32),
        logits_indices=numpy.arange(len(positions), dtype=numpy.int32),
        extras=[None] * len(chunks),
        prompt_lengths=numpy.full(len(chunks), len(prompt), numpy.int32),
    )


def _sizes(stepper: Stepper, sequence: Sequence, prompt: list[int]) -> tuple[int, int]:
    """Return what a token adds to the state of a sequence, and what every sequence has from the start, in bytes."""
    short = Sequence(prompt[:_FIRST])
    stepper.advance(short, _FIRST, 1)
    few, many = state_bytes(short), state_bytes(sequence)
    per_token = max(0, -(-(many - few) // (_LENGTH - _FIRST)))
    return per_token + _ID_BYTES, max(0, many - per_token * _LENGTH)
