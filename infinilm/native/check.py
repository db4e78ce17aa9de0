"""Trying a backend library: what its file says, then whether a process that opens it lives.

A library can throw in a static constructor, run an instruction that this processor lacks, or never return: each step
is a process of its own, so that all of these are findings.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from infinilm.native.elf import ElfReport, read_library
from infinilm.native.libraries import open_library
from infinilm_hookspecs import PluginError

ENTRY: Final = "infinilm_backend_entry"
_FOREIGN: Final = ("libpython", "libtorch", "libc10", "_native")  # what a backend must not be linked to
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """What one step found. A step that `failed` is one that users would meet; a `note` is advice."""

    step: str
    outcome: Literal["ok", "note", "failed"]
    message: str


def check_file(path: str) -> Iterator[Finding]:
    """Yield what the file says, without running any of it."""
    try:
        report = read_library(path)
    except PluginError as err:
        yield Finding("file", "failed", str(err))
        return
    yield _exports(report)
    if report.num_initializers:
        yield Finding(
            "initializers",
            "note",
            f"{report.num_initializers} functions run while it is opened, where nobody can catch what they throw; "
            "construct what they construct in create()",
        )
    else:
        yield Finding("initializers", "ok", "nothing of its own runs while it is opened")
    foreign = [name for name in report.needs if any(part in name for part in _FOREIGN)]
    if foreign:
        yield Finding("needs", "failed", f"it is linked to {', '.join(foreign)}; a backend needs nothing of its host")
    else:
        yield Finding("needs", "ok", ", ".join(report.needs) or "no other library")


def _exports(report: ElfReport) -> Finding:
    if ENTRY not in report.exports:
        return Finding("exports", "failed", f"it does not export {ENTRY}; declare that with INFINILM_EXPORT")
    others = [name for name in report.exports if name != ENTRY]
    if others:
        more = ", ..." if len(others) > _SHOWN else ""
        shown = ", ".join(others[:_SHOWN]) + more
        return Finding(
            "exports",
            "note",
            f"{len(others)} names beside the entry: {shown}; infinilm_add_backend of CMake hides them",
        )
    return Finding("exports", "ok", f"{ENTRY} alone")


def run_step(step: str, command: Sequence[str], timeout: float) -> Finding:
    """Run one step in a process of its own, and return what became of it. `timeout` is in seconds.

    The process prints its finding, `ok: ...`, `note: ...` or `failed: ...`, last; lines before it are shown.
    """
    try:
        done = subprocess.run(
            [*command], capture_output=True, text=True, errors="replace", check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return Finding(step, "failed", f"hangs: the process was killed after {timeout:g} seconds")
    *before, last = done.stdout.rstrip().split("\n")
    outcome, _, message = last.partition(": ")
    words = "".join(f"\n{line}" for line in before)
    if done.returncode == 0 and outcome in ("ok", "note"):
        return Finding(step, "ok" if outcome == "ok" else "note", message + words)
    if done.returncode > 0 and outcome == "failed":
        return Finding(step, "failed", message + words)
    complaint = done.stderr.strip().split("\n")[-1]
    when = "after it had said: " + message if outcome == "ok" else f"its last words: {complaint or 'none'}"
    return Finding(step, "failed", f"crashes: {_how_it_ended(done.returncode)}, {when}")


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"the process was killed by {name}"


# ---------------------------------------------------------------- what runs in those processes


def open_alone(path: str) -> str:
    """Open the library and do nothing with it. Returns the finding."""
    try:
        ctypes.CDLL(path)
    except OSError as err:
        return f"failed: {err}"
    return "ok: the dynamic linker takes it"


def load(path: str) -> str:
    """Load the library as `load_backend_plugin` does. Returns the finding."""
    try:
        library = open_library(path)
    except PluginError as err:
        return f"failed: {err}"
    return f"ok: {library.name} {library.version}, ABI {library.abi}, built with: {library.build or 'it does not say'}"


STEPS: Final[dict[str, Callable[[str], str]]] = {"open": open_alone, "load": load}


def command_of(step: str, path: str) -> list[str]:
    """Return the command that runs one of STEPS."""
    code = f"import sys; from infinilm.native import check; sys.exit(check.tell(check.STEPS[{step!r}](sys.argv[1])))"
    return [sys.executable, "-c", code, path]


def tell(finding: Any) -> int:
    """Print the finding of a step, and return the exit code that goes with it."""
    print(finding, flush=True)
    return 1 if str(finding).rsplit("\n", 1)[-1].startswith("failed: ") else 0
