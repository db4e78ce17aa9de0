"""`infinilm plugins check PATH.so`: what becomes of a process that uses a backend library, and whether it conforms."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from infinilm.cli.errors import ExitCode
from infinilm.native.check import Finding, check_file, command_of, run_step, tell
from infinilm.native.libraries import open_library


def add_arguments(actions: Any) -> None:
    """Declare the action and its arguments."""
    check = actions.add_parser(
        "check",
        help="try a backend library",
        description="Try a backend library, a .so file, in processes of its own: what it exports, what runs while it "
        "is opened, crashes, hangs, and the conformance suite.",
    )
    check.add_argument("path", metavar="PATH.so", help="the library")
    check.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds a step may take (%(default)g)")
    check.add_argument("--no-conformance", action="store_true", help="leave the conformance suite out")
    check.add_argument("--dtype", default="float32", help="to run the conformance suite in (%(default)s)")
    check.add_argument("--json", action="store_true", help="print a list of JSON objects")
    check.set_defaults(run_action=run)


def run(arguments: Any) -> int:
    """Print what every step finds, and return whether all went well."""
    arguments.path = os.path.realpath(arguments.path)  # the dynamic linker would look for a bare name elsewhere
    findings: list[Finding] = []
    for finding in _findings(arguments):
        findings.append(finding)
        if not arguments.json:
            print(f"{finding.step:12} {finding.outcome:6} {_indented(finding.message)}", flush=True)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    return ExitCode.USAGE_ERROR if any(finding.outcome == "failed" for finding in findings) else ExitCode.OK


def _findings(arguments: Any) -> Iterator[Finding]:
    """Yield the findings of all steps, up to the first that makes the next pointless."""
    for finding in check_file(arguments.path):
        yield finding
        if finding.step == "file":
            return
    steps = {step: command_of(step, arguments.path) for step in ("open", "load")}
    if not arguments.no_conformance:
        code = "import sys; from infinilm.cli import library_check as c; sys.exit(c.conform(*sys.argv[1:]))"
        steps["conformance"] = [sys.executable, "-c", code, arguments.path, arguments.dtype]
    for step, command in steps.items():
        finding = run_step(step, command, arguments.timeout)
        yield finding
        if finding.outcome == "failed":
            return


def conform(path: str, dtype: str) -> int:
    """Run the conformance suite on a library in this process, print what it said, and return an exit code."""
    if find_spec("infinilm.testing") is None:
        return tell("note: not run, this infinilm has no conformance suite")
    from infinilm.testing import decoder_cases, run_conformance

    library = open_library(path)
    reports = [run_conformance(case) for case in decoder_cases(library.provide_backend, dtype=dtype)]
    outcomes = [result.outcome for report in reports for result in report.results]
    for report in reports:
        for result in report.results:
            if result.outcome == "failed":
                print(f"{report.case}: {result.check}: {result.message}")
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    num_taken = sum(report.has_passed for report in reports)
    if "failed" in outcomes:
        return tell(f"failed: {counts}")
    if not num_taken:
        return tell(f"note: none of the {len(reports)} models of the suite is one it runs")
    return tell(f"ok: {counts}; {num_taken} of {len(reports)} models are run")


def _indented(message: str) -> str:
    return message.replace("\n", "\n" + " " * 20)
