"""`infinilm serve` as a process: what it prints, its logs, its signals, and what it refuses to start with."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints_made import write_llama
from openai import OpenAI
from serve_process import serve
from tiny_checkpoint import TEMPLATE, write_model, write_tokenizer

from infinilm import __version__
from infinilm.cli import main

PROMPT: dict[str, Any] = {"prompt": "hello", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=100_000)
    return write_tokenizer(folder, chat_template=TEMPLATE)


def test_it_says_what_it_serves_when_it_is_ready(model: Path) -> None:
    words = ("--served-model-name", "m", "--max-tokens", "5", "--api-key", "one")
    with serve(model, *words, INFINILM_API_KEY="two") as server:
        assert server.lines[0] == f"infinilm {__version__} is ready"
        told = {line.split()[0]: line.split(maxsplit=1)[1] for line in server.lines[1:]}
        assert server.url.startswith("http://127.0.0.1:")
        assert told["model"].startswith("m; ")
        assert "in-tree" in told["plugins"]
        assert "max tokens 5" in told["limits"]
        assert told["access"] == "with an API key"
        answers = [
            httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
            for key in ("one", "two", "three")
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 401]
        assert answers[0].json()["data"][0]["id"] == "m"
        err = server.end()
    assert "GET /v1/models" in err
    assert "Traceback" not in err
    assert "two" not in err


def test_termination_lets_answers_finish_and_takes_no_more(model: Path) -> None:
    with serve(model, "--drain-timeout", "60") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        options: dict[str, Any] = {"model": str(model), **PROMPT}
        stream = iter(client.completions.create(max_tokens=3000, stream=True, **options))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        statuses = set()
        while statuses != {503}:
            health = httpx.get(f"{server.url}/health")
            statuses = {health.status_code}
        assert health.json()["reason"] == "draining"
        refused = httpx.post(f"{server.url}/v1/completions", json={"model": str(model), "prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "service_unavailable"
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        err = server.end(None)
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_draining_has_an_end(model: Path, how: str) -> None:
    with serve(model, "--drain-timeout", "0.2" if how == "timeout" else "600") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = iter(client.completions.create(model=str(model), max_tokens=90_000, stream=True, **PROMPT))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            while httpx.get(f"{server.url}/health").status_code != 503:
                pass
            server.process.send_signal(signal.SIGINT)
        ended: list[BaseException] = []
        reader = threading.Thread(target=lambda: _read(stream, ended))
        reader.start()
        err = server.end(None)
        reader.join()
    assert ended, "the stream was told of no end"
    if how == "timeout":
        assert "are broken off" in err
        assert "the server stopped before the answer was complete" in str(ended[0])


def _read(stream: Iterator[Any], ended: list[BaseException]) -> None:
    try:
        for _ in stream:
            pass
    except Exception as err:
        ended.append(err)


def test_logs_are_json_on_request_and_have_the_requests_id(model: Path) -> None:
    with serve(model, "--log-format", "json", "--host", "0.0.0.0") as server:
        assert server.lines[-1].split()[1:] == ["without", "an", "API", "key"]
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        httpx.post(
            f"{url}/v1/completions",
            json={"model": str(model), "prompt": "a secret prompt", "max_tokens": 3, "ignore_eos": True},
            headers={"X-Request-Id": "me-1"},
        )
        httpx.post(f"{url}/v1/completions", json={"model": "x", "prompt": "x"})
        httpx.get(f"{url}/health")
        err = server.end()
    logged = [json.loads(line) for line in err.splitlines()]
    (warning,) = [line for line in logged if line["level"] == "warning"]
    assert "may be reached from other machines, and there is no --api-key" in warning["message"]
    requests = [line for line in logged if line["message"].startswith("POST")]
    assert [line["status"] for line in requests] == [200, 404]
    assert requests[0]["request_id"] == "me-1"
    assert (requests[0]["prompt_tokens"], requests[0]["completion_tokens"]) == (15, 3)
    assert requests[0]["finish_reason"] == "length"
    assert requests[0].keys() >= {"time", "level", "logger", "seconds", "client"}
    assert len(requests[1]["request_id"]) == 32
    assert "secret" not in err
    assert "/health" not in err


def test_address_in_use_is_one_line_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path / "no model"), "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"infinilm: error: cannot listen on 127.0.0.1 port {port}: Address already in use;")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "'70000' is no port"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid port 8000"),
        (["--max-body-size", "8 megabytes"], "is no size"),
        (["--request-timeout", "0"], "'0' is no number above 0"),
        (["--max-num-waiting", "0"], "'0' is no number above 0"),
        (["--kv-cache-memory", "-1"], "is no size"),
        (["--log-format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    model = write_llama(tmp_path / "m", tokenizer=True)
    try:
        code = main(["serve", str(model), *words])
    except SystemExit as err:
        code = int(err.code or 0)
    err_text = capsys.readouterr().err
    assert code == 2
    assert message in err_text
    assert err_text.count("\n") == 1
