"""What a server refuses, and how: keys, sizes, numbers, time, and bodies that are no JSON."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import MODEL, LiveServer, serving

from infinilm import LLM
from infinilm.server.settings import Limits
from infinilm_hookspecs import RequestError

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
KEY = "s3cret-ключ"


def post(server: LiveServer, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=60, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, after holding it to OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return dict(error)


# ---------------------------------------------------------------- bodies

BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a JSON body is required"),
    "no JSON": (b"{", "is not JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "is not JSON"),
    "a list": (b"[]", "valid dictionary"),
    "a number": (b"1", "valid dictionary"),
    "NaN": (b'{"model": "tiny", "messages": [], "temperature": NaN}', "is not JSON"),
    "Infinity": (b'{"model": "tiny", "messages": [], "temperature": -Infinity}', "is not JSON"),
    "a number that overflows": (
        json.dumps(CHAT).encode()[:-1] + b', "temperature": 1e999}',
        "temperature=inf is not allowed",
    ),
    "a number without end": (b'{"seed": ' + b"1" * 5000 + b"}", "is not JSON"),
    "half a surrogate pair": (b'{"model": "\\ud800"}', "is not JSON"),
    "nesting without end": (b"[" * 100_000, "is not JSON"),
    "nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("kind", BODIES)
def test_body_that_is_no_request_is_refused(server: LiveServer, kind: str) -> None:
    body, message = BODIES[kind]
    response = post(server, body)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize("place", ["tools", "response_format", "chat_template_kwargs"])
def test_deep_schemas_do_no_harm(server: LiveServer, place: str) -> None:
    """As deep as JSON is read at all."""
    deep: Any = {"type": "object"}
    for _ in range(150 if place != "response_format" else 60):
        deep = {"properties": {"a": deep}}
    asked: dict[str, Any] = {
        "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]},
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}},
        "chat_template_kwargs": {"chat_template_kwargs": deep},
    }[place]
    assert post(server, {**CHAT, **asked, "max_tokens": 1}).status_code in (200, 400)


def test_other_content_types_are_refused(server: LiveServer) -> None:
    """A page of another site may send text, without being asked; it must not make the model work."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        response = post(server, CHAT, headers={"Content-Type": content_type})
        assert response.status_code == 400


def test_unknown_paths_and_methods(server: LiveServer) -> None:
    assert error_of(httpx.get(f"{server.url}/v2"))["message"] == "there is no GET /v2"
    response = httpx.get(f"{server.url}/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/docs").status_code == 404


def test_other_sites_may_not_read(server: LiveServer) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in response.headers
    preflight = httpx.options(f"{server.url}/v1/models", headers={"Access-Control-Request-Method": "GET"})
    assert preflight.status_code == 405


# ---------------------------------------------------------------- limits


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[LiveServer]:
    """A server whose limits are soon reached, and which wants a key."""
    limits = {
        "max_body_size": 2000,
        "max_prompt_tokens": 50,
        "max_tokens": 1000,
        "max_answers": 3,
        "max_concurrent_requests": 2,
        "body_timeout": 1.0,
        "retry_after": 7,
    }
    llm = LLM(tiny, max_num_seqs=4, kv_cache_memory=2**21)
    with serving(llm, limits=limits, api_keys=("other", KEY)) as live:
        yield live


AUTHORIZED = {"Authorization": f"Bearer {KEY}".encode()}


def test_body_above_the_limit_is_refused_before_it_is_read(small: LiveServer) -> None:
    response = post(small, {**CHAT, "user": "x" * 3000}, headers=AUTHORIZED)
    assert response.status_code == 413
    assert "2000 bytes" in error_of(response)["message"]
    with socket.create_connection(small.address) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other\r\nContent-Length: 9999\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_body_without_an_announced_length_is_counted(small: LiveServer) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 1000

    response = httpx.post(f"{small.url}/v1/completions", content=endless(), headers=AUTHORIZED)
    assert response.status_code == 413


