"""`Subject`: the backend under test, made, loaded and run as the checks want it, and the logits it is held to.

The oracle is the backend itself in the plainest way there is: a fresh one, one sequence, the whole prompt in one chunk,
blocks in order, slot 0, all rows. That this is right is for a reference to say.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from infinilm.testing.backend_case import TOLERANCES, BackendCase
from infinilm.testing.decoders import windows
from infinilm.testing.driver import Context, Work, advance, make_batch
from infinilm.testing.verdicts import ConformanceError, NotApplicable, require
from infinilm_hookspecs import Backend, CacheSpec, Config, DecoderConfig, ForwardBatch, ParameterSpec


def random_values(name: str, spec: ParameterSpec, seed: int) -> Tensor:
    """Return what a parameter is filled with: random numbers that keep activations near one, its own for every name.

    Vectors are near one where they multiply and near zero where they are added, going by their name.
    """
    dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        raise ConformanceError(
            f"parameter {name!r} is {spec.dtype!r}, which random numbers cannot fill; give the case `values`"
        )
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    numbers = torch.randn(spec.shape, generator=generator)
    if len(spec.shape) < 2:
        return numbers.mul_(0.25).add_(0.0 if name.endswith("bias") else 1.0).to(dtype)
    return numbers.mul_(2 / math.prod(spec.shape[1:]) ** 0.5).to(dtype)


class Bench:
    """A loaded backend with a cache, and who holds which block and slot of it.

    Blocks and slots are handed out in an order that is random and always the same.
    """

    def __init__(self, subject: Subject, backend: Backend, num_blocks: int, num_slots: int) -> None:
        self.backend = backend
        self.num_blocks = num_blocks
        self.block_size = subject.spec.block_size
        self._vocab_size = subject.case.vocab_size
        self._blocks = random.Random(0).sample(range(num_blocks), num_blocks)
        self._slots = random.Random(1).sample(range(num_slots), num_slots)

    def start(
        self,
        tokens: list[int],
        *,
        prompt_length: int | None = None,
        blocks: list[int] | None = None,
        slot: int | None = None,
    ) -> Context:
        """Return a sequence with blocks for all its tokens and a slot, those given or free ones."""
        needed = -(-len(tokens) // self.block_size)
        taken = [self._blocks.pop() for _ in range(needed)] if blocks is None else blocks
        return Context(tokens, taken, prompt_length, self._slots.pop() if slot is None else slot)

    def step(self, work: Work, rows: Sequence[int] | None = None, *, table_width: int = 0) -> Tensor:
        """Run one step and return a float32 copy of its logits on the CPU. By default all rows' are wanted."""
        logits = self.run(make_batch(work, self.block_size, rows, table_width=table_width))
        advance(work)
        return logits.detach().to("cpu", torch.float32, copy=True)

    def run(self, batch: ForwardBatch) -> Tensor:
        """Run `batch` and return the backend's own result, once its shape is what was asked for."""
        logits = self.backend.forward(batch)
        wanted = (len(batch.logits_indices), self._vocab_size)
        require(
            isinstance(logits, Tensor) and tuple(logits.shape) == wanted,
            f"forward returned {_shown(logits)}, and a tensor of shape {wanted}, (len(logits_indices), vocab_size), "
            "was asked for",
        )
        return logits

    def compute(self, context: Context, counts: Iterable[int]) -> Tensor:
        """Run so many tokens of one sequence in one step after the other, and return all their logits."""
        return torch.cat([self.step([(context, count)]) for count in counts])

    def stop(self, *contexts: Context) -> None:
        """Release sequences: their slots and blocks are free for others."""
        self.backend.release([context.slot for context in contexts])
        for context in contexts:
            self._slots.append(context.slot)
            self._blocks += context.blocks


