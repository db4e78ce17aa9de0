"""Exit codes, and an error as a user reads it."""

from __future__ import annotations

from enum import IntEnum

from infinilm.plugins.host import hook_note
from infinilm_hookspecs import InfinilmError


class ExitCode(IntEnum):
    """What the process returns to the shell."""

    OK = 0
    INTERNAL_ERROR = 1
    """Something broke that is no fault of the input."""
    USAGE_ERROR = 2
    """An option, a file, a model or a plugin is not as it should be; one line on stderr says how."""
    INTERRUPTED = 130


def is_users(err: Exception) -> bool:
    """Return whether an error is about what the user gave us, plugins included, rather than a bug of ours."""
    return isinstance(err, InfinilmError) or hook_note(err) is not None


def describe(err: Exception) -> str:
    """Return an error's message, with its type where nobody meant to raise it, and the plugin it came from."""
    notes = "".join(f" ({note})" for note in getattr(err, "__notes__", ()))
    if isinstance(err, InfinilmError):
        return f"{err}{notes}"
    hint = "" if is_users(err) else "; this is a bug of infinilm: --debug shows where"
    return f"{type(err).__name__}: {err}{notes}{hint}"
