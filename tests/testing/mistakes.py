"""Backends with one mistake each, and the checks that must notice it: the first is there for just that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from conforming import SlotBackend, Wrapped, provider

from infinilm.backends.torch import provide_backend as provide_torch
from infinilm.backends.torch.backend import TorchBackend
from infinilm.testing import DECODERS
from infinilm_hookspecs import (
    Backend,
    BackendRequest,
    CacheSpec,
    DecoderConfig,
    ForwardBatch,
    Named,
    ParameterSpec,
    UnavailableError,
)

# ---------------------------------------------------------------- before anything is loaded


class CopiesItsConfig(Wrapped):
    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.config = replace(inner.config)


class ChangesItsMind(Wrapped):
    asked = 0

    def parameters(self) -> Mapping[str, ParameterSpec]:
        self.asked += 1
        specs = list(super().parameters().items())
        return dict(specs if self.asked % 2 else reversed(specs))


class AllocatesInParameters(Wrapped):
    def parameters(self) -> Mapping[str, ParameterSpec]:
        specs = super().parameters()
        self.hoard = [torch.empty(spec.shape) for spec in specs.values()]
        return specs


class BuildsAndThrowsAway(Wrapped):
    """As who makes the real module to see what parameters it has. A gigabyte shows it, and costs the test little."""

    def parameters(self) -> Mapping[str, ParameterSpec]:
        specs = super().parameters()
        large = max(specs.values(), key=lambda spec: math.prod(spec.shape))
        torch.empty(large.shape).view(-1)[: 1 << 28].zero_()
        return specs


def takes_any_part(request: BackendRequest) -> Backend | None:
    """Run what it knows of a model, and leave out the rest."""
    config = request.lineage[-1]
    known = tuple(layer for layer in config.layers if not _has_unknown_part(layer))
    return provider(Wrapped)(
        replace(request, lineage=(replace(config, layers=known),) if known != config.layers else request.lineage)
    )


def raises_on_an_unknown_part(request: BackendRequest) -> Backend | None:
    for layer in request.lineage[-1].layers:
        if _has_unknown_part(layer):
            raise NotImplementedError(layer)
    return provider(Wrapped)(request)


def overlooks_keys(request: BackendRequest) -> Backend | None:
    """Take every part for the one it derives from."""
    config = request.lineage[-1]
    if any(map(_has_unknown_part, config.layers)):
        return provide_torch(request)
    return TorchBackend(config, dtype=request.dtype, device=request.device, memory=request.platform.memory)


def _has_unknown_part(layer: object) -> bool:
    return isinstance(layer.mixer, Named) or isinstance(layer.mlp, Named)


class CountsBackwards(Wrapped):
    def cache_spec(self) -> CacheSpec:
        return replace(super().cache_spec(), bytes_per_slot=-1)


# ---------------------------------------------------------------- loading


class FreshBuffers(Wrapped):
    """Hands out another buffer every time it is asked, and takes the last one."""

    keeps_parameters = False

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.open: dict[str, torch.Tensor] = {}

    def destination(self, name: str) -> torch.Tensor:
        self.open[name] = torch.full_like(super().destination(name), math.nan)
        return self.open[name]

    def loaded(self, name: str) -> None:
        super().destination(name).copy_(self.open.pop(name))
        super().loaded(name)


class TakesAnyName(Wrapped):
    def destination(self, name: str) -> torch.Tensor:
        return super().destination(name) if name in self.parameters() else torch.empty(0)


class FillsWithZeros(Wrapped):
    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.waiting = {name for name, spec in inner.parameters().items() if spec.tied_to is None}

    def loaded(self, name: str) -> None:
        self.waiting.discard(name)
        super().loaded(name)

    def finish_loading(self) -> None:
        for name in sorted(self.waiting):
            self.destination(name).zero_()
            self.loaded(name)
        super().finish_loading()


class LoadsByTurns(Wrapped):
    """Gives the norm it is asked for first the place of the first norm."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.places = [name for name in inner.parameters() if "layernorm" in name]
        self.turns: dict[str, str] = {}

    def destination(self, name: str) -> torch.Tensor:
        if name in self.places and name not in self.turns:
            self.turns[name] = self.places[len(self.turns)]
        return super().destination(self.turns.get(name, name))


