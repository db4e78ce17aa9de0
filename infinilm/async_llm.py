"""`AsyncLLM`: one LLM for many tasks of an event loop. A thread of its own steps the engine."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from infinilm.engine.admission import Prepared
from infinilm.engine.request import Failure
from infinilm.engine.stats import EngineStats
from infinilm.llm import LLM, Prompt
from infinilm.outputs import CompletionOutput, RequestOutput, merge_deltas
from infinilm.sampling_params import RequestOutputKind, SamplingParams
from infinilm_hookspecs import RequestError, UnavailableError

_log = logging.getLogger("infinilm")

_MAX_FAILED_STEPS = 3
_NUM_TOKENIZING_THREADS = 2
_NUM_COMPILING_THREADS = 2

_Result = TypeVar("_Result")


class QueueFullError(UnavailableError):
    """As many requests wait as may; the same one may be served a little later."""


class _Stream:
    """One request on its way from the engine's thread to the task that reads it: what nobody has read yet, merged."""

    def __init__(self, request_id: str, params: SamplingParams, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.params = params
        self.loop = loop
        self.arrival_time = time.monotonic()
        self.is_ended = False  # nothing more comes
        self._lock = threading.Lock()
        self._is_filled = asyncio.Event()
        self._unread: RequestOutput | Exception | None = None

    def put(self, item: RequestOutput | Exception) -> bool:
        """Take an output, or the error that ends the request. Return whether the reader must be woken."""
        with self._lock:
            if self.is_ended:
                return False
            self.is_ended = isinstance(item, Exception) or item.finished
            earlier = self._unread
            is_delta = self.params.output_kind is RequestOutputKind.DELTA
            if is_delta and isinstance(earlier, RequestOutput) and isinstance(item, RequestOutput):
                item = merge_deltas(earlier, item)
            self._unread = item
            return earlier is None

    def wake(self) -> None:
        """Let the reader go on. On the loop's thread."""
        self._is_filled.set()

    async def get(self) -> RequestOutput:
        """Wait for what is new and return it. Raises the error that ended the request."""
        await self._is_filled.wait()
        with self._lock:
            item, self._unread = self._unread, None
            self._is_filled.clear()
        assert item is not None, "a reader was woken for nothing"
        if isinstance(item, Exception):
            raise item
        return item


class AsyncLLM:
    """Serves one LLM to many tasks of an event loop: a thread of its own steps the engine.

    Prompts become tokens, and grammars are compiled, on other threads. A request whose reader is slow costs the others
    nothing: what it has not read yet is kept as one output. As long as this is open, the LLM serves nobody else.

    `max_num_waiting` requests may wait for their first step besides those that find a free place; `None`: any number.
    """

    def __init__(self, llm: LLM, *, max_num_waiting: int | None = None) -> None:
        if max_num_waiting is not None and max_num_waiting < 0:
            raise RequestError(f"max_num_waiting={max_num_waiting!r} is not allowed; it takes 0 or above, or None")
        self.llm = llm
        self._engine = llm.engine
        self._max_num_waiting = max_num_waiting
        self._holding = ExitStack()
        self._holding.enter_context(llm.occupied_by("an AsyncLLM"))
        self._request_ids = (f"request-{number}" for number in itertools.count())
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}  # all that are not ended or given up
        self._serving: dict[str, _Stream] = {}  # those the engine knows; its thread's own
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tokenizing = ThreadPoolExecutor(_NUM_TOKENIZING_THREADS, "infinilm-tokenize")
        self._compiling = ThreadPoolExecutor(_NUM_COMPILING_THREADS, "infinilm-compile")
        self._calls: set[Future[Any]] = set()
        self._reason: str | None = None  # why no request is taken
        self._last_error: Exception | None = None
        self._is_closed = False
        self._is_stopped = False  # nobody takes commands any more
        self._thread = threading.Thread(target=self._serve, name="infinilm-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ for tasks

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of one request, as `SamplingParams.output_kind` asks for them.

        A request that is malformed or can never be served raises `RequestError` at the first step of the iteration, a
        queue that is full `QueueFullError`, and what does not serve any more `UnavailableError`. Closing the iterator,
        or cancelling the task that waits for it, aborts the request, at any moment, and frees all it holds.
        """
        params = sampling_params or self.llm.get_default_sampling_params()
        stream = self._open(request_id or next(self._request_ids), params)
        try:
            pool = self._tokenizing if params.structured_outputs is None else self._compiling
            prepared = await stream.loop.run_in_executor(pool, self.llm.prepare, stream.request_id, prompt, params)
            self._commands.put(lambda: self._add(stream, prepared))
            is_finished = False
            while not is_finished:
                output = await stream.get()
                is_finished = output.finished
                yield output
        finally:
            self._close_stream(stream)

    async def abort(self, request_id: str) -> None:
        """End a request: its reader gets what there is, with the finish reason "abort". Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            await self.call(lambda: self._abort(stream))

    async def call(self, function: Callable[[], _Result]) -> _Result:
        """Run `function` between two steps, on the engine's thread, and return its result."""
        future: Future[_Result] = Future()
        with self._lock:
            if self._is_stopped:
                raise UnavailableError(f"nothing is called: {self._reason}")
            self._calls.add(future)
            self._commands.put(lambda: _settle(future, function))
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        finally:
            self._calls.discard(future)

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests and wait for the rest. Raises `TimeoutError` after `timeout` seconds."""
        self._reason = self._reason or "draining"
        async with asyncio.timeout(timeout):
            while self._streams:
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Abort what runs, end the thread and close the LLM. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._reason = self._reason or "closed"
        self._commands.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._tokenizing.shutdown(wait=False)
        self._compiling.shutdown(wait=False)
        self._holding.close()
        self.llm.close()

    # ------------------------------------------------------------ for any thread

    def stats(self) -> EngineStats:
        """Return the numbers of now."""
        return self._engine.stats()

    def health(self) -> str | None:
        """Return `None`, or what is wrong: why no request is taken, or that steps fail again and again."""
        num_failed = self._engine.num_failed_steps
        if self._reason is None and num_failed >= _MAX_FAILED_STEPS:
            return f"the last {num_failed} steps failed: {type(self._last_error).__name__}: {self._last_error}"
        return self._reason

    def _open(self, request_id: str, params: SamplingParams) -> _Stream:
        stream = _Stream(request_id, params, asyncio.get_running_loop())
        with self._lock:
            if self._reason is not None:
                raise UnavailableError(f"no request is taken: {self._reason}")
            if request_id in self._streams:
                raise RequestError(f"request id {request_id!r} is in use; take another until that request is finished")
            self._check_room()
            self._streams[request_id] = stream
        return stream

    def _check_room(self) -> None:
        if self._max_num_waiting is None:
            return
        stats = self._engine.stats()
        num_free = 0 if stats.num_waiting else self._engine.max_num_seqs - stats.num_running
        num_waiting = (
            sum(stream.params.n for stream in self._streams.values() if not stream.is_ended) - stats.num_running
        )
        if num_waiting >= self._max_num_waiting + num_free:
            raise QueueFullError(
                f"{num_waiting} requests wait, and no more than {self._max_num_waiting} may; try again later"
            )

    def _close_stream(self, stream: _Stream) -> None:
        """Let go of a request whose reader has gone, or has all."""
        with self._lock:
            self._streams.pop(stream.request_id, None)
        if not stream.is_ended:
            stream.is_ended = True
            self._commands.put(lambda: self._drop(stream))

    # ------------------------------------------------------------ the engine's thread

    def _serve(self) -> None:
        try:
            while self._run_commands():
                self._deliver(self._engine.step())
            self._stop("the engine is closed")
            self._deliver(self._engine.abort(list(self._serving)))
        except BaseException as err:
            _log.exception("the engine stopped")
            self._stop(f"the engine stopped: {type(err).__name__}: {err}")
        self._serving.clear()
        for stream in list(self._streams.values()):
            self._put(stream, UnavailableError(f"no request is served: {self._reason}"))
        for future in list(self._calls):
            future.set_exception(UnavailableError(f"nothing is called: {self._reason}"))

    def _run_commands(self) -> bool:
        """Do what is asked for, waiting where there is nothing else to do. Return whether to go on."""
        is_idle = not self._engine.has_unfinished()
        with suppress(queue.Empty):
            while True:
                command = self._commands.get(block=is_idle)
                if command is None:
                    return False
                command()
                is_idle = False
        return True

    def _add(self, stream: _Stream, prepared: Prepared) -> None:
        if stream.is_ended:
            return
        try:
            self._engine.add(stream.request_id, prepared, arrival_time=stream.arrival_time)
        except Exception as err:  # of this request: the engine has not taken it
            self._put(stream, err)
        else:
            self._serving[stream.request_id] = stream

    def _drop(self, stream: _Stream) -> None:
        if self._serving.get(stream.request_id) is stream:
            del self._serving[stream.request_id]
            self._engine.abort([stream.request_id])

    def _abort(self, stream: _Stream) -> None:
        if self._serving.get(stream.request_id) is stream:
            self._deliver(self._engine.abort([stream.request_id]))
        else:  # it has not come so far
            outputs = [CompletionOutput(index, "", [], finish_reason="abort") for index in range(stream.params.n)]
            self._put(stream, RequestOutput(stream.request_id, None, [], None, outputs, finished=True))

    def _deliver(self, items: Sequence[RequestOutput | Failure]) -> None:
        """Hand out what a step brought, and wake the readers that wait: once for every loop."""
        woken: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for item in items:
            stream = self._serving.get(item.request_id)
            if stream is None:
                continue
            if isinstance(item, Failure):
                self._last_error = item.error
            if isinstance(item, Failure) or item.finished:
                del self._serving[item.request_id]
            if stream.put(item.error if isinstance(item, Failure) else item):
                woken.setdefault(stream.loop, []).append(stream)
        for loop, streams in woken.items():
            self._wake(loop, streams)

    def _put(self, stream: _Stream, item: RequestOutput | Exception) -> None:
        if stream.put(item):
            self._wake(stream.loop, [stream])

    def _wake(self, loop: asyncio.AbstractEventLoop, streams: list[_Stream]) -> None:
        try:
            loop.call_soon_threadsafe(_wake_all, streams)
        except RuntimeError:  # the loop is closed: nobody will read
            for stream in streams:
                self._close_stream(stream)

    def _stop(self, reason: str) -> None:
        with self._lock:
            self._reason = reason
            self._is_stopped = True


def _wake_all(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.wake()


def _settle(future: Future[_Result], function: Callable[[], _Result]) -> None:
    try:
        future.set_result(function())
    except BaseException as err:  # the caller's to handle
        future.set_exception(err)
