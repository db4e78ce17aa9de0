"""The process of a server: a socket, an event loop, and a way to end that breaks off nobody's answer."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from infinilm.async_llm import AsyncLLM
from infinilm.llm import LLM
from infinilm.server.app import create_app
from infinilm.server.settings import Settings
from infinilm_hookspecs import UnavailableError

_SECONDS_FOR_THE_LAST_BYTES = 5
_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address but does not listen yet; port 0 takes a free one.

    Raises `UnavailableError` where the address is taken or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as err:
        reason = err.strerror or str(err)
        raise UnavailableError(
            f"cannot listen on {host} port {port}: {reason}; take another with --port or --host"
        ) from err
    return bound


def run_server(
    llm: LLM, bound: socket.socket, settings: Settings, *, drain_timeout: float | None, on_ready: Callable[[], None]
) -> None:
    """Serve until a signal ends it. SIGTERM and SIGINT drain: nothing new is taken, what runs is finished.

    What still runs after `drain_timeout` seconds is broken off, and so is everything at a second signal.
    """
    asyncio.run(_serve(llm, bound, settings, drain_timeout, on_ready))


async def _serve(
    llm: LLM, bound: socket.socket, settings: Settings, drain_timeout: float | None, on_ready: Callable[[], None]
) -> None:
    engine = AsyncLLM(llm, max_num_waiting=settings.limits.max_num_waiting)
    try:
        config = uvicorn.Config(
            create_app(engine, settings),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_SECONDS_FOR_THE_LAST_BYTES,
        )
        await _DrainingServer(config, engine, drain_timeout, on_ready).serve([bound])
    finally:
        await engine.close()


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which keeps its door open while it drains: `/health` must be able to say so."""

    def __init__(
        self, config: uvicorn.Config, engine: AsyncLLM, drain_timeout: float | None, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        _log.info("draining: requests that run are finished, new ones refused; another signal ends it at once")
        try:
            await self._engine.drain(self._drain_timeout)
        except TimeoutError:
            _log.warning("requests still run after %s s and are broken off", self._drain_timeout)
            await self._engine.close()
        self.should_exit = True
