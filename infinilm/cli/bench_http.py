"""A small HTTP/1.1 client that costs little beside what it measures: a connection a request, events as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from infinilm_hookspecs import UnavailableError

_MAX_LINE = 2**24  # bytes; an event is a line


class HttpClient:
    """Speaks to one server. Raises `UnavailableError` for a URL it cannot read and for answers that are no success."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        """Take the server's address, with or without the `/v1` of its API."""
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UnavailableError(f"{base_url!r} is no address of a server; one is http://127.0.0.1:8000")
        self._is_secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port or (443 if self._is_secure else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Host": parts.netloc.rpartition("@")[2], "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def get_json(self, path: str) -> Any:
        """Return the JSON that lies at `path`."""
        async with self._exchange("GET", path, b"") as lines:
            return json.loads(b"".join([line async for line in lines]))

    async def stream_events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[str]:
        """Post `body` as JSON and yield the data of every event up to `[DONE]`."""
        async with self._exchange("POST", path, json.dumps(body).encode()) as lines:
            async for line in lines:
                if line.startswith(b"data:"):
                    data = line[5:].strip().decode()
                    if data == "[DONE]":
                        return
                    yield data
        raise UnavailableError("the answer broke off before [DONE]")

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request, and give the lines of its answer."""
        try:
            reader, writer = await asyncio.open_connection(
                self._host, self._port, ssl=self._is_secure or None, limit=_MAX_LINE
            )
        except OSError as err:
            raise UnavailableError(f"no server at {self._host} port {self._port}: {err.strerror or err}") from err
        try:
            headers = {**self._headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            writer.write(f"{method} {self._prefix}{path} HTTP/1.1\r\n{head}\r\n".encode() + body)
            await writer.drain()
            lines = await _read_answer(reader)
            yield lines
        finally:
            writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Read the head of an answer, and return the lines of its body."""
    status = (await reader.readline()).decode("latin-1").split(maxsplit=2)
    if len(status) < 2:
        raise UnavailableError("the server closed the connection without an answer")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip().lower()
    lines = _lines(_chunks(reader) if headers.get("transfer-encoding") == "chunked" else _whole(reader, headers))
    if status[1] != "200":
        told = b"".join([line async for line in lines]).decode(errors="replace")
        raise UnavailableError(f"the server answered {status[1]}: {told[:300]}")
    return lines


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _whole(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    yield (
        await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else await reader.read()
    )


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    left = b""
    async for part in parts:
        *whole, left = (left + part).split(b"\n")
        for line in whole:
            yield line
    if left:
        yield left