class Subject:
    """A case, and what its checks share: logits that were computed once, and sizes that suit the backend."""

    def __init__(self, case: BackendCase) -> None:
        self.case = case
        self._expected: dict[tuple[int, tuple[int, ...], int | None], Tensor] = {}

    @cached_property
    def spec(self) -> CacheSpec:
        """What a loaded backend says of its cache."""
        with self.loaded() as backend:
            return backend.cache_spec()

    @cached_property
    def config(self) -> Config | DecoderConfig:
        """The config the backend took."""
        with self.made() as backend:
            return backend.config

    @cached_property
    def length(self) -> int:
        """How long a long sequence is: several blocks, and more than two windows, if the model can."""
        widest = max((width for width in windows(self.config) if width is not None), default=0)
        return min(self.case.max_length, max(3 * self.spec.block_size + 5, 2 * widest + 7, 48))

    @property
    def tolerance(self) -> float:
        """How far apart logits may be, as a share of the largest."""
        if self.case.tolerance is not None:
            return self.case.tolerance
        if self.case.dtype not in TOLERANCES:
            raise ConformanceError(f"dtype {self.case.dtype!r} has no tolerance of its own; give the case one")
        return TOLERANCES[self.case.dtype]

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Return so many random token ids. Prompts of one seed begin alike."""
        numbers = random.Random(seed)
        return [numbers.randrange(self.case.vocab_size) for _ in range(length)]

    def values(self, specs: Mapping[str, ParameterSpec], seed: int = 0) -> dict[str, Tensor]:
        """Return what the parameters that are not tied to others are filled with."""
        fill = self.case.values or random_values
        return {name: fill(name, spec, seed) for name, spec in specs.items() if spec.tied_to is None}

    @contextmanager
    def made(self) -> Iterator[Backend]:
        """Make a backend, and close it in the end."""
        backend = self.case.make()
        try:
            yield backend
        finally:
            backend.close()

    @contextmanager
    def loaded(self, seed: int = 0) -> Iterator[Backend]:
        """Make and load a backend, and close it in the end."""
        with self.made() as backend:
            load(backend, self.values(backend.parameters(), seed))
            yield backend

    @contextmanager
    def bench(self, *, seed: int = 0, num_blocks: int = 0, num_slots: int = 0) -> Iterator[Bench]:
        """Make, load and run a backend, with a cache for what checks run at once unless they say how large."""
        with self.loaded(seed) as backend:
            yield self.allocated(backend, num_blocks, num_slots)

    def allocated(self, backend: Backend, num_blocks: int = 0, num_slots: int = 0) -> Bench:
        """Allocate the cache of a loaded backend."""
        per_sequence = -(-self.length // self.spec.block_size)
        num_slots = num_slots or self.case.max_num_seqs
        num_blocks = num_blocks or 12 * per_sequence + num_slots
        backend.allocate_cache(num_blocks, num_slots)
        return Bench(self, backend, num_blocks, num_slots)

    def expected(self, tokens: Sequence[int], prompt_length: int | None = None, *, seed: int = 0) -> Tensor:
        """Return the logits (len(tokens), vocab_size) that a fresh backend computes in the plainest way."""
        key = (seed, tuple(tokens), prompt_length)
        if key not in self._expected:
            blocks = list(range(-(-len(tokens) // self.spec.block_size)))
            with self.bench(seed=seed, num_blocks=len(blocks), num_slots=1) as bench:
                context = Context(list(tokens), blocks, prompt_length)
                self._expected[key] = bench.step([(context, len(tokens))])
        return self._expected[key]

    def allowed(self, expected: Tensor) -> float:
        """Return how far logits may be from those expected."""
        return self.tolerance * float(expected.abs().max())

    def require_equal(self, logits: Tensor, expected: Tensor, what: str, *, share: float = 1.0) -> None:
        """Raise `ConformanceError` where `logits`, which `what` says, are not those expected.

        They may be apart by `share` of the tolerance.
        """
        if not len(expected):
            return
        apart = (logits - expected).abs().amax(-1)  # (num_rows,)
        worst, allowed = float(apart.max()), share * self.allowed(expected)
        if worst <= allowed:
            return
        row = int(apart.nan_to_num(math.inf).argmax())
        raise ConformanceError(
            f"{what}: logits are off by {worst:.3g} in row {row} of {len(expected)}, and {allowed:.3g} is allowed; "
            "expected is what the same tokens give alone, in one chunk, in blocks in order"
        )

    def require_shareable(self) -> None:
        """Raise `NotApplicable` where blocks are not shared between sequences."""
        if not self.spec.shareable:
            raise NotApplicable("cache_spec() says shareable=False: the engine never shares or copies its blocks")


def load(backend: Backend, values: Mapping[str, Tensor]) -> None:
    """Fill parameters in the order of `values`, one after the other."""
    for name, value in values.items():
        backend.destination(name).detach().copy_(value)
        backend.loaded(name)
    backend.finish_loading()


def _shown(logits: object) -> str:
    shape = getattr(logits, "shape", None)
    return repr(logits)[:80] if shape is None else f"a {type(logits).__name__} of shape {tuple(shape)}"