class FinishesOnce(Wrapped):
    """Does not derive again what it derived from the first parameters: weights of norms with an offset, in torch."""

    is_finished = False

    def finish_loading(self) -> None:
        if not self.is_finished:
            super().finish_loading()
        self.is_finished = True


class MovesItsBuffers(Wrapped):
    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.held: dict[str, torch.Tensor] = {}

    def destination(self, name: str) -> torch.Tensor:
        if name not in self.held:
            self.held[name] = torch.empty_like(super().destination(name))
        return self.held[name]

    def loaded(self, name: str) -> None:
        super().destination(name).copy_(self.held[name])
        super().loaded(name)

    def finish_loading(self) -> None:
        self.held = {name: buffer.clone() for name, buffer in self.held.items()}
        super().finish_loading()


class SharesItsState(SlotBackend):
    everybodys: ClassVar[dict[int, list[int]]] = {}

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.tokens = self.everybodys


class ClosesOnce(Wrapped):
    is_closed = False

    def close(self) -> None:
        if self.is_closed:
            raise RuntimeError("closed already")
        self.is_closed = True
        super().close()


# ---------------------------------------------------------------- steps


class ForgetsTheContext(Wrapped):
    """Knows what follows a token, whatever came before it."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.values: dict[str, torch.Tensor] = {}

    def loaded(self, name: str) -> None:
        self.values[name] = self.destination(name).clone()
        super().loaded(name)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        tokens = torch.from_numpy(batch.token_ids[batch.logits_indices].astype(np.int64))
        return self.values["model.embed_tokens.weight"][tokens] @ self.values["lm_head.weight"].T


class IgnoresPositions(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return super().forward(replace(batch, positions=np.zeros_like(batch.positions)))


class ScalesItsLogits(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return super().forward(batch) * 1.01


class OffByOneChunk(Wrapped):
    """Takes a chunk that starts at position 1 for one that starts at 0."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        counts = np.diff(batch.query_starts)
        starts_at_one = (batch.context_lengths - counts == 1) & (counts > 1)
        return super().forward(replace(batch, context_lengths=batch.context_lengths - starts_at_one))


class StopsAtBlockZero(Wrapped):
    """Takes block 0 for padding anywhere but in front."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        tables = batch.block_tables.copy()
        tables[:, 1:][tables[:, 1:] == 0] = -1
        return super().forward(replace(batch, block_tables=tables))


class TakesItsWidthFromTheTable(Wrapped):
    """Thinks that the longest sequence fills its row."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        tables = batch.block_tables
        while (tables[:, -1] == -1).all():
            tables = np.roll(tables, 1, axis=1)
        return super().forward(replace(batch, block_tables=tables))


class MixesUpDecodes(Wrapped):
    """Returns the decodes of a mixed batch in the order in which they are run: backwards."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        logits = super().forward(batch).clone()
        counts = np.diff(batch.query_starts)
        decodes = np.flatnonzero(np.isin(batch.logits_indices, batch.query_starts[:-1][counts == 1]))
        if (counts > 1).any():
            logits[decodes] = logits[decodes[::-1].copy()]
        return logits


class StopsAt32(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        logits = super().forward(batch).clone()
        logits[np.searchsorted(batch.query_starts, batch.logits_indices, "right") > 32] = 0
        return logits


class IgnoresRows(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return super().forward(replace(batch, logits_indices=np.arange(len(batch.token_ids), dtype=np.int32)))


class ReturnsDoubles(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return super().forward(batch).double()


class SharesItsResult(Wrapped):
    result = None

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        logits = super().forward(batch)
        self.result = torch.empty(8192, logits.shape[1]) if self.result is None else self.result
        self.result[: len(logits)] = logits
        return self.result[: len(logits)]


class WritesToItsInputs(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        logits = super().forward(batch)
        np.subtract(batch.context_lengths, 1, out=batch.context_lengths)
        return logits


class WritesWhatIsReadOnly(Wrapped):
    """As native code can, which gets an address and no flags."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        logits = super().forward(batch)
        if not batch.slots.flags.writeable:
            batch.slots.flags.writeable = True
            batch.slots[:] += 1
        return logits


