"""Exit codes, and an error as a user reads it."""

from __future__ import annotations

import re
from enum import IntEnum

from infinilm.loading.stages import RuleNote
from infinilm.plugins.host import hook_note
from infinilm_hookspecs import InfinilmError, PlanError


class ExitCode(IntEnum):
    """What the process returns to the shell."""

    OK = 0
    INTERNAL_ERROR = 1
    """Something broke that is no fault of the input."""
    USAGE_ERROR = 2
    """An option, a file, a model or a plugin is not as it should be; one line on stderr says how."""
    INTERRUPTED = 130


def is_users(err: Exception) -> bool:
    """Return whether an error is about what the user gave us, files and plugins included, rather than a bug of ours."""
    in_rule = any(isinstance(note, RuleNote) for note in getattr(err, "__notes__", ()))
    return isinstance(err, InfinilmError | OSError) or hook_note(err) is not None or in_rule


def describe(err: Exception) -> str:
    """Return an error's message on one line, with the plugin it came from, and its type where nobody meant to raise it.

    A `PlanError` keeps its lines: it is a list.
    """
    notes = "".join(f" ({note})" for note in getattr(err, "__notes__", ()))
    if isinstance(err, PlanError):
        return f"{err}{notes}"
    if isinstance(err, InfinilmError):
        return _on_one_line(f"{err}{notes}")
    hint = "" if is_users(err) else "; this is a bug of infinilm: --debug shows where"
    return _on_one_line(f"{type(err).__name__}: {err}{notes}{hint}")


def _on_one_line(text: str) -> str:
    """Return `text` with a semicolon for every line break that no punctuation stands before."""
    return re.sub(r"([:;,.]?)\s*\n\s*", lambda found: (found[1] or ";") + " ", text.strip())
