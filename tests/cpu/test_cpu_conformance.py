"""The conformance suite on the cpu backend as it is installed: in both dtypes, and with every quantization."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_cpu_model import rounded_weight

from infinilm.backends.cpu import provide_backend
from infinilm.testing import DECODERS, BackendCase, ConformanceReport, backend_checks, decoder_cases, run_conformance
from infinilm.testing.decoders import with_all_experts
from infinilm.testing.reference import decoder_logits

NOT_APPLICABLE = {
    "sliding_window": "no layer of the model says that it has a sliding window",
    "kept_parameters": "the backend does not say keeps_parameters = True: it may pack and free its buffers",
}


def case(name: str, dtype: str, quantization: str | None) -> BackendCase:
    """Return the case of a decoder; the reference of quantized weights is float64 on what they are rounded to."""
    (made,) = decoder_cases(
        provide_backend, decoders={name: DECODERS[name]}, dtype=dtype, quantization=quantization
    )
    if quantization is None:
        return made
    config = with_all_experts(DECODERS[name])

    def logits(values, token_ids):
        is_tied = config.embedding.tied
        rounded = {
            key: rounded_weight(key, value.float(), quantization, tied=is_tied) for key, value in values.items()
        }
        return decoder_logits(config, rounded, token_ids)

    return replace(made, reference=logits)


def assert_passed(report: ConformanceReport, name: str) -> None:
    assert report.has_passed, str(report)
    skipped = {result.check: result.message for result in report.results if result.outcome == "not applicable"}
    if name == "sliding_window":
        assert "sliding_window" not in skipped
        skipped["sliding_window"] = NOT_APPLICABLE["sliding_window"]
    assert skipped == NOT_APPLICABLE


@pytest.mark.parametrize("check", backend_checks(*decoder_cases(provide_backend)))
def test_float32(check):
    check()


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("bfloat16", None), ("float32", "int8"), ("bfloat16", "int8"), ("float32", "int4"), ("bfloat16", "int4-g128")],
)
@pytest.mark.parametrize("name", DECODERS)
def test_in_other_formats(name, dtype, quantization):
    assert_passed(run_conformance(case(name, dtype, quantization)), name)
