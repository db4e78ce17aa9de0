"""Checks of `forward`: the same logits however the work is cut up and laid out, and nothing else touched."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from infinilm.testing.decoders import is_position_aware, reach, windows
from infinilm.testing.driver import Context, make_batch
from infinilm.testing.subject import Bench, Subject
from infinilm.testing.verdicts import NotApplicable, require
from infinilm_hookspecs import DecoderConfig

# Times the tolerance: a change of the context that shows less than this would make every other check blind.
_PLAIN_TO_SEE: Final = 5
# A tolerance this small belongs to a dtype in which one token of many is not rounded away.
_EXACT: Final = 1e-3


def check_context_matters(subject: Subject) -> None:
    """Logits depend on the tokens before, by far more than the tolerance: without that every other check is empty.

    Other tokens begin a short sequence, and fill the first block of a long one, unless windows end before or what is
    not in blocks may forget.
    """
    seen = reach(subject.config)
    short = subject.prompt(8)
    first = 0 if seen is None else max(0, 7 - seen)
    changed = _with_other_tokens(subject, short, range(first, max(first + 1, 4)))
    _require_other(subject, short, changed, "other tokens at the beginning of 8")
    if seen is None and subject.spec.shareable:
        tokens = subject.prompt(subject.length)
        first_block = range(min(subject.spec.block_size, len(tokens) // 2))
        _require_other(
            subject, tokens, _with_other_tokens(subject, tokens, first_block), "other tokens in the first block"
        )


def check_order_matters(subject: Subject) -> None:
    """Logits depend on where in the context a token is: `positions` count from the start of the sequence."""
    config = subject.config
    if isinstance(config, DecoderConfig) and not is_position_aware(config):
        raise NotApplicable("the model knows no positions")
    tokens = subject.prompt(12)
    _require_other(subject, tokens, [*reversed(tokens[:-1]), tokens[-1]], "the same context backwards")


def check_reference(subject: Subject) -> None:
    """The plainest run gives the logits of somebody else's implementation: all other checks compare with that run.

    They may be apart by twice the tolerance, because somebody else rounds in other places.
    """
    if subject.case.reference is None:
        raise NotApplicable("the case has no reference(values, token_ids), logits that somebody else computed")
    with subject.made() as backend:
        values = subject.values(backend.parameters())
    tokens = subject.prompt(subject.length)
    reference = subject.case.reference(values, tokens).detach().to("cpu", torch.float32)
    subject.require_equal(
        subject.expected(tokens), reference, "alone in one chunk, against the case's reference", share=2
    )


def check_any_chunks(subject: Subject) -> None:
    """A prompt gives the same logits however it is split into chunks.

    The budget of a step splits prompts anywhere: after the first token, next to the border of a block, before the last.
    """
    tokens = subject.prompt(subject.length)
    expected = subject.expected(tokens)
    blocks = list(range(-(-len(tokens) // subject.spec.block_size)))
    with subject.bench() as bench:
        for what, bounds in _splits(len(tokens), subject.spec.block_size):
            context = bench.start(tokens, blocks=blocks, slot=0)
            counts = [stop - start for start, stop in pairwise(bounds)]
            logits = bench.compute(context, counts)
            subject.require_equal(logits, expected, f"{len(tokens)} tokens, split {what} into chunks of {counts}")
            bench.backend.release([0])


def check_ragged_batch(subject: Subject) -> None:
    """One step may hold whole prompts, chunks of prompts and single tokens of sequences of any lengths.

    That is every step of a busy engine.
    """
    length, size = subject.length, subject.spec.block_size
    lengths = [1, 5, size + 1, length, length // 2, 2, size, length - 1]
    done = [0, 0, size, length // 3, length // 2 - 1, 1, size // 2, length - 2]
    prompts = [subject.prompt(min(its, length), seed) for seed, its in enumerate(lengths)]
    with subject.bench() as bench:
        contexts = [bench.start(tokens) for tokens in prompts[: subject.case.max_num_seqs]]
        pairs = list(zip(contexts, done, strict=False))
        for context, count in pairs:
            if 0 < count < len(context.tokens):
                bench.step([(context, count)], [])
        work = [(context, len(context.tokens) - context.num_computed) for context in contexts]
        pieces = torch.split(bench.step(work), [count for _, count in work])
    for (context, count), piece in zip(work, pieces, strict=True):
        what = f"{count} of {len(context.tokens)} tokens in a batch with {len(work) - 1} other sequences"
        subject.require_equal(piece, subject.expected(context.tokens)[-count:], what)


def check_many_sequences(subject: Subject) -> None:
    """So many sequences as `max_num_seqs` allows decode together, one token each, at different lengths."""
    number = subject.case.max_num_seqs
    tokens = subject.prompt(min(subject.length, 12))
    expected = subject.expected(tokens, 1)
    with subject.bench() as bench:
        ends = [index % (len(tokens) - 1) + 2 for index in range(number)]
        contexts = [bench.start(tokens[:end], prompt_length=1) for end in ends]
        bench.step([(context, end - 1) for context, end in zip(contexts, ends, strict=True)], [])
        logits = bench.step([(context, 1) for context in contexts])
    wanted = expected[[end - 1 for end in ends]]
    subject.require_equal(logits, wanted, f"{number} sequences that decode one token each")


def check_block_tables(subject: Subject) -> None:
    """A sequence may lie in any blocks in any order, the first and the last of the cache too.

    Blocks are handed out as others give them back.
    """
    tokens = subject.prompt(subject.length)
    expected = subject.expected(tokens)
    with subject.bench() as bench:
        needed = -(-len(tokens) // bench.block_size)
        highest = list(range(bench.num_blocks - needed, bench.num_blocks))
        shuffled = random.Random(2).sample(range(bench.num_blocks), needed)
        for blocks in (list(reversed(range(needed))), list(reversed(highest)), shuffled):
            context = bench.start(tokens, blocks=blocks, slot=0)
            logits = bench.compute(context, [len(tokens) // 2, len(tokens) - len(tokens) // 2 - 1, 1])
            subject.require_equal(logits, expected, f"blocks {blocks} of {bench.num_blocks}")
            bench.backend.release([0])


def check_padded_block_tables(subject: Subject) -> None:
    """Block tables may be wider than any sequence needs: padded with -1, or with blocks for tokens yet to come.

    A request gets blocks for its whole prompt with its first chunk, and the longest table sets the width of the batch.
    """
    tokens = subject.prompt(subject.length)
    expected = subject.expected(tokens, 1)
    half = len(tokens) // 2
    with subject.bench() as bench:
        for width in (1, bench.num_blocks):
            context, short = bench.start(tokens, prompt_length=1), bench.start(tokens[:2], prompt_length=1)
            pieces = [
                bench.step([(context, half), (short, 1)], table_width=width)[:half],
                bench.step([(short, 1), (context, len(tokens) - half)], table_width=width)[1:],
            ]
            what = f"block tables of {-(-len(tokens) // bench.block_size)} and 1 blocks in rows of at least {width}"
            subject.require_equal(torch.cat(pieces), expected, what)
            bench.stop(context, short)


def check_rows_asked_for(subject: Subject) -> None:
    """`forward` returns float32 logits of the rows in `logits_indices`, in their order, and of no others.

    Most steps want the last row of each sequence; a chunk that ends before its prompt wants none: (0, vocab_size).
    """
    length = min(subject.length, 20)
    tokens = subject.prompt(length)
    expected = subject.expected(tokens, 1).repeat(2, 1)
    with subject.bench() as bench:
        for rows in ([], [length - 1], [0, length // 2, length, 2 * length - 1], range(1, 2 * length)):
            pair = [bench.start(tokens, prompt_length=1), bench.start(tokens, prompt_length=1)]
            logits = bench.run(make_batch([(context, length) for context in pair], bench.block_size, list(rows)))
            require(logits.dtype == torch.float32, f"forward returned {logits.dtype}; the engine samples from float32")
            subject.require_equal(logits.detach().cpu(), expected[list(rows)], f"rows {list(rows)} of {2 * length}")
            bench.stop(*pair)


def check_logits_are_kept(subject: Subject) -> None:
    """What `forward` returned is the caller's: the next step leaves it alone.

    The engine may still sample from it while the next step runs.
    """
    with subject.bench() as bench:
        one, other = (bench.start(subject.prompt(4, seed)) for seed in (0, 1))
        logits = bench.run(make_batch([(one, 4)], bench.block_size))
        before = logits.detach().clone()
        bench.step([(other, 4)])
        require(torch.equal(logits, before), "the next step has overwritten the logits of the one before")


def check_inputs(subject: Subject) -> None:
    """The arrays of a batch are int32 on the CPU, may be read-only, and are left as they were."""
    tokens = subject.prompt(4)
    expected = subject.expected(tokens)
    with subject.bench() as bench:
        for is_writeable in (True, False):
            context = bench.start(tokens)
            batch = make_batch([(context, 4)], bench.block_size)
            arrays = {its.name: getattr(batch, its.name) for its in fields(batch) if its.name != "extras"}
            before = {name: array.copy() for name, array in arrays.items()}
            for array in arrays.values():
                array.flags.writeable = is_writeable
            subject.require_equal(bench.run(batch).detach().cpu().float(), expected, "4 tokens")
            for name, array in arrays.items():
                is_same = array.dtype == np.int32 and np.array_equal(array, before[name])
                require(is_same, f"forward has written to batch.{name}; copy what you change")
            bench.stop(context)


def check_no_prompt_lengths(subject: Subject) -> None:
    """`prompt_lengths=None` means that sequences have no generated tokens yet: it stands for `context_lengths`."""
    tokens = subject.prompt(subject.length)
    with subject.bench() as bench:
        batch = make_batch([(bench.start(tokens), len(tokens))], bench.block_size)
        logits = bench.run(replace(batch, prompt_lengths=None)).detach().cpu().float()
    subject.require_equal(logits, subject.expected(tokens), "prompt_lengths=None")


def check_determinism(subject: Subject) -> None:
    """The same steps give the same bits: on a fresh backend, and again on one that ran them before.

    A request with a seed has the same answer tomorrow.
    """
    if not subject.case.is_deterministic:
        raise NotApplicable("the case says is_deterministic=False")
    runs: list[Tensor] = []
    needed = -(-12 // subject.spec.block_size)
    for _ in range(2):
        with subject.bench() as bench:
            blocks = [list(range(index, 2 * needed, 2)) for index in (0, 1)]
            for _ in range(3):
                contexts = [Context(subject.prompt(12, slot), blocks[slot], slot=slot) for slot in (0, 1)]
                runs.append(torch.cat([bench.step([(its, count) for its in contexts]) for count in (7, 4, 1)]))
                bench.backend.release([0, 1])
    for index, run in enumerate(runs[1:], 1):
        what = "on a fresh backend" if index == 3 else f"when run for the {index % 3 + 1}. time"
        require(torch.equal(run, runs[0]), f"the same steps gave other bits {what}; or say is_deterministic=False")


def check_sliding_window(subject: Subject) -> None:
    """With a window of w a token sees itself and the w - 1 before it, decoding and prefilling, past the window's end.

    Where all layers have windows, the last token that all of them together reach can change a logit, and none before.
    """
    widths = [width for width in windows(subject.config) if width is not None]
    if not widths:
        raise NotApplicable("no layer of the model says that it has a sliding window")
    tokens = subject.prompt(subject.length)
    expected = subject.expected(tokens, 1)
    with subject.bench() as bench:
        context = bench.start(tokens, prompt_length=1)
        start = max(1, min(*widths, len(tokens)) - 3)
        logits = bench.compute(context, [start, *[1] * (len(tokens) - start)])
    subject.require_equal(logits, expected, f"decoding across the end of windows of {widths}")
    seen = reach(subject.config)
    if seen is None or seen >= len(tokens) - 1:
        return
    last_seen = len(tokens) - 1 - seen
    unseen = subject.expected(_with_other_tokens(subject, tokens, range(last_seen)), 1)
    subject.require_equal(unseen[-1:], expected[-1:], f"other tokens before all that windows of {widths} let it see")
    if subject.tolerance <= _EXACT:
        other = subject.expected(_with_other_tokens(subject, tokens, [last_seen]), 1)
        is_blind = torch.equal(other[-1], expected[-1])
        require(not is_blind, f"windows of {widths} reach {seen} places back, and the token there changes no logit")


def check_random_schedule(subject: Subject) -> None:
    """All of it at once: a hundred and more random steps of sequences that start, decode, are preempted and end.

    Blocks and slots go from one to the other, rows are asked for at random.
    """
    numbers = random.Random(0)
    prompts = [subject.prompt(length, length) for length in (3, subject.length // 2, subject.length)]
    for tokens in prompts:
        subject.expected(tokens, _prompt_length(tokens))
    running: list[Context] = []
    num_slots = min(5, subject.case.max_num_seqs)
    with subject.bench(num_slots=num_slots) as bench:
        for _ in range(120):
            if len(running) < num_slots and numbers.random() < 0.5:
                tokens = numbers.choice(prompts)
                running.append(bench.start(tokens, prompt_length=_prompt_length(tokens)))
            gone = [its for its in running if its.num_computed == len(its.tokens) or numbers.random() < 0.02]
            if gone:
                bench.stop(*gone)
                running = [its for its in running if all(its is not other for other in gone)]
            chosen = [its for its in running if numbers.random() < 0.8]
            if chosen:
                _random_step(subject, bench, chosen, numbers)


def _prompt_length(tokens: Sequence[int]) -> int:
    return max(1, len(tokens) // 2)


def _random_step(subject: Subject, bench: Bench, contexts: Sequence[Context], numbers: random.Random) -> None:
    left = [len(its.tokens) - its.num_computed for its in contexts]
    counts = [numbers.choice((1, numbers.randint(1, most))) for most in left]
    expected = torch.cat(
        [
            subject.expected(its.tokens, its.prompt_length)[its.num_computed : its.num_computed + count]
            for its, count in zip(contexts, counts, strict=True)
        ]
    )
    rows = sorted(numbers.sample(range(sum(counts)), numbers.randint(0, sum(counts))))
    what = f"rows {rows} of a step of {counts} tokens at {[its.num_computed for its in contexts]}"
    logits = bench.step(list(zip(contexts, counts, strict=True)), rows)
    subject.require_equal(logits, expected[rows], what)


def _splits(length: int, block_size: int) -> Iterator[tuple[str, list[int]]]:
    """Yield bounds of chunks, and where they lie."""
    yield "after the first token", [0, 1, length]
    yield "before the last token", [0, length - 1, length]
    singles = min(length - 1, 40)
    yield "after each of the first tokens", [*range(singles + 1), length]
    for away in (-1, 0, 1):
        borders = {border + away for border in range(block_size, length, block_size)} & set(range(1, length))
        if borders:
            yield f"{away:+d} from the borders of blocks", [0, *sorted(borders), length]
    numbers = random.Random(0)
    for _ in range(3):
        cuts = numbers.sample(range(1, length), min(length - 1, numbers.randint(1, 7)))
        yield "at random", [0, *sorted(cuts), length]


def _with_other_tokens(subject: Subject, tokens: Sequence[int], places: Sequence[int]) -> list[int]:
    changed = list(tokens)
    for place in places:
        changed[place] = (changed[place] + 1) % subject.case.vocab_size
    return changed


def _require_other(subject: Subject, tokens: list[int], changed: list[int], what: str) -> None:
    one, other = subject.expected(tokens)[-1], subject.expected(changed)[-1]
    apart, allowed = float((one - other).abs().max()), subject.allowed(one)
    require(
        apart > _PLAIN_TO_SEE * allowed,
        f"{what} changes the last logits by {apart:.3g}, and {allowed:.3g} is the tolerance: the backend does not look "
        "at its context, or the case's `values` do not let it matter",
    )
