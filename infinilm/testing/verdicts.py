"""What a check may say besides nothing, which is that all is well."""

from __future__ import annotations

import unittest


class ConformanceError(AssertionError):
    """A backend or a model does not do what it must; the message says what, by how much, and what was expected."""


class NotApplicable(unittest.SkipTest):
    """A check does not concern this backend or this model, and why. pytest and unittest show it as skipped."""


def require(is_so: bool, message: str) -> None:
    """Raise `ConformanceError` with `message` unless it is so."""
    if not is_so:
        raise ConformanceError(message)
