"""What every HTTP request passes before a route sees it: its id and log line, the key, the limits.

Plain ASGI, so that a route hears of a disconnect.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infinilm.server.errors import ApiError, as_api_error, error_response
from infinilm.server.logs import fields
from infinilm.server.metrics import Metrics
from infinilm.server.settings import Limits
from infinilm.server.trace import Trace, current_request_id, new_request_id

OPEN_PATHS = frozenset({"/", "/health"})
"""What needs no key: it tells nothing about anybody."""

_QUIET_PATHS = frozenset({"/health", "/metrics"})
_log = logging.getLogger(__name__)


class Tracing:
    """Gives every request an id and a line in the log, and answers with 500 what nobody has caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = Trace(new_request_id(Headers(scope=scope).get("x-request-id")))
        scope.setdefault("state", {})["trace"] = trace
        token = current_request_id.set(trace.request_id)
        started = time.monotonic()
        status = 499  # the client's leaving, unless a response begins

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = trace.request_id
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as err:
            _log.exception("the request failed")
            if status == 499:
                await error_response(as_api_error(err))(scope, receive, sending)
        finally:
            self._finish(scope, trace, status, time.monotonic() - started)
            current_request_id.reset(token)

    def _finish(self, scope: Scope, trace: Trace, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.count_response(scope["method"], path, status)
        tokens = {"prompt_tokens": trace.num_prompt_tokens, "completion_tokens": trace.num_generated_tokens}
        _log.log(
            logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO,
            "%s %s",
            scope["method"],
            scope["raw_path"].decode("latin-1"),  # as it came: what is escaped there cannot break the line
            extra=fields(
                status=status,
                seconds=round(seconds, 4),
                client=scope["client"][0] if scope.get("client") else None,
                **(tokens if trace.num_prompt_tokens else {}),
                finish_reason=",".join(sorted(set(trace.finish_reasons))) or None,
            ),
        )


class Authentication:
    """Lets only requests with a key through, where there are keys. Takes as long for a wrong key as for a right one."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_allowed(scope):
            refusal = ApiError(
                401,
                "this server wants an API key, as 'Authorization: Bearer KEY', and this is not one of its keys",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if not self._keys:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]  # all of them, always
        return scheme.lower() == b"bearer" and any(matches)


class Admission:
    """Reads a request's body within its limits, and lets so many generate at once.

    A route gets the body whole; after it, all it can receive is the disconnect.
    """

    def __init__(self, app: ASGIApp, limits: Limits, guarded_paths: frozenset[str]) -> None:
        self._app = app
        self._limits = limits
        self._guarded_paths = guarded_paths
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._guarded_paths:
            await self._app(scope, receive, send)
            return
        if self._num_requests >= self._limits.max_concurrent_requests:
            await error_response(self._busy())(scope, receive, send)
            return
        self._num_requests += 1
        try:
            await self._admit(scope, receive, send)
        finally:
            self._num_requests -= 1

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._read(scope, receive)
        except ApiError as err:
            await error_response(err)(scope, receive, send)
            return
        if body is None:
            return
        left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receiving() -> Message:
            return left.pop() if left else await receive()

        await self._app(scope, receiving, send)

    def _busy(self) -> ApiError:
        return ApiError(
            429,
            f"this server runs {self._num_requests} requests, which is its limit; try again later",
            code="too_many_requests",
            headers={"Retry-After": str(self._limits.retry_after)},
        )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, `None` where the client left before its end. Raises `ApiError` where a limit is passed."""
        limit = self._limits.max_body_size
        # What is left unread would be taken for the next request of the connection.
        close = {"Connection": "close"}
        too_large = ApiError(413, f"the body is above this server's limit of {limit} bytes", headers=close)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as err:
            seconds = self._limits.body_timeout
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", headers=close) from err
