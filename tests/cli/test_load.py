"""A server under load: no error, no block left behind, no memory that grows."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_process import serve

from infinilm.cli import main

DEMO = Path(__file__).parent.parent.parent / "example_plugins" / "minimal"
PROMPTS = ("seven plus eight is", "ninety-nine plus ninety-nine is", "three minus nine is", "one plus one is")


def load(tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: int) -> tuple[dict[str, float], int]:
    """Drive a server of the demo model with 64 clients. Return the figures, and how much it grew in the second half."""
    plugin = ("-p", "no:minimal", "-p", str(DEMO / "infinilm_minimal.py"))
    with serve(DEMO / "model", *plugin) as server:
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        options = ["--num-clients", "64", "--duration", str(seconds), "--output-len", "64", "--ignore-eos"]
        sizes: list[int] = []
        half = threading.Timer(seconds / 2, lambda: sizes.append(server.resident_bytes()))
        half.start()
        path = tmp_path / "figures.json"
        assert main(["bench", "serve", "--base-url", server.url, *options, *prompts, "--json", str(path)]) == 0
        sizes.append(server.resident_bytes())
        half.join()
        time.sleep(0.2)
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        gauges = {family.name: family.samples[0].value for family in families if family.type == "gauge"}
        assert gauges["infinilm_requests_running"] == gauges["infinilm_requests_waiting"] == 0
        assert gauges["infinilm_cache_blocks_free"] == gauges["infinilm_cache_blocks"]
        assert "ERROR" not in server.end()
    capsys.readouterr()
    return json.loads(path.read_text())["figures"], sizes[1] - sizes[0]


def test_server_stands_a_short_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, _ = load(tmp_path, capsys, 5)
    assert figures["errors"] == 0
    assert figures["requests"] >= 64


@pytest.mark.slow
def test_server_stands_two_minutes_and_does_not_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, growth = load(tmp_path, capsys, 120)
    assert figures["errors"] == 0
    assert growth < 8e6, figures