def test_body_that_does_not_arrive_is_given_up(small: LiveServer) -> None:
    with socket.create_connection(small.address) as connection:
        connection.settimeout(10)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other\r\nContent-Length: 99\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_prompts_and_answers_have_limits(small: LiveServer) -> None:
    client = small.client
    with pytest.raises(openai.BadRequestError, match="the prompt has 61 tokens, and this server's limit is 50"):
        client.completions.create(model=MODEL, prompt="x" * 61)
    with pytest.raises(openai.BadRequestError, match="the prompt has 51 tokens"):
        client.completions.create(model=MODEL, prompt=[1] * 51)
    with pytest.raises(openai.BadRequestError, match="max_tokens=1001 is above this server's limit of 1000"):
        client.completions.create(model=MODEL, prompt="x", max_tokens=1001)
    with pytest.raises(openai.BadRequestError, match="4 answers to one request are above this server's limit of 3"):
        client.completions.create(model=MODEL, prompt=["x", "y"], n=2)
    answer = client.chat.completions.create(**CHAT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1000  # without a wish of its own, up to the limit


def test_only_so_many_requests_run_at_once(small: LiveServer) -> None:
    client = small.client
    with ThreadPoolExecutor() as pool, small.pausing(after=2):
        running = [pool.submit(client.chat.completions.create, **CHAT, max_tokens=5) for _ in range(2)]
        small.wait_for_requests(2)
        with pytest.raises(openai.RateLimitError, match="this server runs 2 requests") as caught:
            client.chat.completions.create(**CHAT)
        assert caught.value.response.headers["retry-after"] == "7"
        assert httpx.get(f"{small.url}/health").status_code == 200
    assert all(request.result().choices for request in running)
    small.wait_until_idle()
    assert client.chat.completions.create(**CHAT, max_tokens=1).choices


def test_queue_has_an_end(tiny: Path) -> None:
    llm = LLM(tiny, max_num_seqs=1, kv_cache_memory=2**21)
    with serving(llm, limits={"max_num_waiting": 1}) as live:
        client = live.client
        with ThreadPoolExecutor() as pool, live.pausing(after=1):
            running = pool.submit(client.chat.completions.create, **CHAT, max_tokens=5)
            live.wait_for_requests(1)
            waiting = pool.submit(client.chat.completions.create, **CHAT, max_tokens=5)
            live.wait_for_requests(2)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as caught:
                    client.chat.completions.create(**CHAT, stream=stream)
                assert caught.value.response.headers["retry-after"] == "1"
                assert caught.value.code == "queue_full"
        assert running.result().choices
        assert waiting.result().choices
        live.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_takes_too_long_is_broken_off(tiny: Path, stream: bool) -> None:
    llm = LLM(tiny, kv_cache_memory=2**21)
    with serving(llm, limits={"request_timeout": 0.3}) as live, live.pausing(after=1):
        options: dict[str, Any] = {**CHAT, "extra_body": {"ignore_eos": True}}
        if stream:
            with pytest.raises(openai.APIError, match=r"longer than this server.s limit of 0\.3 s"):
                list(live.client.chat.completions.create(stream=True, **options))
        else:
            with pytest.raises(openai.InternalServerError, match="longer than this server's limit") as caught:
                live.client.chat.completions.create(**options)
            assert caught.value.status_code == 504
    # The pause is over, and so is the server; what it left behind:
    assert live.stats().num_free_blocks == live.stats().num_blocks


@pytest.mark.parametrize("name", Limits.__slots__)
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(RequestError, match=f"the limit {name}=0 is not allowed"):
        Limits(**{name: 0})


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"])
@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic other", "other", "Bearer s3cret"])
def test_without_a_key_nothing_is_told(small: LiveServer, path: str, header: str | None) -> None:
    response = httpx.get(f"{small.url}{path}", headers={"Authorization": header} if header else {})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"


def test_each_key_opens(small: LiveServer) -> None:
    for header in (AUTHORIZED, {"Authorization": b"bearer other"}):
        assert httpx.get(f"{small.url}/v1/models", headers=header).status_code == 200  # type: ignore[arg-type]
    assert httpx.get(f"{small.url}/health").status_code == 200
    assert httpx.get(f"{small.url}/").status_code == 200


def test_refused_request_is_not_read(small: LiveServer) -> None:
    with socket.create_connection(small.address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_keys_are_in_no_log(small: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        httpx.get(f"{small.url}/v1/models", headers=AUTHORIZED)
        httpx.get(f"{small.url}/v1/models", headers={"Authorization": "Bearer wrong-key"})
    assert "/v1/models" in caplog.text
    for secret in (KEY, "s3cret", "wrong-key"):
        assert secret not in caplog.text


# ---------------------------------------------------------------- ids


def test_every_answer_has_an_id_that_is_in_the_log(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "infinilm.server"):
        given = post(server, {**CHAT, "max_tokens": 1}, headers={"X-Request-Id": "abc-1"})
        made = post(server, b"{")
        bad = post(server, {**CHAT, "max_tokens": 1}, headers={"X-Request-Id": "a b\t" + "x" * 200})
    assert given.headers["x-request-id"] == "abc-1"
    assert given.json()["id"] == "chatcmpl-abc-1"
    assert len({made.headers["x-request-id"], bad.headers["x-request-id"], "abc-1"}) == 3
    assert len(bad.headers["x-request-id"]) == 32


def test_clients_cannot_write_lines_of_the_log(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "infinilm.server"):
        httpx.get(f"{server.url}/a%0aERROR%20%1b[31m")
    assert [it.getMessage() for it in caplog.records if "ERROR" in it.getMessage()] == ["GET /a%0aERROR%20%1b[31m"]


def test_one_id_may_be_used_by_several_requests_at_once(server: LiveServer) -> None:
    headers = {"X-Request-Id": "same"}
    client = server.client
    with ThreadPoolExecutor() as pool, server.pausing(after=1):
        both = [pool.submit(client.chat.completions.create, **CHAT, max_tokens=3, extra_headers=headers) for _ in "ab"]
        server.wait_for_requests(2)
    assert [request.result().id for request in both] == ["chatcmpl-same"] * 2
    server.wait_until_idle()


def test_failing_backend_is_a_500_that_keeps_its_secrets(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(tiny, kv_cache_memory=2**21)
    with serving(llm) as live:
        good = llm.backend.forward
        monkeypatch.setattr(llm.backend, "forward", lambda batch: [][0])
        for stream in (False, True):
            response = post(live, {**CHAT, "max_tokens": 2, "stream": stream})
            assert response.status_code == 500
            assert "the server failed on this request" in error_of(response)["message"]
            assert "index out of range" not in response.text
        assert "list index out of range" in caplog.text
        monkeypatch.setattr(llm.backend, "forward", good)
        live.wait_until_idle()


def test_engine_that_stopped_is_a_503(tiny: Path) -> None:
    llm = LLM(tiny, kv_cache_memory=2**21)
    with serving(llm) as live:
        live.engine._reason = "the engine stopped: fire"
        response = post(live, CHAT)
        assert response.status_code == 503
        assert "the engine stopped: fire" in error_of(response)["message"]
        health = httpx.get(f"{live.url}/health")
        assert (health.status_code, health.json()["reason"]) == (503, "the engine stopped: fire")
        live.engine._reason = None
