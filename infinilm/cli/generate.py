"""`infinilm generate`: continue prompts, and print what the model says."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from infinilm.cli.options import ModelOptions, add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="at most so many tokens an answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")


def run(arguments: Any) -> int:
    """Generate and print, prompt and answer on a line each."""
    from infinilm.llm import LLM

    with LLM(arguments.model, plugins=arguments.plugins, **asdict(ModelOptions.of(arguments))) as llm:
        options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
        given = {name: value for name, value in options.items() if value is not None}
        results = llm.generate(arguments.prompt, replace(llm.get_default_sampling_params(), **given))
    if arguments.json:
        rows = [{"prompt": r.prompt, "prompt_token_ids": r.prompt_token_ids, **asdict(r.outputs[0])} for r in results]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        for result in results:
            print(f"{result.prompt}{result.outputs[0].text}")
    return 0
