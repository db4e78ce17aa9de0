"""The parameters of a decoder in memory: canonical names on the outside, fused matrices on the inside.

Knows names and shapes, not what is computed with them. A buffer is allocated when the first of its parts is asked for
and keeps its address from then on, also through later updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor

from infinilm_hookspecs import ParameterSpec, PlanError

# One step then does one matrix product for each of these instead of three and two. An MLP without a gate has its
# up projection alone there.
_FUSED: Final[Mapping[str, str]] = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class _Place(NamedTuple):
    """Where a parameter lies: `num_rows` rows of a buffer, from row `start`, of one expert's slice where there are."""

    buffer: str
    expert: int | None
    start: int
    num_rows: int


class Weights:
    """Buffers for `specs` on `device`.

    The parts of a fused matrix, or of its bias, are row ranges of one buffer, in the order of `specs`. The same matrix
    of all experts of a layer is one buffer (num_experts, out_features, in_features), called as if there was one expert.
    """

    def __init__(self, specs: Mapping[str, ParameterSpec], device: torch.device) -> None:
        self._specs = specs
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._waiting = {name for name, spec in specs.items() if spec.tied_to is None}

    def destination(self, name: str) -> Tensor:
        """Return the buffer of the parameter `name`, or its rows of a fused one."""
        place = self._layout[0][name]
        buffer = self._allocated(place.buffer)
        if place.expert is not None:
            buffer = buffer[place.expert]
        return buffer.narrow(0, place.start, place.num_rows)

    def loaded(self, name: str) -> None:
        """Take note that `name` is full."""
        self._waiting.discard(name)

    def require_all(self) -> None:
        """Raise `PlanError` naming parameters that were never loaded."""
        if self._waiting:
            names = ", ".join(sorted(self._waiting)[:5])
            num_parameters = sum(spec.tied_to is None for spec in self._specs.values())
            raise PlanError(f"{len(self._waiting)} of {num_parameters} parameters were not loaded: {names}, ...")

    def get(self, name: str) -> Tensor | None:
        """Return a buffer by its name, canonical or fused; `None` where the model has no such parameter."""
        spec = self._specs.get(name)
        return self._buffers.get(name if spec is None or spec.tied_to is None else spec.tied_to)

    def __getitem__(self, name: str) -> Tensor:
        """Return a buffer by its name. Raises `KeyError` where the model has no such parameter."""
        buffer = self.get(name)
        if buffer is None:
            raise KeyError(name)
        return buffer

    def free(self) -> None:
        """Drop every buffer."""
        self._buffers.clear()

    @cached_property
    def _layout(self) -> tuple[dict[str, _Place], _Shapes]:
        """Where every parameter lies, and the shapes of the buffers. Planning does without."""
        return _lay_out(self._specs)

    def _allocated(self, buffer: str) -> Tensor:
        if buffer not in self._buffers:
            shape, dtype = self._layout[1][buffer]
            self._buffers[buffer] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._buffers[buffer]


_Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _lay_out(specs: Mapping[str, ParameterSpec]) -> tuple[dict[str, _Place], _Shapes]:
    """Give every parameter that is not tied its place, and return the shapes of the buffers this takes."""
    places: dict[str, _Place] = {}
    filled: dict[tuple[str, int | None], int] = {}  # rows taken so far of a buffer, or of an expert's slice
    shapes: _Shapes = {}
    for name, spec in specs.items():
        if spec.tied_to is not None:
            continue
        buffer, expert = _buffer_of(name)
        num_rows, *columns = spec.shape
        start = filled.get((buffer, expert), 0)
        places[name] = _Place(buffer, expert, start, num_rows)
        filled[buffer, expert] = start + num_rows
        experts = () if expert is None else (expert + 1,)
        shapes[buffer] = ((*experts, start + num_rows, *columns), getattr(torch, spec.dtype))
    return places, shapes


def _buffer_of(name: str) -> tuple[str, int | None]:
    """Return the buffer a parameter lies in, and its place among the experts if it is one of theirs."""
    path, _, kind = name.rpartition(".")
    owner, _, part = path.rpartition(".")
    experts, _, number = owner.rpartition(".")
    fused = _FUSED.get(part, part)
    if number.isdecimal() and experts.endswith(".experts"):
        return f"{experts}.{fused}.{kind}", int(number)
    return name if fused == part else f"{owner}.{fused}.{kind}", None
