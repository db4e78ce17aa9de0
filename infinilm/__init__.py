"""infinilm: an LLM inference engine in which every model, format, processor, backend and platform is a plugin.

Importing it loads no torch; the names below are fetched when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infinilm.llm import LLM
    from infinilm.native.paths import get_cmake_dir, get_include
    from infinilm.outputs import CompletionOutput, Logprob, RequestOutput
    from infinilm.plugins import create_plugin_manager
    from infinilm.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "create_plugin_manager",
    "get_cmake_dir",
    "get_include",
]

_HOMES = {
    "LLM": "infinilm.llm",
    "CompletionOutput": "infinilm.outputs",
    "Logprob": "infinilm.outputs",
    "RequestOutput": "infinilm.outputs",
    "SamplingParams": "infinilm.sampling_params",
    "create_plugin_manager": "infinilm.plugins",
    "get_cmake_dir": "infinilm.native.paths",
    "get_include": "infinilm.native.paths",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'infinilm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
