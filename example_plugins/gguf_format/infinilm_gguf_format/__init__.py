"""GGUF: one file with weights, config, tokenizer and chat template, as llama.cpp runs it.

The tensor names and the metadata keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infinilm_gguf_format.config import to_huggingface
from infinilm_gguf_format.names import weight_table
from infinilm_hookspecs import Config, WeightRule, hookimpl

if TYPE_CHECKING:
    from infinilm_gguf_format.checkpoint import GgufCheckpoint

model_types = ("gguf",)


@hookimpl
def open_checkpoint(source: str) -> GgufCheckpoint | None:
    from infinilm_gguf_format import checkpoint

    path = checkpoint.find_file(source)
    return None if path is None else checkpoint.GgufCheckpoint(path)


@hookimpl
def adapt_config(config: Config) -> dict[str, Any] | None:
    return to_huggingface(config) if config["model_type"] == "gguf" else None


@hookimpl
def remap_weight(config: Config) -> WeightRule | None:
    return weight_table(config) if config["model_type"] == "gguf" else None
