"""Servers that many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import DEMO, DEMO_PLUGIN, MODEL, LiveServer, serving, write_tiny
from openai import OpenAI

from infinilm import LLM


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template that knows tools."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(tiny: Path) -> Iterator[LiveServer]:
    """A server of the tiny model."""
    with serving(LLM(tiny, max_num_seqs=16, kv_cache_memory=2**22)) as live:
        yield live


@pytest.fixture(scope="session")
def demo() -> Iterator[LiveServer]:
    """A server of the demo model, which calculates."""
    llm = LLM(DEMO / "model", plugins=DEMO_PLUGIN, max_num_seqs=64, kv_cache_memory=2**26)
    with serving(llm, served_model_names=(MODEL, "demo")) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> OpenAI:
    """OpenAI's client of the tiny model's server."""
    return server.client


@pytest.fixture
def calculator(demo: LiveServer) -> OpenAI:
    """OpenAI's client of the demo model's server."""
    return demo.client
