"""Carrying out a load plan: bytes from the checkpoint into the backend's own buffers, one parameter after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm.loading.values import Reader, evaluate, fill, torch_dtype
from infinilm_hookspecs import Backend, Checkpoint, PlanError, Weight
from infinilm_hookspecs.dtypes import ITEM_SIZES

Progress = Callable[[int], object]
"""Called with the bytes of every parameter that is loaded, in the dtype the backend keeps it in."""


def load(plan: LoadPlan, checkpoint: Checkpoint, backend: Backend, progress: Progress = lambda num_bytes: None) -> None:
    """Fill every parameter of `backend` as `plan` says, and tell the backend of each and of the end.

    Raises `PlanError` before anything is read when the plan has errors, and when two copies of a tied parameter
    differ; `CheckpointError` when the bytes are not where the headers said.
    """
    plan.check()
    read = _reader(checkpoint)
    with torch.inference_mode():
        for parameter in plan.parameters:
            destination = backend.destination(parameter.name)
            _load_parameter(parameter, destination, checkpoint, read)
            backend.loaded(parameter.name)
            progress(parameter.weight.numel() * ITEM_SIZES[parameter.spec.dtype])
        backend.finish_loading()


def _load_parameter(parameter: PlannedParameter, destination: Tensor, checkpoint: Checkpoint, read: Reader) -> None:
    if tuple(destination.shape) != parameter.spec.shape:
        raise PlanError(
            f"the backend's buffer for {parameter.name} is {list(destination.shape)}, and it asked for "
            f"{list(parameter.spec.shape)}"
        )
    if _can_read_in_place(parameter.weight, destination):
        name = parameter.weight.pieces[0].source.name
        checkpoint.read(name, tuple(slice(0, size) for size in parameter.weight.shape), destination)
    else:
        fill(parameter.weight, destination, read)
    for twin in parameter.twins:
        _check_twin(parameter, twin, read)


def _can_read_in_place(weight: Weight, destination: Tensor) -> bool:
    """Return whether the stored bytes are the destination's bytes."""
    piece = weight.pieces[0] if len(weight.pieces) == 1 else None
    return (
        piece is not None
        and piece.axes is None
        and piece.place is None
        and not piece.operations
        and piece.source.deferred is None
        and destination.device.type == "cpu"
        and destination.is_contiguous()
        and destination.dtype == torch_dtype(weight.dtype_name)
    )


def _check_twin(parameter: PlannedParameter, twin: Weight, read: Reader) -> None:
    """Compare a second stored copy of a tied parameter with the one that was loaded."""
    if twin.shape == parameter.weight.shape and torch.equal(evaluate(twin, read), evaluate(parameter.weight, read)):
        return
    raise PlanError(
        f"{parameter.name} and {twin.name} are tied, and their stored copies "
        f"{', '.join(parameter.weight.stored_names())} and {', '.join(twin.stored_names())} differ; "
        "drop the wrong one in a weight rule, or untie them in the config"
    )


def _reader(checkpoint: Checkpoint) -> Reader:
    def read(name: str, region: tuple[slice, ...]) -> Tensor:
        shape = [s.stop - s.start for s in region]
        out = torch.empty(shape, dtype=torch_dtype(checkpoint.tensors[name].dtype))
        checkpoint.read(name, region, out)
        return out

    return read
