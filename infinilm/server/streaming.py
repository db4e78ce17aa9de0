"""Server-sent events, and work that ends when its client is gone or its time is up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from infinilm.server.errors import ApiError, as_api_error, error_body

_T = TypeVar("_T")
_LAST_WORD_SECONDS = 2.0
_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection: nobody waits for the answer."""


def event(chunk: BaseModel) -> bytes:
    """Return one event of a stream, without the fields nobody set."""
    return b"data: %b\n\n" % chunk.model_dump_json(exclude_unset=True).encode()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of `work`. When the client goes first, cancel it and raise `ClientGoneError`.

    The request's body has been read: all that can still be received is the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await cancel(working, watching)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they are over. What they raise is nobody's concern any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def within(seconds: float | None, work: Awaitable[_T]) -> _T:
    """Return the result of `work`. Raises `ApiError` when the time is up."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as err:
        raise ApiError(504, f"the request took longer than this server's limit of {seconds:g} s") from err


async def merged(streams: Sequence[AsyncGenerator[_T, None]]) -> AsyncGenerator[tuple[int, _T], None]:
    """Yield what several streams yield, as it comes, each with the number of its stream. Closes them all at the end."""
    if len(streams) == 1:  # as nearly always: no task for every item
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    waiting = {asyncio.ensure_future(anext(stream)): at for at, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                at = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield at, item
                waiting[asyncio.ensure_future(anext(streams[at]))] = at
    finally:
        await cancel(*waiting)
        for stream in streams:
            await stream.aclose()


class EventStream(Response):
    """A response of server-sent events, sent as fast as its client reads.

    Nothing is sent before the first event is there, so an error until then is a response like any other. A later one is
    an event with the error, and then the end. Whatever happens, `events` is closed.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, timeout: float | None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            try:
                await unless_disconnected(receive, self._send_all(send))
            except ClientGoneError:
                _log.debug("the client closed its connection")

    async def _send_all(self, send: Send) -> None:
        started = asyncio.Event()
        try:
            await within(self._timeout, self._send_events(send, started))
        except Exception as err:
            if not started.is_set():
                raise
            if not isinstance(err, ApiError):
                _log.exception("the answer broke off")
            await self._send_last_word(as_api_error(err), send)

    async def _send_events(self, send: Send, started: asyncio.Event) -> None:
        async for part in self._events:
            if not started.is_set():
                started.set()
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send(_body(part))
        await send(_body(b"", more=False))

    async def _send_last_word(self, err: ApiError, send: Send) -> None:
        """Tell the client why there is no more, if it reads at all."""
        told = json.dumps(error_body(err.status_code, err.detail, err.param, err.code))
        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await send(_body(f"data: {told}\n\n".encode() + DONE, more=False))
        except TimeoutError:
            _log.warning("the client reads nothing; its connection is closed")


def _body(part: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": part, "more_body": more}


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
