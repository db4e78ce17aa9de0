"""Carrying out a load plan: bytes from the checkpoint into the backend's own buffers, one parameter after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm.loading.stages import RuleNote
from infinilm.loading.values import Reader, Steps, fill, torch_dtype
from infinilm_hookspecs import Backend, Checkpoint, CheckpointError, PlanError, Weight
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
    steps = Steps(weight for parameter in plan.parameters for weight in (parameter.weight, *parameter.twins))
    with torch.no_grad():
        for parameter in plan.parameters:
            destination = backend.destination(parameter.name)
            _check_buffer(parameter, destination)
            if _can_read_in_place(parameter.weight, destination):
                name = parameter.weight.pieces[0].source.name
                checkpoint.read(name, tuple(slice(0, size) for size in parameter.weight.shape), destination.detach())
            else:
                _fill(parameter.weight, destination, read, steps)
            for twin in parameter.twins:
                _check_twin(parameter, twin, destination, read, steps)
            backend.loaded(parameter.name)
            progress(parameter.weight.numel() * ITEM_SIZES[parameter.spec.dtype])
        backend.finish_loading()


def _check_buffer(parameter: PlannedParameter, buffer: Tensor) -> None:
    found = f"{list(buffer.shape)} {str(buffer.dtype).removeprefix('torch.')}"
    wanted = f"{list(parameter.spec.shape)} {parameter.spec.dtype}"
    if found != wanted:
        raise PlanError(f"the backend's buffer for {parameter.name} is {found}, and it asked for {wanted}")


def _fill(weight: Weight, buffer: Tensor, read: Reader, steps: Steps) -> None:
    """Fill `buffer`; an exception inside a deferred step gains a note saying whose it is."""
    try:
        fill(weight, buffer, read, steps)
    except CheckpointError:
        raise
    except Exception as err:
        if any(piece.source.deferred is not None for piece in weight.pieces):
            err.add_note(RuleNote(f"while loading {weight.name} from {weight.origin()}"))
        raise


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


def _check_twin(parameter: PlannedParameter, twin: Weight, loaded: Tensor, read: Reader, steps: Steps) -> None:
    """Compare a second stored copy of a tied parameter with the one that was loaded, bit for bit as it is kept."""
    copy = torch.empty(loaded.shape, dtype=loaded.dtype)
    _fill(twin, copy, read, steps)
    if torch.equal(copy.reshape(-1).view(torch.uint8), loaded.cpu().reshape(-1).view(torch.uint8)):
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
