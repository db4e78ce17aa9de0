"""What an operator asks a server: models, health, metrics, version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import MODEL, LiveServer, serving
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from infinilm import LLM, __version__


def metrics_of(server: LiveServer) -> dict[str, float]:
    """Return every sample by its name and labels, read by Prometheus' own parser."""
    response = httpx.get(f"{server.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_models_are_listed_by_every_name(calculator: OpenAI) -> None:
    models = list(calculator.models.list())
    assert [model.id for model in models] == [MODEL, "demo"]
    assert {model.object for model in models} == {"model"}
    assert models[1].model_dump()["root"] == MODEL
    assert models[0].model_dump()["max_model_len"] == 2048
    assert calculator.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="'gpt-9'"):
        calculator.models.retrieve("gpt-9")
    answer = calculator.completions.create(model="demo", prompt="one plus one is", temperature=0)
    assert answer.model == MODEL


def test_name_of_a_model_may_have_slashes(tiny: Path) -> None:
    with serving(LLM(tiny, kv_cache_memory=2**20), served_model_names=("org/model",)) as live:
        assert live.client.models.retrieve("org/model").id == "org/model"


def test_metrics_count_what_was_served(tiny: Path) -> None:
    with serving(LLM(tiny, max_num_seqs=4, kv_cache_memory=2**21)) as live:
        before = metrics_of(live)
        assert before["infinilm_requests_running"] == before["infinilm_cache_usage_ratio"] == 0
        assert before["infinilm_cache_blocks"] == before["infinilm_cache_blocks_free"] > 0
        for stream in (False, True):
            answer = live.client.completions.create(
                model=MODEL, prompt="x" * 40, max_tokens=5, stream=stream, extra_body={"ignore_eos": True}
            )
            if stream:
                list(answer)
        with pytest.raises(openai.NotFoundError):
            live.client.completions.create(model="x", prompt="x")
        with live.pausing(after=1):
            running: Any = live.client.completions.with_streaming_response
            with running.create(model=MODEL, prompt="x" * 40, max_tokens=5, stream=True):
                live.wait_until(lambda it: it.num_running == 1)
                during = metrics_of(live)
                assert during["infinilm_requests_running"] == 1
                assert during["infinilm_cache_usage_ratio"] > 0
        live.wait_until_idle()
        after = metrics_of(live)
    assert after["infinilm_prompt_tokens_total"] == 120
    assert after["infinilm_generation_tokens_total"] >= 10
    assert after["infinilm_prefix_cache_hits_total"] > 0
    assert after["infinilm_prefix_cache_queries_total"] >= 80
    assert after["infinilm_answers_finished_total reason=length"] >= 2
    assert after["infinilm_weight_version version=0"] == 1
    assert after["infinilm_http_requests_total method=POST path=/v1/completions status=200"] == 3
    assert after["infinilm_http_requests_total method=POST path=/v1/completions status=404"] == 1
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_duration_seconds"):
        assert after[f"infinilm_{name}_count"] >= 2
        assert 0 < after[f"infinilm_{name}_sum"] < 60


def test_clients_cannot_make_up_metrics(server: LiveServer) -> None:
    for path in ("/nowhere", "/v1/models/x1", "/v1/models/x2", "/v1/models/%00"):
        httpx.get(f"{server.url}{path}")
    text = httpx.get(f"{server.url}/metrics").text
    paths = set(re.findall(r'path="([^"]*)"', text))
    assert "unmatched" in paths
    assert "/v1/models/{name}" in {path.replace(":path", "") for path in paths}
    assert not any("x1" in path or "nowhere" in path for path in paths)


def test_each_app_has_metrics_of_its_own(server: LiveServer, tiny: Path) -> None:
    with serving(LLM(tiny, kv_cache_memory=2**20)) as live:
        assert metrics_of(live)["infinilm_prompt_tokens_total"] == 0


def test_version_names_the_plugins(demo: LiveServer) -> None:
    found = httpx.get(f"{demo.url}/version").json()
    assert (found["version"], found["model"], found["weight_version"]) == (__version__, MODEL, "0")
    plugins = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert plugins["llama"]["origin"] == "in-tree"
    assert "infinilm_minimal.py" in plugins
    assert "minimal" not in plugins  # it is blocked


def test_health(server: LiveServer) -> None:
    response = httpx.get(f"{server.url}/health")
    assert (response.status_code, response.json()["status"]) == (200, "ok")
