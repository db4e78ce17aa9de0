"""The examples of docs/backends.md run: a backend plugin, its tests by pytest, and the same as a table."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infinilm_hookspecs import Backend

PAGE = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
PLUGIN, TESTS, TABLE, BY_HAND = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "acme.py").write_text(PLUGIN)
    return tmp_path


def run(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tests_of_the_plugin_pass(folder: Path) -> None:
    (folder / "test_acme.py").write_text(TESTS)
    output = run(folder, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test_acme.py")
    assert "[38] " in output
    assert "acme does not know dynamic, qkv_bias, scaling" in output
    assert re.search(r"\d\d passed, \d+ skipped in", output)


def test_table(folder: Path) -> None:
    lines = run(folder, "-c", TABLE).splitlines()
    assert lines[0] == "dense: 37 passed, 1 not applicable"
    assert "dynamic_rope: not applicable: declined: acme does not know dynamic, qkv_bias, scaling" in lines


def test_case_by_hand(folder: Path) -> None:
    run(folder, "-c", BY_HAND)


def test_tests_of_the_plugin_are_ten_lines() -> None:
    assert len(TESTS.splitlines()) <= 10


def test_every_call_of_the_protocol_is_in_the_table() -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    for name, method in inspect.getmembers(Backend, inspect.isfunction):
        if not name.startswith("_"):
            parameters = ", ".join(list(inspect.signature(method).parameters)[1:])
            assert f"`{name}({parameters})`" in table
