"""The server's page: its examples run, and its tables name every option, metric and status there is."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import httpx
from live_server import DEMO, DEMO_PLUGIN, LiveServer, serving

from infinilm import LLM
from infinilm.cli import serve
from infinilm.server.protocol import ChatRequest, CompletionRequest
from infinilm.server.settings import Limits

PAGE = (Path(__file__).parent.parent.parent / "docs" / "server.md").read_text()


def test_python_of_the_page_runs_from_top_to_bottom() -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    llm = LLM(DEMO / "model", plugins=DEMO_PLUGIN, kv_cache_memory=2**24)
    with serving(llm, served_model_names=("demo",)) as live:
        exec(compile(code.replace("http://127.0.0.1:8000", live.url), "docs/server.md", "exec"), {})


def test_metrics_of_the_page_are_those_there_are(server: LiveServer) -> None:
    told = set(re.findall(r"`(infinilm_\w+?)(?:\{.*?\})?`", PAGE))
    shown = set(re.findall(r"^# TYPE (\w+) ", httpx.get(f"{server.url}/metrics").text, re.MULTILINE))
    assert {re.sub(r"_total$", "", name) for name in told} == {
        re.sub(r"_total$", "", name) for name in shown if not name.endswith("_created")
    }


def test_limits_of_the_page_are_those_there_are() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) - options == {
        "--request-rate",
        "--num-clients",
        "--json",
        "--plot",
    }
    told = dict(re.findall(r"^\| `(--max-[a-z-]+|--request-timeout)` \| .* \| (\S+) \|$", PAGE, re.MULTILINE))
    defaults = Limits()
    for option, value in told.items():
        if value.isdecimal():
            assert getattr(defaults, option[2:].replace("-", "_")) == int(value), option
    assert told["--max-body-size"] == f"{defaults.max_body_size // 2**20}M"


def test_fields_the_page_names_as_taken_are_taken() -> None:
    start = PAGE.index("vLLM's as fields of their own")
    listed = re.findall(r"`([a-z_]+)`", PAGE[start : PAGE.index("```python", start)])
    known = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    inside = {"extra_body", "json", "regex", "choice", "grammar", "json_object"}
    assert set(listed) - inside <= known
