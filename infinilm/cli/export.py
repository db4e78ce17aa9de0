"""`infinilm export`: write a model as a standard Hugging Face folder, or back into its original layout."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from infinilm.cli.options import ModelOptions, add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--original", action="store_true", help="the layout the model came in, bit for bit")
    parser.add_argument("--reuse", metavar="SOURCE", help="with --original: copy what was dropped from there")


def run(arguments: Any) -> int:
    """Load the model and write it."""
    from infinilm.llm import LLM

    with LLM(arguments.model, plugins=arguments.plugins, **asdict(ModelOptions.of(arguments))) as llm:
        llm.export(arguments.out, original=arguments.original, reuse=arguments.reuse)
    return 0
