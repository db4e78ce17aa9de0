"""Backend libraries compiled for a test: `csrc/tests/fixture.c`, whole or wrong in one way, and other sources."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from infinilm.testing import make_request
from infinilm_hookspecs import (
    AttentionConfig,
    BackendRequest,
    DecoderConfig,
    EmbeddingConfig,
    ForwardBatch,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    NormConfig,
)

ROOT = Path(__file__).parent.parent
INCLUDE = ROOT / "csrc" / "include"
FIXTURE = ROOT / "csrc" / "tests" / "fixture.c"

_numbers = itertools.count()


def unique_name() -> str:
    """Return a name that no library of this process has: what is loaded stays."""
    return f"fixture-{next(_numbers)}"


def compile_library(path: Path, source: Path | str = FIXTURE, *flags: str, language: str = "c") -> Path:
    """Compile a library. `source` is a file, or the text of one."""
    if isinstance(source, str):
        text, source = source, path.with_suffix(".c" if language == "c" else ".cpp")
        source.write_text(text)
    compiler = ("gcc", "-std=c99") if language == "c" else ("g++", "-std=c++17")
    command = [*compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{INCLUDE}"]
    done = subprocess.run([*command, str(source), "-o", str(path), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


def compile_fixture(path: Path, **macros: object) -> Path:
    """Compile the fixture with macros; a string becomes a C string, `True` an empty macro."""
    flags = [f"-D{name}" if value is True else f"-D{name}={_as_c(value)}" for name, value in _named(macros).items()]
    return compile_library(path, FIXTURE, *flags)


def _named(macros: Mapping[str, object]) -> Mapping[str, object]:
    return macros if "NAME" in macros else {"NAME": unique_name(), **macros}


def _as_c(value: object) -> str:
    if not isinstance(value, str):
        return str(value)
    if value.isidentifier() and value.islower() and "_" in value:
        return value  # the name of a function
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def run_python(code: str, *arguments: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=env)


def copy_of(path: Path, target: Path) -> Path:
    """Copy a library to another file."""
    shutil.copyfile(path, target)
    return target


# ---------------------------------------------------------------- what it is asked

VOCAB = 7
CONFIG = DecoderConfig(
    model_type="tiny",
    vocab_size=VOCAB,
    hidden_size=4,
    layers=(LayerConfig(AttentionConfig(1, 1, 4, None), None, LayerNorms()),),
    embedding=EmbeddingConfig(),
    final_norm=NormConfig(),
    logits=LogitsConfig(),
    max_position_embeddings=64,
)


def request(config: Any = CONFIG, **changes: Any) -> tuple[BackendRequest, list[str]]:
    """Return a request, and the list that reasons to decline it go to."""
    reasons: list[str] = []
    changes = {"lineage": (config,), "on_decline": reasons.append, **changes}
    return replace(make_request(CONFIG), **changes), reasons


def batch(tokens: list[int], rows: list[int], **changes: Any) -> ForwardBatch:
    count = len(tokens)
    arrays = {
        "token_ids": tokens,
        "positions": list(range(count)),
        "query_starts": [0, count],
        "context_lengths": [count],
        "block_tables": [[0, 1]],
        "slot_mapping": list(range(count)),
        "slots": [0],
        "logits_indices": rows,
    }
    given = {name: numpy.array(value, dtype=numpy.int32) for name, value in {**arrays, **changes}.items()}
    return ForwardBatch(**given, extras=[None])
