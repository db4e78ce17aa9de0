"""The conformance suite on models that run in each way there is."""

from __future__ import annotations

import pytest
from overrides import OVERRIDES
from tiny import tiny_config

from infinilm.backends.transformers import provide_backend
from infinilm.testing.backend_case import hook_case, make_request
from infinilm.testing.conformance import run_conformance

MOST = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3n_text", "gpt_oss", "jamba")]


@pytest.mark.parametrize("model_type", ["cohere2", "mamba2", *MOST])
def test_suite(model_type: str) -> None:
    config = tiny_config(model_type, OVERRIDES.get(model_type, {})).to_dict()
    request = make_request({**config, "model_type": model_type, "max_position_embeddings": 128})
    report = run_conformance(hook_case(model_type, provide_backend, request))
    assert report.has_passed, str(report)