class WantsPromptLengths(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        assert batch.prompt_lengths.max() > 0
        return super().forward(batch)


class NeverTheSame(Wrapped):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        logits = super().forward(batch)
        return logits + 1e-6 * torch.rand_like(logits)


def _with_windows(config: DecoderConfig, wider: int) -> DecoderConfig:
    mixers = [replace(layer.mixer, sliding_window=layer.mixer.sliding_window + wider) for layer in config.layers]
    layers = zip(config.layers, mixers, strict=True)
    return replace(config, layers=tuple(replace(layer, mixer=mixer) for layer, mixer in layers))


class WindowTooWide(Wrapped):
    wider = 1

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.inner = TorchBackend(_with_windows(inner.config, self.wider), dtype="float32", device="cpu")

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        if num_blocks > 1 << 20:
            raise UnavailableError(f"{num_blocks} blocks")
        super().allocate_cache(num_blocks, num_slots)


class WindowTooNarrow(WindowTooWide):
    wider = -1


class WindowTooWideForDecodes(WindowTooWide):
    """Runs every step twice, and returns what single tokens would see with wider windows."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.right = inner

    def loaded(self, name: str) -> None:
        self.right.destination(name).copy_(self.destination(name))
        self.right.loaded(name)
        super().loaded(name)

    def finish_loading(self) -> None:
        self.right.finish_loading()
        super().finish_loading()

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        super().allocate_cache(num_blocks, num_slots)
        self.right.allocate_cache(num_blocks, num_slots)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.right.copy_blocks(pairs)
        super().copy_blocks(pairs)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        wide, right = super().forward(batch), self.right.forward(batch)
        return right if (np.diff(batch.query_starts) > 1).any() else wide


class Drifts(Wrapped):
    """Goes wrong after a while."""

    steps = 0

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self.steps += 1
        return super().forward(batch) * (1.01 if self.steps > 85 else 1)


# ---------------------------------------------------------------- slots and blocks


class SharesWhatDependsOnPrompts(Wrapped):
    """Keys of this model depend on the length of their prompt, and it says that anybody may have them."""

    def cache_spec(self) -> CacheSpec:
        return replace(super().cache_spec(), shareable=True)


class RemembersLengths(Wrapped):
    """Keeps the longest prompt of every slot, whoever holds it."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.lengths: dict[int, int] = {}

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        given = batch.context_lengths if batch.prompt_lengths is None else batch.prompt_lengths
        for slot, length in zip(batch.slots.tolist(), given.tolist(), strict=True):
            self.lengths[slot] = max(self.lengths.get(slot, 0), length)
        lengths = np.array([self.lengths[slot] for slot in batch.slots.tolist()], np.int32)
        return super().forward(replace(batch, prompt_lengths=lengths))


class ForgetsRelease(SlotBackend):
    def release(self, slots: Sequence[int]) -> None:
        pass


class MultipliesPaddingByZero(Wrapped):
    """Adds nothing of whatever lies behind the end of a sequence in its last block."""

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        super().allocate_cache(num_blocks, num_slots)
        self.cached = torch.zeros(num_blocks * self.cache_spec().block_size)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        every = np.arange(len(batch.token_ids), dtype=np.int32)
        logits = super().forward(replace(batch, logits_indices=every))
        self.cached[batch.slot_mapping.tolist()] = logits.sum(-1)
        ends = batch.slot_mapping[batch.query_starts[1:] - 1].tolist()
        size = self.cache_spec().block_size
        behind = [float(self.cached[end + 1 : -(-(end + 1) // size) * size].sum()) for end in ends]
        padding = torch.tensor(behind).repeat_interleave(torch.from_numpy(np.diff(batch.query_starts)))
        return (logits + 0 * padding[:, None])[batch.logits_indices.tolist()]


class ReleasesEverything(Wrapped):
    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        super().allocate_cache(num_blocks, num_slots)
        self.size = num_blocks, num_slots

    def release(self, slots: Sequence[int]) -> None:
        super().allocate_cache(*self.size)


class ReleasesWhatItKnows(Wrapped):
    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.slots: set[int] = set()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self.slots.update(batch.slots.tolist())
        return super().forward(batch)

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.slots.remove(slot)


class TakesItAllForPrompt(Wrapped):
    """Takes every token of a chunk for one of the prompt, as it was when the sequence first came."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        if batch.prompt_lengths is None:
            return super().forward(batch)
        counts = np.diff(batch.query_starts)
        is_beyond = (counts > 1) & (batch.context_lengths > batch.prompt_lengths)
        lengths = np.where(is_beyond, batch.context_lengths, batch.prompt_lengths)
        return super().forward(replace(batch, prompt_lengths=lengths))


class StartsAtZero(Wrapped):
    """Takes a sequence that it has not met for one without a context."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.slots: set[int] = set()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        is_met = np.isin(batch.slots, list(self.slots))
        self.slots.update(batch.slots.tolist())
        lengths = np.where(is_met, batch.context_lengths, np.diff(batch.query_starts))
        return super().forward(replace(batch, context_lengths=lengths))

    def release(self, slots: Sequence[int]) -> None:
        self.slots.difference_update(slots)


class CopiesByName(Wrapped):
    """Gives the original another name instead of copying it."""

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        super().allocate_cache(num_blocks, num_slots)
        self.names = np.arange(num_blocks, dtype=np.int32)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        names = self.names.copy()
        for source, target in pairs:
            self.names[target] = names[source]

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        size = self.cache_spec().block_size
        return super().forward(
            replace(
                batch,
                block_tables=np.where(batch.block_tables < 0, -1, self.names[batch.block_tables]),
                slot_mapping=self.names[batch.slot_mapping // size] * size + batch.slot_mapping % size,
            )
        )


class CopiesOneAfterTheOther(Wrapped):
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for pair in pairs:
            super().copy_blocks([pair])


class RunsOutOfMemory(Wrapped):
    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        try:
            super().allocate_cache(num_blocks, num_slots)
        except UnavailableError as err:
            raise MemoryError(str(err)) from err


class NeverRefuses(Wrapped):
    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        super().allocate_cache(min(num_blocks, 1000), num_slots)


class SaysNoMore(Wrapped):
    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        try:
            super().allocate_cache(num_blocks, num_slots)
        except UnavailableError as err:
            raise UnavailableError("out of memory") from err


# ---------------------------------------------------------------- who notices


@dataclass(frozen=True)
class Mistake:
    """A backend or a hook with a mistake, all checks that fail on it, and the model that shows it."""

    culprit: type[Wrapped] | Callable[[BackendRequest], Backend | None]
    noticed_by: tuple[str, ...]
    decoder: str = "dense"

    def provide(self, request: BackendRequest) -> Backend | None:
        hook = provider(self.culprit) if isinstance(self.culprit, type) else self.culprit
        return hook(request)


MODELS = {**DECODERS, "shallow": replace(DECODERS["dense"], layers=DECODERS["dense"].layers[:1])}

WANTING_NO_ROWS = (
    "ragged_batch",
    "many_sequences",
    "stale_values",
    "release_spares_others",
    "preemption",
    "shared_prefix",
    "copy_blocks",
    "copies_at_once",
)
RELEASING = (
    "any_chunks",
    "block_tables",
    "padded_block_tables",
    "rows_asked_for",
    "inputs",
    "determinism",
    "stale_values",
    "second_load",
)
DECODING_FAR = ("any_chunks", "block_tables", "slots_are_reused", "stale_values", "preemption")
WITH_A_SHORT_PROMPT = ("padded_block_tables", "stale_values")

MISTAKES = [
    Mistake(CopiesItsConfig, ("identity",)),
    Mistake(ChangesItsMind, ("parameters",)),
    Mistake(AllocatesInParameters, ("parameters_allocate_nothing",)),
    Mistake(BuildsAndThrowsAway, ("parameters_allocate_nothing",)),
    Mistake(takes_any_part, ("unknown_parts",)),
    Mistake(raises_on_an_unknown_part, ("unknown_parts",)),
    Mistake(overlooks_keys, ("unknown_keys",)),
    Mistake(CountsBackwards, ("cache_spec",)),
    Mistake(FreshBuffers, ("destinations",)),
    Mistake(TakesAnyName, ("unknown_parameter",)),
    Mistake(FillsWithZeros, ("missing_parameter",)),
    Mistake(LoadsByTurns, ("load_order",)),
    Mistake(FinishesOnce, ("second_load",), "sliding_window"),
    Mistake(MovesItsBuffers, ("kept_parameters",)),
    Mistake(SharesItsState, ("independence",)),
    Mistake(ClosesOnce, ("close",)),
    Mistake(ForgetsTheContext, ("context_matters", "order_matters", "reference")),
    Mistake(IgnoresPositions, ("order_matters", "reference"), "shallow"),
    Mistake(ScalesItsLogits, ("reference",)),
    Mistake(OffByOneChunk, ("any_chunks",)),
    Mistake(StopsAtBlockZero, ("block_tables",)),
    Mistake(TakesItsWidthFromTheTable, ("padded_block_tables",)),
    Mistake(MixesUpDecodes, ("ragged_batch",)),
    Mistake(StopsAt32, ("many_sequences",)),
    Mistake(IgnoresRows, ("rows_asked_for", *WANTING_NO_ROWS)),
    Mistake(ReturnsDoubles, ("rows_asked_for",)),
    Mistake(SharesItsResult, ("logits_are_kept",)),
    Mistake(WritesToItsInputs, ("inputs",)),
    Mistake(WritesWhatIsReadOnly, ("inputs",)),
    Mistake(WantsPromptLengths, ("no_prompt_lengths",)),
    Mistake(NeverTheSame, ("determinism",)),
    Mistake(WindowTooWide, ("sliding_window", "reference"), "sliding_window"),
    Mistake(WindowTooNarrow, ("sliding_window", "reference"), "sliding_window"),
    Mistake(WindowTooWideForDecodes, ("sliding_window", *DECODING_FAR), "sliding_window"),
    Mistake(Drifts, ("random_schedule",)),
    Mistake(RemembersLengths, ("slots_are_reused", "stale_values"), "dynamic_rope"),
    Mistake(ForgetsRelease, ("slots_are_reused", *RELEASING)),
    Mistake(MultipliesPaddingByZero, ("stale_values",)),
    Mistake(ReleasesEverything, ("release_spares_others", "shared_prefix")),
    Mistake(ReleasesWhatItKnows, ("release_of_unused_slots",)),
    Mistake(TakesItAllForPrompt, ("preemption", *WITH_A_SHORT_PROMPT), "dynamic_rope"),
    Mistake(StartsAtZero, ("shared_prefix", "copy_blocks")),
    Mistake(SharesWhatDependsOnPrompts, ("shared_prefix",), "dynamic_rope"),
    Mistake(CopiesByName, ("copy_blocks",)),
    Mistake(CopiesOneAfterTheOther, ("copies_at_once",)),
    Mistake(RunsOutOfMemory, ("allocation_refused",)),
    Mistake(NeverRefuses, ("allocation_refused",)),
    Mistake(SaysNoMore, ("allocation_refused",)),
]
