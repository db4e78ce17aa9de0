"""`infinilm bench`: measure a model in this process, or a live server."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infinilm.cli.bench_report import Report, render
from infinilm.cli.options import (
    EngineOptions,
    ModelOptions,
    add_engine_arguments,
    add_model_arguments,
    positive_integer,
    positive_number,
)
from infinilm_hookspecs import UnavailableError

_KEY_VARIABLE = "INFINILM_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    latency = _add_local(actions, "latency", "One batch of random prompts, again and again: how long it takes.")
    latency.add_argument("--batch-size", type=positive_integer, default=1, metavar="N", help="prompts (%(default)s)")
    latency.add_argument("--num-iters", type=positive_integer, default=10, metavar="N", help="times (%(default)s)")
    throughput = _add_local(actions, "throughput", "Many random prompts at once: how much comes out.")
    throughput.add_argument("--num-prompts", type=positive_integer, default=64, metavar="N", help="(%(default)s)")
    _add_serve(actions)


def run(arguments: Any) -> int:
    """Measure, print a table, and write what else was asked for."""
    if getattr(arguments, "plot", None) and importlib.util.find_spec("matplotlib") is None:
        raise UnavailableError("--plot needs matplotlib; install it with: pip install matplotlib")
    report = _measure(arguments)
    print(render(report))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    if getattr(arguments, "plot", None):
        from infinilm.cli.bench_plot import plot

        plot(report, arguments.plot)
    return 0


def _add_local(actions: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=description, description=description)
    add_model_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--input-len", type=positive_integer, default=128, metavar="N", help="tokens of a prompt")
    parser.add_argument("--output-len", type=positive_integer, default=64, metavar="N", help="tokens of an answer")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    return parser


def _add_serve(actions: Any) -> None:
    description = "Drive a live server of OpenAI's API: requests at random times, and how long their answers take."
    parser = actions.add_parser("serve", help=description, description=description)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(%(default)s)")
    parser.add_argument("--model", metavar="NAME", help="as the server calls it; its first one otherwise")
    parser.add_argument("--api-key", default=os.environ.get(_KEY_VARIABLE), metavar="KEY", help=f"or {_KEY_VARIABLE}")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument(
        "--request-rate",
        type=positive_number,
        metavar="R",
        help="Poisson arrivals, so many a second on average; without it, as many as clients are free",
    )
    parser.add_argument(
        "--num-clients", type=positive_integer, default=64, metavar="N", help="requests at once, at most (%(default)s)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--duration", type=positive_number, default=30.0, metavar="S", help="seconds (%(default)s)")
    length.add_argument("--num-requests", type=positive_integer, metavar="N", help="stop after so many instead")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="one of the prompts; random words otherwise")
    parser.add_argument("--input-len", type=positive_integer, default=128, metavar="N", help="random words a prompt")
    parser.add_argument("--output-len", type=positive_integer, default=64, metavar="N", help="tokens an answer")
    parser.add_argument("--ignore-eos", action="store_true", help="ask for answers of full length (vLLM's option)")
    parser.add_argument("--timeout", type=positive_number, default=600.0, metavar="S", help="of a request")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of arrivals and prompts (%(default)s)")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    parser.add_argument("--plot", metavar="PNG", help="draw them there")


def _measure(arguments: Any) -> Report:
    if arguments.action == "serve":
        from infinilm.cli.bench_serve import drive

        return drive(arguments)
    from infinilm.cli import bench_local
    from infinilm.llm import LLM

    options = asdict(ModelOptions.of(arguments)) | asdict(EngineOptions.of(arguments))
    with LLM(arguments.model, plugins=arguments.plugins, **options) as llm:
        measure = bench_local.latency if arguments.action == "latency" else bench_local.throughput
        return measure(llm, arguments)
