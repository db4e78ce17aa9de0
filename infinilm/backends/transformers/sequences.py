"""Sequences on the model's own cache: one after another, each step as `generate` of transformers would take it.

What a model keeps of a sequence is the model's affair: here it is whatever comes back from one forward and is handed to
the next. How a prompt may be cut is found out by trying (see `trial`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from infinilm.backends.transformers.memory import ModuleMemory
from infinilm_hookspecs import ForwardBatch


class Cut(Enum):
    """How new tokens of a sequence that has some already may be computed."""

    ANYWHERE = "in chunks"
    ONE_BY_ONE = "token by token after the first chunk of a prompt"
    NOWHERE = "with each prompt whole"


@dataclass(slots=True)
class Sequence:
    """What is kept of one sequence: its tokens, how many of them the model has seen, and what the model handed back.

    `memory` is what its modules remember of it.
    """

    token_ids: list[int] = field(default_factory=list)
    num_seen: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    memory: list[Any] | None = None


class Stepper:
    """Takes one sequence of `module` some tokens further."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self._device = device
        accepted = set(inspect.signature(module.forward).parameters)
        self._has_positions = "position_ids" in accepted
        self._has_mask = "attention_mask" in accepted
        self._has_logits_to_keep = "logits_to_keep" in accepted
        self.memory = ModuleMemory(module)

    def learn_memory(self, run: Callable[[], object]) -> None:
        """Find out by a forward what modules remember. Raises `ValueError` where one changes parameters."""
        before = self.memory.watch()
        versions = [parameter._version for parameter in self._module.parameters()]
        run()
        if versions != [parameter._version for parameter in self._module.parameters()]:
            raise ValueError("a forward changes the model's parameters")
        self.memory.learn(before)

    def advance(self, sequence: Sequence, stop: int, num_logits: int) -> Tensor:
        """Compute the tokens up to `stop` and return logits (at most `num_logits`, vocab_size) of the last of them."""
        start = sequence.num_seen
        if not sequence.state:
            sequence.state = self._first_state()
        ids = torch.tensor([sequence.token_ids[:stop]], device=self._device)  # (1, stop)
        options = dict(sequence.state)
        if self._has_mask:
            options["attention_mask"] = None
        if self._has_positions:
            options["position_ids"] = torch.arange(stop, device=self._device)[None]
        self.memory.restore(sequence.memory)
        given = self._module.prepare_inputs_for_generation(
            ids, next_sequence_length=stop - start, is_first_iteration=start == 0, **options
        )
        if self._has_logits_to_keep:
            given["logits_to_keep"] = max(num_logits, 1)  # some put a number of their own there
        outputs = self._module(**given, return_dict=True)
        updated = self._module._update_model_kwargs_for_generation(outputs, dict(options))
        sequence.state = {key: value for key, value in updated.items() if key not in ("attention_mask", "position_ids")}
        sequence.memory = self.memory.save()
        sequence.num_seen = stop
        logits: Tensor = outputs.logits
        if logits.ndim != 3 or logits.shape[0] != 1:
            raise ValueError(f"logits of the shape {list(logits.shape)}, not (1, num_tokens, vocab_size)")
        return logits[0, max(logits.shape[1] - num_logits, 0) :].float()

    def _first_state(self) -> dict[str, Any]:
        """Return what `generate` hands to the first forward: an empty cache, where the model does not bring its own."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import GenerationMode

        state: dict[str, Any] = {"use_cache": True}
        config = GenerationConfig(use_cache=True)  # type: ignore[no-untyped-call]  # transformers'
        self._module._prepare_cache_for_generation(config, state, GenerationMode.GREEDY_SEARCH, 1, 1)
        return state


class Sequences:
    """The sequences of an engine by slot, and how they take a batch. A row of logits has `num_logits`."""

    def __init__(self, stepper: Stepper, cut: Cut, num_logits: int) -> None:
        self._stepper = stepper
        self._cut = cut
        self._num_logits = num_logits
        self._slots: dict[int, Sequence] = {}

    def release(self, slots: Any) -> None:
        """Forget sequences."""
        for slot in slots:
            self._slots.pop(int(slot), None)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one step and return float32 logits (len(logits_indices), vocab_size)."""
        rows: list[Tensor] = []
        prompts = batch.context_lengths if batch.prompt_lengths is None else batch.prompt_lengths
        wanted = batch.logits_indices.tolist()
        for number, (start, stop) in enumerate(pairwise(batch.query_starts.tolist())):
            inside = [row - start for row in wanted if start <= row < stop]
            sequence = self._of(batch, number, start, stop)
            logits = take_chunk(self._stepper, sequence, self._cut, int(prompts[number]), stop - start, inside)
            if logits is not None:
                rows.append(logits)
        if not rows:
            return torch.empty(0, self._num_logits)
        return torch.cat(rows)

    def _of(self, batch: ForwardBatch, number: int, start: int, stop: int) -> Sequence:
        """Return the sequence of a row of the batch, with the tokens of this step at its end."""
        slot, position = int(batch.slots[number]), int(batch.positions[start])
        if position == 0:
            self._slots[slot] = Sequence()
        sequence = self._slots[slot]
        assert len(sequence.token_ids) == position, "a sequence continues where it stopped"
        sequence.token_ids += batch.token_ids[start:stop].tolist()
        return sequence


def take_chunk(
    stepper: Stepper, sequence: Sequence, cut: Cut, prompt_length: int, num_new: int, wanted: list[int]
) -> Tensor | None:
    """Compute the last `num_new` tokens of `sequence`; return the logits of those `wanted`, counted from the first.

    Where a prompt cannot be cut, its tokens wait until all are there, and logits wanted before are computed aside.
    """
    total = len(sequence.token_ids)
    first = total - num_new
    if cut is Cut.NOWHERE and total < prompt_length:
        if not wanted:
            return None
        aside = Sequence(list(sequence.token_ids))
        return _run(stepper, aside, [total], first)[wanted]
    stops = list(_stops(sequence.num_seen, total, prompt_length, cut))
    logits = _run(stepper, sequence, stops, first if wanted else total - 1)
    return logits[wanted] if wanted else None


def _stops(seen: int, total: int, prompt_length: int, cut: Cut) -> Iterator[int]:
    """Yield where the forwards end that take a sequence from `seen` tokens to `total`."""
    if cut is Cut.ANYWHERE or (cut is Cut.ONE_BY_ONE and seen == 0):
        yield total
        return
    whole = min(prompt_length, total) if seen == 0 else seen + 1
    yield from range(whole, total + 1)


def _run(stepper: Stepper, sequence: Sequence, stops: list[int], first: int) -> Tensor:
    """Return logits of the tokens from `first` on."""
    parts = []
    for stop in stops:
        num_logits = stop - max(first, sequence.num_seen)
        logits = stepper.advance(sequence, stop, max(num_logits, 1))
        if num_logits > 0:
            parts.append(logits)
    return torch.cat(parts)


def state_bytes(sequence: Sequence) -> int:
    """Return the bytes of all tensors that are kept of a sequence, each memory counted once."""
    found: dict[int, int] = {}
    _collect([sequence.state, sequence.memory], found, set())
    return sum(found.values())


def _collect(value: Any, found: dict[int, int], visited: set[int]) -> None:
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found, visited)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, found, visited)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | Callable | type):
        _collect(vars(value), found, visited)
