"""`infinilm bench`: figures of a model in this process and of a live server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints_made import write_llama

from infinilm.cli import main
from infinilm.cli.bench_http import HttpClient
from infinilm.cli.bench_report import distribution
from infinilm_hookspecs import UnavailableError


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = main(["bench", *map(str, words)])
    except SystemExit as err:
        code = int(err.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("action", "count"), [("latency", ["--num-iters", 2]), ("throughput", ["--num-prompts", 3])])
def test_model_in_this_process_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, count: list[object]
) -> None:
    model, path = write_llama(tmp_path / "m", tokenizer=True), tmp_path / "figures.json"
    lengths = ("--input-len", 5, "--output-len", 4)
    code, out, err = bench(capsys, action, model, *lengths, *count, "--json", path)
    assert (code, err) == (0, "")
    report = json.loads(path.read_text())
    assert out.splitlines()[0] == report["command"] == f"bench {action}"
    assert report["figures"]["output tokens/s"] > 0
    assert report["settings"]["input_len"] == 5
    assert {"time to first token", "inter-token latency"} <= report["distributions"].keys()
    assert len(report["distributions"]["time to first token"]["values"]) == int(str(count[1]))


def test_percentiles_are_those_of_the_statistics_module() -> None:
    values = [((7 * at) % 101) / 10 for at in range(101)]
    found = distribution(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for name, value in found.percentiles.items():
        assert value == pytest.approx(1000 * cuts[int(name[1:]) - 1])
    assert found.mean == pytest.approx(1000 * statistics.mean(values))
    one = distribution([0.5])
    assert set(one.percentiles.values()) == {one.mean, one.minimum, one.maximum} == {500.0}


# ---------------------------------------------------------------- a server of made-up answers


class Handler(BaseHTTPRequestHandler):
    """Answers every third request with an error, every fifth with a stream that breaks off, the rest with tokens."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bodies: list[dict[str, Any]]
    keys: set[str | None]
    fails: bool

    def do_GET(self) -> None:
        content = b'{"data": [{"id": "made-up"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.keys.add(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        number = len(self.bodies)
        if self.fails and number % 3 == 0:
            self.send_error(500, "on fire")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self._chunk('data: {"choices": [{"text": "x"}], "usage": null}\n\n')
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        self._chunk(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n")
        if not (self.fails and number % 5 == 0):
            self._chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def made_up() -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Handler", (Handler,), {"bodies": [], "keys": set(), "fails": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_server_is_driven_and_figures_are_printed_written_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made_up: tuple[str, type[Handler]]
) -> None:
    url, handler = made_up
    paths = ("--json", tmp_path / "figures.json", "--plot", tmp_path / "picture.png")
    options = ("--num-requests", 12, "--num-clients", 3, "--output-len", 5, "--input-len", 4, "--api-key", "k3y")
    code, out, err = bench(capsys, "serve", "--base-url", f"{url}/v1", *options, *paths)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["figures"]["requests"] == 12
    assert report["figures"]["errors"] == 0
    assert report["figures"]["output tokens/s"] == pytest.approx(60 / report["figures"]["seconds"])
    assert len(report["distributions"]["time to first token"]["values"]) == 12
    assert len(report["distributions"]["inter-token latency"]["values"]) == 12 * 4
    assert sum(report["events_by_second"]) == 60
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for word in ("p50", "p99", "time to first token", "whole answer", "requests/s"):
        assert word in out
    assert handler.keys == {"Bearer k3y"}
    assert "k3y" not in (tmp_path / "figures.json").read_text() + out
    assert {body["model"] for body in handler.bodies} == {"made-up"}
    assert {len(body["prompt"].split()) for body in handler.bodies} == {4}
    assert len({body["prompt"] for body in handler.bodies}) == 12


def test_errors_are_counted_by_what_they_say(
    capsys: pytest.CaptureFixture[str], made_up: tuple[str, type[Handler]]
) -> None:
    url, handler = made_up
    handler.fails = True
    code, out, _ = bench(
        capsys, "serve", "--base-url", url, "--num-requests", 15, "--num-clients", 1, "--output-len", 2
    )
    assert code == 0
    assert "5 x UnavailableError: the server answered 500" in out
    assert "2 x UnavailableError: the answer broke off before [DONE]" in out


def test_arrivals_are_a_poisson_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made_up: tuple[str, type[Handler]], monkeypatch: Any
) -> None:
    """The gaps asked for are exponential, about the mean that the rate says; time itself is not waited for."""
    gaps: list[float] = []
    from infinilm.cli import bench_serve

    exponential = bench_serve.random.Random.expovariate

    def drawing(self: Any, rate: float) -> float:
        gaps.append(exponential(self, rate))
        return gaps[-1] / 1000

    monkeypatch.setattr(bench_serve.random.Random, "expovariate", drawing)
    code, _, _ = bench(
        capsys, "serve", "--base-url", made_up[0], "--num-requests", 120, "--request-rate", 4, "--output-len", 1
    )
    assert code == 0
    assert len(gaps) == 120
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.2)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.3)  # of an exponential, it is the mean


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base-url", "http://127.0.0.1:1"], "no server at 127.0.0.1 port 1"),
        (["--base-url", "ftp://x"], "'ftp://x' is no address of a server"),
        (["--request-rate", "0"], "'0' is no number above 0"),
        (["--duration", "1", "--num-requests", "2"], "not allowed with argument"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = bench(capsys, "serve", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_picture_without_matplotlib_is_refused_before_the_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    made_up: tuple[str, type[Handler]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    url, handler = made_up
    code, _, err = bench(capsys, "serve", "--base-url", url, "--plot", tmp_path / "x.png")
    assert code == 2
    assert "--plot needs matplotlib; install it with: pip install matplotlib" in err
    assert handler.bodies == []


def test_client_reads_answers_however_they_are_cut() -> None:
    """Chunks that cut lines and characters, and one that is empty of data."""
    answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"4\r\ndata\r\n5\r\n: \xc3\xa9\n\r\n1\r\n\n\r\n7;x=y\r\ndata: a\r\n2\r\n\n\n\r\n"
        b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    )

    async def read() -> list[str]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n{}")
            for at in range(len(answer)):
                writer.write(answer[at : at + 1])
                await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = HttpClient(f"127.0.0.1:{port}")
            return [data async for data in client.stream_events("/v1/completions", {})]

    assert asyncio.run(read()) == ["é", "a"]


def test_client_says_what_an_answer_lacked() -> None:
    async def ask(answer: bytes) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await HttpClient(f"127.0.0.1:{port}").get_json("/")

    with pytest.raises(UnavailableError, match="closed the connection without an answer"):
        asyncio.run(ask(b""))
    with pytest.raises(UnavailableError, match="the server answered 404: nothing here"):
        asyncio.run(ask(b"HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\n\r\nnothing here"))
