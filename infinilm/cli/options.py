"""The options of every command that takes a model, with one meaning: that of `LLM`'s arguments of the same names."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is taken; see `infinilm.LLM`."""

    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None

    @classmethod
    def of(cls, arguments: Any) -> ModelOptions:
        """Return what was given on the command line."""
        return cls(
            revision=arguments.revision,
            tokenizer=arguments.tokenizer,
            trust_remote_code=arguments.trust_remote_code,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            max_model_len=arguments.max_model_len,
        )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and how it is taken."""
    parser.add_argument("model", metavar="MODEL", help="a folder with a checkpoint, or a Hub id, which is downloaded")
    parser.add_argument("--revision", metavar="REV", help="of a Hub id: a branch, a tag or a commit")
    parser.add_argument("--tokenizer", metavar="PATH", help="take tokenizer and chat template from another folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the config name code to run (auto_map)")
    parser.add_argument("--dtype", default="auto", metavar="DTYPE", help="compute in bfloat16, float32, ...")
    parser.add_argument(
        "--quantization", metavar="FORMAT", help="quantize weights at load: int8, int4, ... of a backend"
    )
    parser.add_argument("--max-model-len", type=positive_integer, metavar="N", help="at most so many tokens a sequence")


def positive_integer(text: str) -> int:
    """Return a number that is given as text. Raises `argparse.ArgumentTypeError` for anything below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)
