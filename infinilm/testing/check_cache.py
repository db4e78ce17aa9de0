"""Checks of blocks and slots: given out again, taken away, shared, copied, and refused where there is no room."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Final

import torch

from infinilm.testing.driver import Context
from infinilm.testing.subject import Bench, Subject, load
from infinilm.testing.verdicts import ConformanceError, NotApplicable, require
from infinilm_hookspecs import InfinilmError, UnavailableError

_TOO_MANY: Final = 1 << 40


def check_slots_are_reused(subject: Subject) -> None:
    """After `release` the slot and the blocks of a sequence are another's, who sees nothing of what was there."""
    long, short = subject.prompt(subject.length, 1), subject.prompt(subject.length // 2)
    expected = subject.expected(short)
    blocks = list(range(-(-len(long) // subject.spec.block_size)))
    with subject.bench(num_slots=1) as bench:
        for time in (1, 2, 3):
            bench.compute(bench.start(long, blocks=blocks, slot=0), [len(long) - 1, 1])
            bench.backend.release([0])
            context = bench.start(short, blocks=list(reversed(blocks)), slot=0)
            logits = bench.compute(context, [len(short) // 2, len(short) - len(short) // 2 - 1, 1])
            what = f"in the slot and blocks of a sequence that was released (for the {time}. time)"
            subject.require_equal(logits, expected, what)
            bench.backend.release([0])


def check_stale_values(subject: Subject) -> None:
    """Not even a NaN shines through from sequences that held a block or a slot before, nor through padding.

    A diverged update fills the cache with NaN, and the next good one must serve again. A mask that multiplies by zero
    does not hide a NaN.
    """
    tokens = subject.prompt(subject.length)
    expected = subject.expected(tokens, 1)
    needed = -(-len(tokens) // subject.spec.block_size)
    for first in (0, needed // 2):  # NaN stays in the last blocks of the cache, or in the first
        with subject.bench(num_blocks=2 * needed, num_slots=2) as bench:
            _spoil(subject, bench, tokens)
            blocks = list(range(first, 2 * needed))
            long = bench.start(tokens, prompt_length=1, blocks=blocks[:needed], slot=0)
            short = bench.start(tokens[: len(tokens) // 2], prompt_length=1, blocks=blocks[needed:], slot=1)
            contexts = (long, short)
            bench.step([(context, len(context.tokens) - 2) for context in contexts], [])
            for back in (2, 1):
                logits = bench.step([(context, 1) for context in contexts])
                wanted = expected[[len(context.tokens) - back for context in contexts]]
                subject.require_equal(logits, wanted, "in slots and blocks that held NaN")


def check_release_spares_others(subject: Subject) -> None:
    """`release` forgets the slots it is given and no others: sequences beside them go on."""
    tokens = subject.prompt(subject.length)
    half = len(tokens) // 2
    with subject.bench() as bench:
        contexts = [bench.start(tokens) for _ in range(3)]
        bench.step([(context, half) for context in contexts], [])
        bench.stop(contexts[1])
        bench.stop(contexts[2])
        logits = bench.step([(contexts[0], len(tokens) - half)])
    subject.require_equal(logits, subject.expected(tokens)[half:], "after two sequences beside it were released")


def check_release_of_unused_slots(subject: Subject) -> None:
    """Releasing a slot that ran nothing yet is harmless: a step that failed gives back what it was to begin with."""
    tokens = subject.prompt(4)
    with subject.bench(num_slots=3) as bench:
        try:
            bench.backend.release([2])
            bench.backend.release([1, 0])
        except Exception as err:
            raise ConformanceError(f"release of a slot that ran nothing: {type(err).__name__}: {err}") from err
        logits = bench.step([(bench.start(tokens, slot=2), 4)])
    subject.require_equal(logits, subject.expected(tokens), "in a slot that was released before its first step")


def check_preemption(subject: Subject) -> None:
    """A preempted sequence starts again at token 0, in other blocks and another slot, and goes on as if never stopped.

    Prompt and generated tokens are then computed together, in any chunks; `prompt_lengths` still says where the prompt
    ended.
    """
    tokens = subject.prompt(subject.length)
    prompt_length = len(tokens) - 6
    with subject.bench() as bench:
        context = bench.start(tokens, prompt_length=prompt_length)
        before = bench.compute(context, [prompt_length, 1, 1, 1])
        bench.stop(context)
        other = bench.start(subject.prompt(subject.length, 1))  # in the blocks and the slot it had
        bench.step([(other, len(other.tokens))], [])
        again = bench.start(tokens, prompt_length=prompt_length)
        after = bench.compute(again, [prompt_length // 2, prompt_length + 3 - prompt_length // 2, 1, 1, 1])
    expected = subject.expected(tokens, prompt_length)
    subject.require_equal(before, expected[: len(before)], f"a prompt of {prompt_length} tokens, then one at a time")
    subject.require_equal(after, expected, f"started again at token 0 after {prompt_length + 3} tokens")


def check_shared_prefix(subject: Subject) -> None:
    """Sequences may share the full blocks that they begin with: the second starts behind them, in its own slot.

    That is prefix caching. Who shares may outlive who computed.
    """
    subject.require_shareable()
    tokens = subject.prompt(subject.length)
    size, num_shared = subject.spec.block_size, (subject.length - 1) // subject.spec.block_size
    if not num_shared:
        raise NotApplicable(f"sequences of up to {subject.length} tokens fill no block of {size}")
    expected = subject.expected(tokens, 1)
    with subject.bench() as bench:
        first = bench.start(tokens, prompt_length=1)
        bench.step([(first, num_shared * size)], [])
        second = _sharing(bench, first, num_shared)
        left = len(tokens) - num_shared * size
        logits = bench.step([(second, left), (first, left)])
        subject.require_equal(logits, expected[-left:].repeat(2, 1), f"two that share {num_shared} blocks, in one step")
        third = _sharing(bench, first, num_shared)
        bench.backend.release([first.slot])
        subject.require_equal(bench.step([(third, left)]), expected[-left:], "sharing blocks of one that was released")
        longer = _sharing(bench, first, num_shared, prompt_length=len(tokens))
        of_longer = subject.expected(tokens, len(tokens))[-left:]
        what = "sharing blocks of a shorter prompt; where keys depend on a prompt's length say shareable=False"
        subject.require_equal(bench.step([(longer, left)]), of_longer, what)


def check_copy_blocks(subject: Subject) -> None:
    """`copy_blocks` copies what blocks hold, of every layer: the copy and the original then go their own ways."""
    subject.require_shareable()
    tokens = subject.prompt(subject.length, 1)
    half = len(tokens) // 2
    fork = [*tokens[:half], *subject.prompt(len(tokens) - half, 2)]
    expected, expected_of_fork = subject.expected(tokens, 1)[half:], subject.expected(fork, 1)[half:]
    with subject.bench() as bench:
        original, copy = bench.start(tokens, prompt_length=1), bench.start(fork, prompt_length=1)
        bench.step([(original, half)], [])
        bench.backend.copy_blocks([])
        num_held = -(-half // bench.block_size)
        bench.backend.copy_blocks(list(zip(original.blocks[:num_held], copy.blocks[:num_held], strict=True)))
        copy.num_computed = half
        counts = [2, len(tokens) - half - 2]  # in turns, so that each would see what the other writes
        pieces = [[bench.step([(its, count)]) for its in (copy, original)] for count in counts]
    of_copy, of_original = (torch.cat(its) for its in zip(*pieces, strict=True))
    subject.require_equal(of_copy, expected_of_fork, "on copies of another sequence's blocks")
    subject.require_equal(of_original, expected, "a sequence whose blocks were copied")


def check_copies_at_once(subject: Subject) -> None:
    """The pairs of one `copy_blocks` are copied at once: every block is read before any of them is written.

    A block may be copied and overwritten in the same call, so that the engine need not order or split its moves.
    """
    subject.require_shareable()
    tokens = subject.prompt(subject.length)
    num_blocks = (len(tokens) - 1) // subject.spec.block_size
    if num_blocks < 2:
        raise NotApplicable(f"sequences of up to {len(tokens)} tokens fill no two blocks of {subject.spec.block_size}")
    left = len(tokens) - num_blocks * subject.spec.block_size
    expected = subject.expected(tokens, 1)[-left:]
    for what in ("the two swapped", "a chain of moves, the first one's target copied on"):
        with subject.bench() as bench:
            context = bench.start(tokens, prompt_length=1)
            bench.step([(context, len(tokens) - left)], [])
            first, second, *others = context.blocks
            free = bench.start(tokens).blocks[0]
            if what == "the two swapped":
                pairs, blocks = [(first, second), (second, first)], [second, first]
            else:
                pairs, blocks = [(first, second), (second, free)], [second, free]
            bench.backend.copy_blocks(pairs)
            moved = replace(context, blocks=[*blocks, *others])
            subject.require_equal(bench.step([(moved, left)]), expected, f"copy_blocks({pairs}), {what}")


def check_allocation_refused(subject: Subject) -> None:
    """`allocate_cache` of what cannot fit raises `UnavailableError` with numbers, and a smaller one works afterwards.

    The message is what an operator reads who asked for too long contexts.
    """
    spec = subject.spec
    if not spec.bytes_per_block and not spec.bytes_per_slot:
        raise NotApplicable("blocks and slots cost nothing, says cache_spec(): any number fits")
    num_blocks, num_slots = (_TOO_MANY, 1) if spec.bytes_per_block else (1, _TOO_MANY)
    num_bytes = num_blocks * spec.bytes_per_block + num_slots * spec.bytes_per_slot
    asked = f"allocate_cache({num_blocks}, {num_slots}), {num_bytes} bytes by cache_spec()"
    tokens = subject.prompt(subject.length)
    with subject.loaded() as backend:
        try:
            backend.allocate_cache(num_blocks, num_slots)
        except UnavailableError as err:
            require(bool(re.search(r"\d{3,}", str(err))), f"{asked}: the message has no numbers: {err}")
        except Exception as err:
            raise ConformanceError(f"{asked}, raised {type(err).__name__}, and not UnavailableError: {err}") from err
        else:
            raise ConformanceError(f"{asked}, was not refused; raise UnavailableError")
        bench = subject.allocated(backend)
        context: Context = bench.start(tokens)
        logits = bench.step([(context, len(tokens))])
    subject.require_equal(logits, subject.expected(tokens), "on a smaller cache after one was refused")


def _sharing(bench: Bench, first: Context, num_shared: int, *, prompt_length: int = 1) -> Context:
    """Return a sequence of the same tokens that begins with so many blocks of `first`."""
    context = bench.start(first.tokens, prompt_length=prompt_length)
    context.blocks[:num_shared] = first.blocks[:num_shared]
    context.num_computed = num_shared * bench.block_size
    return context


def _spoil(subject: Subject, bench: Bench, tokens: list[int]) -> None:
    """Fill two slots and their blocks with what comes of parameters that are NaN, and load good ones."""
    values = subject.values(bench.backend.parameters())
    try:
        load(bench.backend, {name: torch.full_like(value, math.nan) for name, value in values.items()})
    except InfinilmError as err:
        raise NotApplicable(f"the backend does not take parameters that are NaN: {err}") from err
    spoilt = [bench.start(tokens), bench.start(tokens)]
    bench.step([(context, len(tokens) - 1) for context in spoilt], [])
    bench.step([(context, 1) for context in spoilt], [])
    bench.stop(*spoilt)
    load(bench.backend, values)
