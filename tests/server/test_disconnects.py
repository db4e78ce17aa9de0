"""Clients that go away, that do not read, and many at once: the engine is idle and clean afterwards."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live_server import MODEL, LiveServer, serving

from infinilm import LLM

BODY: dict[str, Any] = {"model": MODEL, "prompt": "hello", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}


def send(server: LiveServer, *, receive_buffer: int | None = None, **body: Any) -> socket.socket:
    """Send a request on a connection of its own, and return that without reading."""
    connection = socket.socket()
    connection.settimeout(60)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(server.address)
    content = json.dumps(body).encode()
    headers = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}", "Connection: close")
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *headers])
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    return connection


def kill(connection: socket.socket) -> None:
    """Close a connection as a process that dies does: with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize("close", [socket.socket.close, kill])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_client_that_leaves_takes_its_request_along(server: LiveServer, close: Any, stream: bool, n: int) -> None:
    aborted = server.stats().num_finished["abort"]
    with server.pausing(after=3):
        connection = send(server, **BODY, stream=stream, n=n)
        server.wait_until(lambda it: it.num_running == n)
        close(connection)
        server.wait_for_requests(0)
    server.wait_until_idle()
    server.wait_until(lambda it: it.num_finished["abort"] == aborted + n)


def test_client_that_leaves_the_queue_is_forgotten(tiny: Path) -> None:
    with serving(LLM(tiny, max_num_seqs=1, kv_cache_memory=2**21)) as live:
        with live.pausing(after=1):
            first = send(live, **BODY)
            live.wait_for_requests(1)
            waiting = [send(live, **BODY, stream=stream) for stream in (False, True)]
            live.wait_for_requests(3)
            for connection in waiting:
                kill(connection)
            live.wait_for_requests(1)
            kill(first)
        live.wait_until_idle()


def test_client_that_leaves_before_its_body_is_whole(server: LiveServer) -> None:
    connection = socket.create_connection(server.address)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    kill(connection)
    assert server.client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices


def test_clients_killed_in_the_middle_leave_nothing(server: LiveServer) -> None:
    """Forty of them, at moments of their own, with others between them that want their answers."""

    def ask(number: int) -> str:
        if number % 4 == 0:
            answer = server.client.completions.create(model=MODEL, prompt="hello", max_tokens=30, temperature=0)
            return answer.choices[0].text
        with send(server, **BODY, stream=True) as connection:
            for _ in range(number % 7):
                connection.recv(400)
            kill(connection)
        return ""

    with ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(ask, range(40)))
    server.wait_until_idle()
    alone = server.client.completions.create(model=MODEL, prompt="hello", max_tokens=30, temperature=0).choices[0].text
    assert texts == {"", alone}


def test_slow_reader_holds_nobody_up(tiny: Path) -> None:
    """Readers that read nothing: their answers are finished behind their backs, and wait for them in few pieces.

    Twenty logprobs a token make it larger than what lies between, so many tokens come in one event.
    """
    with serving(LLM(tiny, max_num_seqs=12, kv_cache_memory=2**23)) as live, ExitStack() as stack:
        heavy = {**BODY, "n": 8, "stream": True, "logprobs": 20}
        slow = stack.enter_context(send(live, receive_buffer=4096, **heavy))
        for _ in range(5):
            answer = live.client.completions.create(model=MODEL, prompt="hello", max_tokens=50, temperature=0)
            assert answer.choices[0].finish_reason is not None
        live.wait_until_idle()  # the slow one's answer is complete, though hardly any of it was read
        assert live.stats().num_finished["length"] >= 8
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            part = slow.recv(1 << 16)
            assert part, received[-200:]
            received += part
        assert b"data: [DONE]" in received[-40:]
        assert received.count(b'"finish_reason":"length"') == 8
        assert received.count(b"data: ") < 8 * BODY["max_tokens"]


def test_many_at_once_get_what_each_gets_alone(demo: LiveServer) -> None:
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    prompts = [f"{a} plus {b} is" for a in numbers for b in numbers[:4]]

    def ask(prompt: str) -> str:
        stream = demo.client.completions.create(model=MODEL, prompt=prompt, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [ask(prompt) for prompt in prompts]
    assert together[0] == " two"
    demo.wait_until_idle()
    assert threading.active_count() < 40
