"""The conformance suite for backends: every check, run as a report or as tests of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Final, Literal

from infinilm.testing import check_cache, check_contract, check_loading, check_steps
from infinilm.testing.backend_case import BackendCase
from infinilm.testing.subject import Subject
from infinilm.testing.verdicts import ConformanceError, NotApplicable

Check = Callable[[Subject], None]

CHECKS: Final[Sequence[Check]] = (
    check_contract.check_identity,
    check_contract.check_parameters,
    check_contract.check_parameters_allocate_nothing,
    check_contract.check_unknown_parts,
    check_contract.check_unknown_keys,
    check_loading.check_destinations,
    check_loading.check_unknown_parameter,
    check_loading.check_missing_parameter,
    check_contract.check_cache_spec,
    check_steps.check_context_matters,
    check_steps.check_order_matters,
    check_steps.check_reference,
    check_steps.check_any_chunks,
    check_steps.check_block_tables,
    check_steps.check_padded_block_tables,
    check_steps.check_ragged_batch,
    check_steps.check_many_sequences,
    check_steps.check_rows_asked_for,
    check_steps.check_logits_are_kept,
    check_steps.check_inputs,
    check_steps.check_no_prompt_lengths,
    check_steps.check_determinism,
    check_steps.check_sliding_window,
    check_cache.check_slots_are_reused,
    check_cache.check_stale_values,
    check_cache.check_release_spares_others,
    check_cache.check_release_of_unused_slots,
    check_cache.check_preemption,
    check_cache.check_shared_prefix,
    check_cache.check_copy_blocks,
    check_cache.check_copies_at_once,
    check_cache.check_allocation_refused,
    check_steps.check_random_schedule,
    check_loading.check_load_order,
    check_loading.check_second_load,
    check_loading.check_kept_parameters,
    check_loading.check_independence,
    check_loading.check_close,
)
"""In the order of a backend's life. The first that fails is the one to look at."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one check said of a backend; `message` is empty where it passed."""

    check: str
    outcome: Literal["passed", "failed", "not applicable"]
    message: str = ""


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """What all checks said of one case. Printed, it is a table, or one line where the backend declined the model."""

    case: str
    results: tuple[Result, ...]

    @property
    def has_passed(self) -> bool:
        """Whether no check failed, and some passed: a backend that declines the model has shown nothing."""
        outcomes = {result.outcome for result in self.results}
        return "failed" not in outcomes and "passed" in outcomes

    @property
    def is_declined(self) -> bool:
        """Whether no check was applicable."""
        return all(result.outcome == "not applicable" for result in self.results)

    def __str__(self) -> str:
        if self.is_declined and len(reasons := {result.message for result in self.results}) == 1:
            return f"{self.case}: not applicable: {reasons.pop()}"
        width = max((len(result.check) for result in self.results), default=0)
        rows = [f"{row.outcome:14}  {row.check:{width}}  {row.message}".rstrip() for row in self.results]
        return "\n".join([f"{self.case}: {self._summary()}", *rows])

    def _summary(self) -> str:
        outcomes = [result.outcome for result in self.results]
        return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))


def run_conformance(case: BackendCase) -> ConformanceReport:
    """Run every check on `case`. What a check raises is in the report, whatever it is."""
    subject = Subject(case)
    return ConformanceReport(case.name, tuple(_result(check, subject) for check in CHECKS))


@dataclass(frozen=True)
class BackendCheck:
    """One check of one case, to be called by a test: it raises `ConformanceError`, or `NotApplicable`, a skip."""

    check: Check
    subject: Subject

    @property
    def __name__(self) -> str:  # what pytest calls the test
        return f"{self.subject.case.name}-{_name(self.check)}"

    def __call__(self) -> None:
        """Run the check."""
        self.check(self.subject)


def backend_checks(*cases: BackendCase) -> list[Callable[[], None]]:
    """Return every check of every case, to be called by tests, and one more: that some case is taken at all."""
    checks: list[Callable[[], None]] = []
    for case in cases:
        subject = Subject(case)
        checks += [BackendCheck(check, subject) for check in CHECKS]

    def takes_a_model() -> None:
        reasons = [reason for reason in map(_reason_against, cases) if reason is not None]
        if len(reasons) == len(cases):
            raise ConformanceError(f"none of {len(cases)} cases is run by this backend: {'; '.join(reasons)}")

    return [*checks, takes_a_model]


def _reason_against(case: BackendCase) -> str | None:
    try:
        case.make().close()
    except NotApplicable as err:
        return f"{case.name}: {err}"
    return None


def _result(check: Check, subject: Subject) -> Result:
    try:
        check(subject)
    except NotApplicable as err:
        return Result(_name(check), "not applicable", str(err))
    except ConformanceError as err:
        return Result(_name(check), "failed", str(err))
    except Exception as err:
        frame = extract_tb(err.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        return Result(_name(check), "failed", f"{type(err).__name__}: {err} ({where})")
    return Result(_name(check), "passed")


def _name(check: Check) -> str:
    return getattr(check, "__name__", repr(check)).removeprefix("check_")
