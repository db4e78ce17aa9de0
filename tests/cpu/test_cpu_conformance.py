"""The conformance suite on the cpu backend as it is installed: in both dtypes, and with every quantization."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from test_cpu_model import rounded_weight

from infinilm.backends.cpu import provide_backend
from infinilm.testing import DECODERS, BackendCase, ConformanceReport, backend_checks, decoder_cases, run_conformance
from infinilm.testing.decoders import with_all_experts
from infinilm.testing.reference import decoder_logits

NOT_SHARED = "cache_spec() says shareable=False: the engine never shares or copies its blocks"
NOT_KEPT = "the backend does not say keeps_parameters = True: it may pack and free its buffers"
NO_WINDOW = "no layer of the model says that it has a sliding window"
NO_REFERENCE = "the case has no reference(values, token_ids), logits that somebody else computed"


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Return activations as they meet integers: 32 of them are int8 and share a scale."""
    size = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -size % 32)).unflatten(-1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scales).nan_to_num(0).round() * scales).flatten(-2)[..., :size]


def case(name: str, dtype: str, quantization: str | None) -> BackendCase:
    """Return the case of a decoder. The reference of a quantized one is float64 on weights and rows that are rounded.

    Only in float32: what bfloat16 rounds besides decides which integer a number near two of them becomes.
    """
    (made,) = decoder_cases(provide_backend, decoders={name: DECODERS[name]}, dtype=dtype, quantization=quantization)
    if quantization is None or dtype != "float32":
        return made
    config = with_all_experts(DECODERS[name])
    linear = torch.nn.functional.linear

    def rounded_linear(x, weight, bias=None):
        is_router = weight.shape[0] == 5
        return linear(x if is_router else rounded_rows(x), weight, bias)

    def logits(values, token_ids):
        is_tied = config.embedding.tied
        rounded = {key: rounded_weight(key, value.float(), quantization, tied=is_tied) for key, value in values.items()}
        with patch.object(torch.nn.functional, "linear", rounded_linear):
            return decoder_logits(config, rounded, token_ids)

    return replace(made, reference=logits, tolerance=1e-2)


def skipped(report: ConformanceReport) -> dict[str, str]:
    return {result.check: result.message for result in report.results if result.outcome == "not applicable"}


@pytest.mark.parametrize("check", backend_checks(*decoder_cases(provide_backend)))
def test_float32(check):
    check()


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("bfloat16", None),
        *(("float32", quantization) for quantization in ("int8", "int4", "int4-g128")),
        *(("bfloat16", quantization) for quantization in ("int8", "int4-g32")),
    ],
)
@pytest.mark.parametrize("name", DECODERS)
def test_in_other_formats(name, dtype, quantization):
    report = run_conformance(case(name, dtype, quantization))
    assert report.has_passed, str(report)
    expected = {"kept_parameters": NOT_KEPT}
    if name != "sliding_window":
        expected["sliding_window"] = NO_WINDOW
    if dtype != "float32" and quantization is not None:
        expected["reference"] = NO_REFERENCE
    if name == "dynamic_rope":  # keys depend on the length of their prompt
        expected |= dict.fromkeys(("shared_prefix", "copy_blocks", "copies_at_once"), NOT_SHARED)
    assert skipped(report) == expected
