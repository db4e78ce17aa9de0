"""The options of every command that takes a model, with one meaning: that of `LLM`'s arguments of the same names."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, fields
from typing import Any

_SIZE = re.compile(r"(\d+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is taken; see `infinilm.LLM`."""

    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    backend: str = "auto"
    platform: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None

    @classmethod
    def of(cls, arguments: Any) -> ModelOptions:
        """Return what was given on the command line."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How requests are served; see `infinilm.LLM`."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_cache_memory: int | None = None
    enable_prefix_caching: bool = True
    generation_config: str = "auto"
    seed: int | None = None

    @classmethod
    def of(cls, arguments: Any) -> EngineOptions:
        """Return what was given on the command line."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and how it is taken."""
    parser.add_argument("model", metavar="MODEL", help="a folder with a checkpoint, or a Hub id, which is downloaded")
    parser.add_argument("--revision", metavar="REV", help="of a Hub id: a branch, a tag or a commit")
    parser.add_argument("--tokenizer", metavar="PATH", help="take tokenizer and chat template from another folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the config name code to run (auto_map)")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="the plugin that runs the model")
    parser.add_argument("--platform", default="auto", metavar="NAME", help="the plugin for the kind of device")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", metavar="DTYPE", help="compute in bfloat16, float32, ...")
    parser.add_argument(
        "--quantization", metavar="FORMAT", help="quantize weights at load: int8, int4, ... of a backend"
    )
    parser.add_argument("--max-model-len", type=positive_integer, metavar="N", help="at most so many tokens a sequence")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how requests are served."""
    defaults = EngineOptions()
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-num-seqs",
        type=positive_integer,
        default=defaults.max_num_seqs,
        metavar="N",
        help="at most so many sequences a step (%(default)s)",
    )
    engine.add_argument(
        "--max-num-batched-tokens",
        type=positive_integer,
        default=defaults.max_num_batched_tokens,
        metavar="N",
        help="at most so many tokens a step (%(default)s)",
    )
    engine.add_argument("--kv-cache-memory", type=byte_size, metavar="SIZE", help="of keys and values, e.g. 4G")
    engine.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=defaults.enable_prefix_caching,
        help="share what prompts have in common (on)",
    )
    engine.add_argument(
        "--generation-config",
        choices=("auto", "vllm"),
        default=defaults.generation_config,
        help="default sampling from the checkpoint (auto), or the engine's own",
    )
    engine.add_argument("--seed", type=int, metavar="N", help="make requests without a seed of their own repeatable")


def positive_integer(text: str) -> int:
    """Return a number that is given as text. Raises `argparse.ArgumentTypeError` for anything below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def positive_number(text: str) -> float:
    """Return a number that is given as text. Raises `argparse.ArgumentTypeError` unless it is finite and above 0."""
    try:
        value = float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from err
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def byte_size(text: str) -> int:
    """Return bytes from `512`, `64K`, `8M` or `4G`. Raises `argparse.ArgumentTypeError` for anything else."""
    found = _SIZE.fullmatch(text.upper())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; one is written 512, 64K, 8M or 4G")
    return int(found[1]) * _UNITS[found[2]]
