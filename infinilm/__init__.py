"""infinilm: an LLM inference engine in which every model, format, processor, backend and platform is a plugin.

Importing it loads no torch; the names below are fetched when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infinilm.async_llm import AsyncLLM, QueueFullError
    from infinilm.engine.stats import EngineStats
    from infinilm.llm import LLM
    from infinilm.native.paths import get_cmake_dir, get_include
    from infinilm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from infinilm.plugins import create_plugin_manager
    from infinilm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineStats",
    "Logprob",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "create_plugin_manager",
    "get_cmake_dir",
    "get_include",
]

_HOMES = {
    "LLM": "infinilm.llm",
    "AsyncLLM": "infinilm.async_llm",
    "CompletionOutput": "infinilm.outputs",
    "EngineStats": "infinilm.engine.stats",
    "Logprob": "infinilm.outputs",
    "QueueFullError": "infinilm.async_llm",
    "RequestMetrics": "infinilm.outputs",
    "RequestOutput": "infinilm.outputs",
    "RequestOutputKind": "infinilm.sampling_params",
    "SamplingParams": "infinilm.sampling_params",
    "StructuredOutputsParams": "infinilm.sampling_params",
    "create_plugin_manager": "infinilm.plugins",
    "get_cmake_dir": "infinilm.native.paths",
    "get_include": "infinilm.native.paths",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'infinilm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
