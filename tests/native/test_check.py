"""`infinilm plugins check`: what a file says, and what becomes of processes that open a library that is not sound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from native_fixtures import FIXTURE, compile_fixture, compile_library

from infinilm.native.check import check_file
from infinilm.native.elf import read_library
from infinilm_hookspecs import PluginError


def check(path: Path, *arguments: object) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run the command, and return its exit code and its findings by step."""
    command = [sys.executable, "-m", "infinilm", "plugins", "check", str(path), "--json", "--no-conformance"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    findings = json.loads(done.stdout)
    return done.returncode, {its["step"]: (its["outcome"], its["message"]) for its in findings}


ENTRY = """
#include "infinilm/backend.h"
const infinilm_backend_table *infinilm_backend_entry(uint32_t, uint32_t) { return nullptr; }
"""


@pytest.mark.parametrize("written", ["whole", "bare"])
def test_sound_library_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    path = compile_fixture(tmp_path / "good.so", NAME="good")
    monkeypatch.chdir(tmp_path)
    code, found = check(path if written == "whole" else Path("good.so"))
    assert code == 0
    assert found["needs"] == ("ok", "libc.so.6")
    assert found["initializers"][0] == found["open"][0] == "ok"
    assert found["load"] == ("ok", "good 0.1, ABI 1.0, built with: fixture.c")
    assert found["exports"] == (
        "note",
        "1 names beside the entry: shared_counter; infinilm_add_backend of CMake hides them",
    )


def test_static_initializers_are_counted(tmp_path: Path) -> None:
    code = ENTRY + "struct A { A(); int value; }; A::A() : value(3) {} static A first, second;\n"
    path = compile_library(tmp_path / "static.so", code, language="c++")
    assert read_library(path).num_initializers == 1
    (note,) = [finding for finding in check_file(str(path)) if finding.outcome == "note"]
    assert note.message.startswith("1 functions run while it is opened")
    assert read_library(compile_library(tmp_path / "plain.so", ENTRY, language="c++")).num_initializers == 0


def test_library_without_the_entry_fails(tmp_path: Path) -> None:
    code, found = check(compile_fixture(tmp_path / "other.so", ENTRY_NAME="another_entry"))
    assert code == 2
    assert found["exports"][0] == found["load"][0] == "failed"
    assert "stage 'entry'" in found["load"][1]


def test_library_linked_to_python_fails(tmp_path: Path) -> None:
    path = compile_library(
        tmp_path / "libpython9.so", "int nothing_of_python(void) { return 0; }", "-Wl,-soname,libpython9.so"
    )
    linked = compile_library(tmp_path / "linked.so", FIXTURE, "-Wl,--no-as-needed", str(path))
    findings = {finding.step: finding for finding in check_file(str(linked))}
    assert findings["needs"].outcome == "failed"
    assert "libpython9.so; a backend needs nothing of its host" in findings["needs"].message


@pytest.mark.parametrize(
    ("code", "step", "words"),
    [
        (
            'struct T { T() { throw "too early"; } }; static T thrown;',
            "open",
            "crashes: the process was killed by SIGABRT",
        ),
        ("struct T { T() { __builtin_trap(); } }; static T trap;", "open", "crashes: the process was killed by SIGILL"),
        (
            "volatile int zero; struct T { T() { while (!zero) continue; } }; static T hang;",
            "open",
            "hangs: the process was killed",
        ),
    ],
)
def test_crash_and_hang_while_it_is_opened_are_findings(tmp_path: Path, code: str, step: str, words: str) -> None:
    path = compile_library(tmp_path / "bad.so", ENTRY + code, language="c++")
    exit_code, found = check(path, "--timeout", 2)
    assert exit_code == 2
    assert found["initializers"][0] == "note"
    assert found[step][0] == "failed"
    assert words in found[step][1]
    assert "load" not in found


CRASHES_LATER = """
#include "infinilm/backend.h"
const infinilm_backend_table *infinilm_backend_entry(uint32_t, uint32_t) { __builtin_trap(); }
"""
CRASHES_AT_THE_END = """
#include <stdlib.h>
__attribute__((destructor)) static void leave(void) { abort(); }
"""


def test_crash_in_the_entry_is_a_finding(tmp_path: Path) -> None:
    code, found = check(compile_library(tmp_path / "entry.so", CRASHES_LATER, language="c++"))
    assert code == 2
    assert found["open"][0] == "ok"
    assert "killed by SIGILL" in found["load"][1]


def test_crash_at_the_end_of_the_process_is_a_finding(tmp_path: Path) -> None:
    part = compile_library(tmp_path / "end.o", CRASHES_AT_THE_END, "-c")
    code, found = check(compile_library(tmp_path / "end.so", FIXTURE, str(part), '-DNAME="end"'))
    assert code == 2
    assert "killed by SIGABRT, after it had said: the dynamic linker takes it" in found["open"][1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it begins with b''"),
        (b"text", "it begins with b'text'"),
        (b"\x7fELF\x02\x01" + b"\xff" * 58, "damaged ELF"),
    ],
)
def test_file_that_is_no_library_fails_and_no_process_is_started(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong.so"
    path.write_bytes(content)
    with pytest.raises(PluginError, match="ELF file"):
        read_library(path)
    code, found = check(path)
    assert (code, list(found)) == (2, ["file"])
    assert words in found["file"][1]
