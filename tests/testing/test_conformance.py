"""The conformance suite: backends that conform pass it, and every check notices the mistake it is there for."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conforming import SlotBackend, Wrapped, provider
from mistakes import MISTAKES, MODELS, Mistake

import infinilm.testing
from infinilm.backends.torch import provide_backend as provide_torch
from infinilm.platforms.cpu import CpuPlatform
from infinilm.testing import (
    CHECKS,
    DECODERS,
    BackendCase,
    ConformanceError,
    ConformanceReport,
    NotApplicable,
    Result,
    backend_checks,
    decoder_cases,
    hook_case,
    make_request,
    run_conformance,
)
from infinilm.testing.subject import Subject, random_values
from infinilm_hookspecs import Backend, BackendRequest, ConfigError, DecoderConfig, LayerNorms, ParameterSpec

NAMES = [check.__name__.removeprefix("check_") for check in CHECKS]
TORCH_CHECKS = backend_checks(*decoder_cases(provide_torch))


def outcomes(report: ConformanceReport, outcome: str) -> dict[str, str]:
    return {result.check: result.message for result in report.results if result.outcome == outcome}


# ---------------------------------------------------------------- backends that conform


@pytest.mark.parametrize("check", TORCH_CHECKS)
def test_torch(check):
    check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", DECODERS)
def test_torch_in_other_dtypes(name, dtype):
    (case,) = decoder_cases(provider(Wrapped), decoders={name: DECODERS[name]}, dtype=dtype)
    report = run_conformance(case)
    assert report.has_passed, str(report)
    unshared = {"shared_prefix", "copy_blocks", "copies_at_once"} if name == "dynamic_rope" else set()
    assert set(outcomes(report, "not applicable")) <= {"sliding_window", *unshared}


@pytest.mark.parametrize("name", DECODERS)
def test_state_in_slots(name):
    (case,) = decoder_cases(provider(SlotBackend), decoders={name: DECODERS[name]})
    report = run_conformance(case)
    assert report.has_passed, str(report)
    skipped = outcomes(report, "not applicable")
    assert set(skipped) - {"sliding_window"} == {"shared_prefix", "copy_blocks", "copies_at_once"}
    assert all("shareable=False" in reason or "window" in reason for reason in skipped.values()), (
        "skipped for another reason"
    )


def test_short_sequences_and_few_of_them():
    (case,) = decoder_cases(provider(Wrapped), decoders={"dense": DECODERS["dense"]})
    report = run_conformance(replace(case, max_length=9, max_num_seqs=3))
    assert report.has_passed, str(report)
    assert "of up to 9 tokens fill no block of 16" in outcomes(report, "not applicable")["shared_prefix"]


def test_two_cases_hold_every_part_there_is():
    # A part that no model has is a part that no backend is tried on.
    mixers = [layer.mixer for config in DECODERS.values() for layer in config.layers]
    for field in ("rope", "scale", "qkv_bias", "output_bias", "sliding_window", "softcap", "query_key_norm"):
        assert len({getattr(mixer, field) for mixer in mixers}) > 1, field
    norms = [layer.norms for config in DECODERS.values() for layer in config.layers]
    assert LayerNorms(None, None, None, None) not in norms
    assert {type(layer.mlp).__name__ for config in DECODERS.values() for layer in config.layers} == {
        "MlpConfig",
        "MoeConfig",
    }


# ---------------------------------------------------------------- every check can fail


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.culprit.__name__)
def test_mistake_is_noticed(mistake: Mistake):
    (case,) = decoder_cases(mistake.provide, decoders={mistake.decoder: MODELS[mistake.decoder]})
    report = run_conformance(case)
    failed = set(outcomes(report, "failed"))
    assert mistake.noticed_by[0] in failed, str(report)
    # What random steps come across is chance.
    assert failed - {"random_schedule"} == set(mistake.noticed_by) - {"random_schedule"}, str(report)


def test_every_check_has_a_mistake():
    assert {mistake.noticed_by[0] for mistake in MISTAKES} == set(NAMES)


# ---------------------------------------------------------------- what it says


def declines(request: BackendRequest) -> Backend | None:
    return request.decline("this is no toaster")


def test_report_is_a_table():
    report = ConformanceReport(
        "dense",
        (Result("identity", "passed"), Result("close", "failed", "it hangs"), Result("order", "not applicable", "no")),
    )
    assert str(report).splitlines() == [
        "dense: 1 passed, 1 failed, 1 not applicable",
        "passed          identity",
        "failed          close     it hangs",
        "not applicable  order     no",
    ]
    assert not report.has_passed
    assert not report.is_declined


def test_a_crash_is_a_failure_and_says_where():
    class Crashes(Wrapped):
        def forward(self, batch):
            raise ZeroDivisionError("the device is on fire")

    (case,) = decoder_cases(provider(Crashes), decoders={"dense": DECODERS["dense"]})
    message = outcomes(run_conformance(case), "failed")["any_chunks"]
    assert message.startswith("ZeroDivisionError: the device is on fire (test_conformance.py:")
    assert message.endswith("in forward)")


def test_a_backend_that_declines_everything_has_not_passed():
    cases = decoder_cases(declines)
    report = run_conformance(cases[0])
    assert outcomes(report, "not applicable") == dict.fromkeys(NAMES, "declined: this is no toaster")
    assert not report.has_passed
    assert report.is_declined
    assert str(report) == "dense: not applicable: declined: this is no toaster"
    *checks, takes_a_model = backend_checks(*cases)
    with pytest.raises(NotApplicable, match="declined: this is no toaster"):
        checks[0]()
    with pytest.raises(ConformanceError, match="none of 5 cases is run by this backend: dense: declined: this is no"):
        takes_a_model()


def test_a_backend_that_declines_something_passes():
    def provide(request: BackendRequest) -> Backend | None:
        is_dense = request.lineage[-1].model_type.endswith("dense")
        return provider(Wrapped)(request) if is_dense else request.decline("not dense")

    backend_checks(*decoder_cases(provide))[-1]()


def test_declining_without_a_reason_is_a_failure():
    (case,) = decoder_cases(lambda request: None, decoders={"dense": DECODERS["dense"]})
    assert "returned None without a reason" in outcomes(run_conformance(case), "failed")["identity"]


def test_declining_without_naming_what_is_unknown_is_a_failure():
    def provide(request: BackendRequest) -> Backend | None:
        return provider(Wrapped)(request) if isinstance(request.lineage[-1], DecoderConfig) else None

    def curt(request: BackendRequest) -> Backend | None:
        return provide(replace(request, on_decline=lambda reason: request.decline("cannot")))

    (case,) = decoder_cases(curt, decoders={"dense": DECODERS["dense"]})
    failed = outcomes(run_conformance(case), "failed")
    assert set(failed) == {"unknown_parts", "unknown_keys"}
    assert "was declined with 'cannot', which does not name it" in failed["unknown_parts"]


def test_a_case_without_a_hook_or_a_reference_says_what_it_does_not_check():
    (case,) = decoder_cases(provider(Wrapped), decoders={"dense": DECODERS["dense"]})
    bare = BackendCase(name="bare", make=case.make, vocab_size=case.vocab_size, max_length=200)
    report = run_conformance(bare)
    assert report.has_passed, str(report)
    assert outcomes(report, "not applicable") == {
        "parameters_allocate_nothing": "the case has no make_large, a backend with gigabytes of parameters to measure",
        "unknown_parts": "the case has no `provide` and `request`, the plugin's hook and what to ask it",
        "unknown_keys": "the case has no `provide` and `request`, the plugin's hook and what to ask it",
        "reference": "the case has no reference(values, token_ids), logits that somebody else computed",
        "sliding_window": "no layer of the model says that it has a sliding window",
    }


def test_raw_config():
    """A backend of a raw config is asked nothing about a `DecoderConfig`."""
    raw = {"model_type": "dense_by_another_name", "vocab_size": 101, "max_position_embeddings": 128}

    def provide(request: BackendRequest) -> Backend | None:
        inner = provide_torch(replace(request, lineage=(DECODERS["dense"],)))
        backend = Wrapped(inner)
        backend.config = request.lineage[-1]
        return backend

    report = run_conformance(hook_case("raw", provide, make_request(raw)))
    assert report.has_passed, str(report)
    assert outcomes(report, "not applicable")["unknown_keys"] == "the backend took a raw config and no DecoderConfig"


def test_what_a_device_holds_is_measured_where_its_platform_says():
    class Toaster(CpuPlatform):
        in_use = 0

        def memory(self, device: str) -> tuple[int, int]:
            return (1 << 40) - Toaster.in_use, 1 << 40

    class AllocatesOnTheDevice(Wrapped):
        def parameters(self):
            specs = super().parameters()
            Toaster.in_use += sum(4 * math.prod(spec.shape) for spec in specs.values())
            return specs

    def provide(request: BackendRequest) -> Backend | None:
        assert request.device == "toaster:0"
        return provider(AllocatesOnTheDevice)(replace(request, device="cpu"))

    (case,) = decoder_cases(provide, decoders={"dense": DECODERS["dense"]}, device="toaster:0", platform=Toaster())
    (result,) = (result for result in run_conformance(case).results if result.check == "parameters_allocate_nothing")
    assert result.message.startswith("memory in use on the device grew by 75")


def test_what_every_model_takes_is_not_held_against_a_backend():
    class Reserves(Wrapped):
        def __init__(self, inner: Backend) -> None:
            super().__init__(inner)
            self.reserved = mmap.mmap(-1, 2 << 30)  # as threads do for their stacks and arenas

        def close(self) -> None:
            self.reserved.close()
            super().close()

    (case,) = decoder_cases(provider(Reserves), decoders={"dense": DECODERS["dense"]})
    report = run_conformance(case)
    assert report.has_passed, str(report)


def test_what_a_case_needs_is_said():
    with pytest.raises(ConfigError, match="the last config has max_position_embeddings=None, and a case needs that"):
        make_request({"model_type": "toaster"})
    with pytest.raises(ConfigError, match="device 'toaster:0' needs its platform, which knows its memory"):
        make_request(DECODERS["dense"], device="toaster:0")
    with pytest.raises(ConfigError, match="the last config has vocab_size='many', and a case needs that number"):
        hook_case("raw", declines, make_request({"max_position_embeddings": 9, "vocab_size": "many"}))


def test_a_dtype_without_a_tolerance_needs_one():
    (case,) = decoder_cases(provider(Wrapped), decoders={"dense": DECODERS["dense"]})
    assert Subject(replace(case, tolerance=0.25)).tolerance == 0.25
    with pytest.raises(ConformanceError, match="dtype 'float8_e5m2' has no tolerance of its own; give the case one"):
        _ = Subject(replace(case, dtype="float8_e5m2")).tolerance


def test_packed_parameters_need_values_of_their_own():
    with pytest.raises(ConformanceError, match=r"parameter 'w' is 'uint8', which random .*; give the case `values`"):
        random_values("w", ParameterSpec((2, 2), "uint8"), 0)


def test_values_do_not_depend_on_the_order_of_names():
    spec = ParameterSpec((3, 3), "float32")
    assert torch.equal(random_values("a", spec, 0), random_values("a", spec, 0))
    assert not torch.equal(random_values("a", spec, 0), random_values("b", spec, 0))
    assert not torch.equal(random_values("a", spec, 0), random_values("a", spec, 1))


# ---------------------------------------------------------------- the package


def test_every_public_name_is_there():
    for name in infinilm.testing.__all__:
        assert getattr(infinilm.testing, name) is not None
    with pytest.raises(AttributeError, match=r"module 'infinilm\.testing' has no attribute 'toaster'"):
        _ = infinilm.testing.toaster


def test_import_loads_nothing_heavy():
    code = (
        "import sys, infinilm.testing; from infinilm.testing import BackendCase, decoder_cases, DECODERS; "
        "print([name for name in ('torch', 'numpy', 'pytest', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
