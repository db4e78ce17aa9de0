"""The parameters of a decoder in memory: canonical names on the outside, fused matrices on the inside.

Knows names and shapes, not what is computed with them. A buffer is allocated when the first of its parts is asked for
and keeps its address from then on, also through later updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from infinilm_hookspecs import ParameterSpec, PlanError

# One step then does one matrix product for each of these instead of three and two.
_FUSED: Final[Mapping[str, str]] = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter lies: `num_rows` rows of a buffer, from row `start`."""

    buffer: str
    start: int
    num_rows: int


class Weights:
    """Buffers for `specs` on `device`.

    The parts of a fused matrix, or of its bias, are row ranges of one buffer, in the order of `specs`.
    """

    def __init__(self, specs: Mapping[str, ParameterSpec], device: torch.device) -> None:
        self._specs = specs
        self._device = device
        self._places, self._shapes = _lay_out(specs)
        self._buffers: dict[str, Tensor] = {}
        self._waiting = set(self._places)

    def destination(self, name: str) -> Tensor:
        """Return the buffer of the parameter `name`, or its rows of a fused one."""
        place = self._places[name]
        return self._allocated(place.buffer).narrow(0, place.start, place.num_rows)

    def loaded(self, name: str) -> None:
        """Take note that `name` is full."""
        self._waiting.discard(name)

    def require_all(self) -> None:
        """Raise `PlanError` naming parameters that were never loaded."""
        if self._waiting:
            names = ", ".join(sorted(self._waiting)[:5])
            raise PlanError(f"{len(self._waiting)} of {len(self._places)} parameters were not loaded: {names}, ...")

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

    def _allocated(self, buffer: str) -> Tensor:
        if buffer not in self._buffers:
            shape, dtype = self._shapes[buffer]
            self._buffers[buffer] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._buffers[buffer]


_Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _lay_out(specs: Mapping[str, ParameterSpec]) -> tuple[dict[str, _Place], _Shapes]:
    """Give every parameter that is not tied its place, and return the shapes of the buffers this takes."""
    places: dict[str, _Place] = {}
    shapes: _Shapes = {}
    for name, spec in specs.items():
        if spec.tied_to is not None:
            continue
        buffer = _buffer_name(name)
        num_rows, *columns = spec.shape
        start = shapes[buffer][0][0] if buffer in shapes else 0
        places[name] = _Place(buffer, start, num_rows)
        shapes[buffer] = ((start + num_rows, *columns), getattr(torch, spec.dtype))
    return places, shapes


def _buffer_name(name: str) -> str:
    for part, fused in _FUSED.items():
        for kind in ("weight", "bias"):
            if name.endswith(f".{part}.{kind}"):
                return f"{name.removesuffix(f'{part}.{kind}')}{fused}.{kind}"
    return name
