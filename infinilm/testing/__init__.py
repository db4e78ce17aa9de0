"""The public kit for plugin authors: a conformance suite for backends, and proof that a model's logits are right.

`decoder_cases(provide_backend)` is what a backend that runs a `DecoderConfig` is tried on, a `BackendCase` any other
model. `run_conformance(case)` returns a report to print; `backend_checks(*cases)` returns the same checks for pytest:

    @pytest.mark.parametrize("check", backend_checks(*decoder_cases(provide_backend)))
    def test_backend(check):
        check()

A plugin that makes a family run is held against transformers on a small random checkpoint, which `spelling` and `names`
write as its own: alone, in a ragged batch with chunks, and with preemption:

    case = ParityCase("acme", LlamaConfig(...), spelling=acme_config, names=acme_names)
    case.examine(tmp_path, plugins=[acme]).check()

Importing it loads no torch; the names below are fetched when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infinilm.testing.backend_case import BackendCase, decoder_cases, hook_case, make_request
    from infinilm.testing.conformance import CHECKS, ConformanceReport, Result, backend_checks, run_conformance
    from infinilm.testing.decoders import DECODERS
    from infinilm.testing.driver import Context, make_batch
    from infinilm.testing.parity import ParityCase, ParitySubject, check_parity
    from infinilm.testing.verdicts import ConformanceError, NotApplicable

__all__ = [
    "CHECKS",
    "DECODERS",
    "BackendCase",
    "ConformanceError",
    "ConformanceReport",
    "Context",
    "NotApplicable",
    "ParityCase",
    "ParitySubject",
    "Result",
    "backend_checks",
    "check_parity",
    "decoder_cases",
    "hook_case",
    "make_batch",
    "make_request",
    "run_conformance",
]

_HOMES = {
    "BackendCase": "backend_case",
    "decoder_cases": "backend_case",
    "hook_case": "backend_case",
    "make_request": "backend_case",
    "CHECKS": "conformance",
    "ConformanceReport": "conformance",
    "Result": "conformance",
    "backend_checks": "conformance",
    "run_conformance": "conformance",
    "DECODERS": "decoders",
    "Context": "driver",
    "make_batch": "driver",
    "ParityCase": "parity",
    "ParitySubject": "parity",
    "check_parity": "parity",
    "ConformanceError": "verdicts",
    "NotApplicable": "verdicts",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'infinilm.testing' has no attribute {name!r}")
    return getattr(import_module(f"infinilm.testing.{_HOMES[name]}"), name)
