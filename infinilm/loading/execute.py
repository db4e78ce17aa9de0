"""Carrying out a load plan: bytes from the checkpoint into the backend's own buffers, by several threads.

Each parameter is cut into chunks that are read, converted and copied independently; where the stored bytes are the
buffer's bytes they are read straight into it. At most a fixed number of bytes is between storage and buffers, and at
most as many wait in buffers that are not full: four chunks for each thread, with which none waits for another.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from infinilm.loading.chunks import cut_chunks, in_place_region
from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm.loading.stages import RuleNote
from infinilm.loading.values import Reader, Steps, fill, torch_dtype
from infinilm_hookspecs import Backend, Checkpoint, CheckpointError, PlanError, Weight
from infinilm_hookspecs.dtypes import ITEM_SIZES
from infinilm_hookspecs.strided import StridedTensor

Progress = Callable[[int], object]
"""Called with the bytes that were loaded since the last call, in the dtypes the backend keeps them in."""

BYTE_BUDGET = 128 * 2**20  # at most, in buffers that are open, and once more between storage and buffers
_MAX_THREADS = 8
CHUNK_BYTES = 8 * 2**20  # at most, of a chunk: larger ones are no faster, and the allocator gives them back late


@dataclass(slots=True)
class _Open:
    """A parameter whose chunks are being read."""

    parameter: PlannedParameter
    buffer: Tensor
    chunks: list[Future[int]]


def load(plan: LoadPlan, checkpoint: Checkpoint, backend: Backend, progress: Progress = lambda num_bytes: None) -> None:
    """Fill every parameter of `backend` as `plan` says, and tell the backend of each and of the end.

    Raises `PlanError` before anything is read when the plan has errors, and when two copies of a tied parameter
    differ; `CheckpointError` when the bytes are not where the headers said. Whatever is raised, no thread is left.
    """
    plan.check()
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="infinilm-load")
    try:
        with torch.no_grad():
            _Loader(plan, checkpoint, backend, progress, pool, num_threads).run()
            backend.finish_loading()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Loader:
    """One load: which parameters are open, and what is read for them."""

    def __init__(
        self,
        plan: LoadPlan,
        checkpoint: Checkpoint,
        backend: Backend,
        progress: Progress,
        pool: ThreadPoolExecutor,
        num_threads: int,
    ) -> None:
        self._parameters = plan.parameters
        self._checkpoint = checkpoint
        self._backend = backend
        self._progress = progress
        self._pool = pool
        # A chunk is there as it was read, and once more as it was converted.
        self._chunk_bytes = min(CHUNK_BYTES, BYTE_BUDGET // (2 * num_threads))
        self._open_bytes = min(4 * num_threads * CHUNK_BYTES, BYTE_BUDGET)
        self._steps = Steps(weight for parameter in plan.parameters for weight in (parameter.weight, *parameter.twins))

    def run(self) -> None:
        """Open parameters in order, as far as the budget goes, and finish them in the same order."""
        waiting: deque[_Open] = deque()
        num_open = 0
        for parameter in self._parameters:
            size = _num_bytes(parameter.weight, parameter.spec.dtype)
            while waiting and num_open + size > self._open_bytes:
                num_open -= self._finish(waiting.popleft())
            waiting.append(self._open(parameter))
            num_open += size
        while waiting:
            self._finish(waiting.popleft())

    def _open(self, parameter: PlannedParameter) -> _Open:
        buffer = self._backend.destination(parameter.name).detach()
        _check_buffer(parameter, buffer)
        if _has_steps(parameter.weight):
            return _Open(parameter, buffer, [])  # a step is for whole tensors: no more than one at a time
        chunks = cut_chunks(parameter.weight, buffer, self._chunk_bytes)
        return _Open(parameter, buffer, [self._pool.submit(self._fill, part, target) for part, target in chunks])

    def _finish(self, opened: _Open) -> int:
        """Wait until a parameter is full, say so, and return its bytes."""
        size = _num_bytes(opened.parameter.weight, opened.parameter.spec.dtype)
        for chunk in opened.chunks:
            self._progress(chunk.result())
        if _has_steps(opened.parameter.weight):
            self._fill_by_steps(opened.parameter.weight, opened.buffer)
            self._progress(size)
        for twin in opened.parameter.twins:
            self._check_twin(opened.parameter, twin, opened.buffer)
        self._backend.loaded(opened.parameter.name)
        return size

    def _fill(self, weight: StridedTensor, buffer: Tensor) -> int:
        """Fill one chunk, in a thread of the pool, and return its bytes."""
        region = in_place_region(weight, buffer)
        if region is not None:
            shape = [s.stop - s.start for s in region]
            self._checkpoint.read(weight.pieces[0].source.name, region, buffer.view(shape))
        else:
            fill(weight, buffer, self._read)
        return buffer.numel() * buffer.element_size()

    def _fill_by_steps(self, weight: Weight, buffer: Tensor) -> None:
        """Fill a buffer through deferred steps; an exception in one gains a note saying whose it is."""
        try:
            fill(weight, buffer, self._read, self._steps)
        except CheckpointError:
            raise
        except Exception as err:
            err.add_note(RuleNote(f"while loading {weight.name} from {weight.origin()}"))
            raise

    def _check_twin(self, parameter: PlannedParameter, twin: Weight, loaded: Tensor) -> None:
        """Compare a second stored copy of a tied parameter with the one that was loaded, bit for bit as it is kept."""
        copy = torch.empty(loaded.shape, dtype=loaded.dtype)
        self._fill_by_steps(twin, copy)
        if torch.equal(copy.reshape(-1).view(torch.uint8), loaded.cpu().reshape(-1).view(torch.uint8)):
            return
        raise PlanError(
            f"{parameter.name} and {twin.name} are tied, and their stored copies "
            f"{', '.join(parameter.weight.stored_names())} and {', '.join(twin.stored_names())} differ; "
            "drop the wrong one in a weight rule, or untie them in the config"
        )

    @property
    def _read(self) -> Reader:
        def read(name: str, region: tuple[slice, ...]) -> Tensor:
            shape = [s.stop - s.start for s in region]
            out = torch.empty(shape, dtype=torch_dtype(self._checkpoint.tensors[name].dtype))
            self._checkpoint.read(name, region, out)
            return out

        return read


def _has_steps(weight: Weight) -> bool:
    """Return whether a weight comes from a step that needs whole tensors, not blocks of them."""
    steps = (piece.source.deferred for piece in weight.pieces)
    return any(step is not None and step.parts is None for step in steps)


def _num_bytes(weight: Weight, dtype: str) -> int:
    return weight.num_elements * ITEM_SIZES[dtype]


def _check_buffer(parameter: PlannedParameter, buffer: Tensor) -> None:
    found = f"{list(buffer.shape)} {str(buffer.dtype).removeprefix('torch.')}"
    wanted = f"{list(parameter.spec.shape)} {parameter.spec.dtype}"
    if found != wanted:
        raise PlanError(f"the backend's buffer for {parameter.name} is {found}, and it asked for {wanted}")
