"""`SamplingParams`: how one request wants its tokens chosen. Names and defaults are vLLM's; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from infinilm_hookspecs import RequestError

_SMALLEST_TEMPERATURE = 1e-5  # below it vLLM is greedy too


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request, checked when made. Raises `RequestError` naming the option and what it takes.

    `temperature=0` is greedy. `top_k` of 0 or -1 keeps every token. `max_tokens=None` generates up to the model's
    length. With the same `seed` a request gets the same tokens whatever else is in the batch. Generation ends before
    the first `stop` string, which is not part of the text; a single string is taken too, and the field is a tuple
    afterwards. `logprobs` and `prompt_logprobs` are how many of the likeliest tokens to report at each position,
    besides the one that stands there.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 16
    seed: int | None = None
    stop: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise _refusal("temperature", self.temperature, "a finite number, 0 (greedy) or above")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise _refusal("top_p", self.top_p, "a number above 0, up to 1 (off)")
        _check_integer("top_k", self.top_k, -1, "0 or -1 (off), or a number of tokens")
        _check_integer("max_tokens", self.max_tokens, 1, "1 or above, or None (up to the model's length)")
        _check_integer("logprobs", self.logprobs, 0, "0 or above, or None (off)")
        _check_integer("prompt_logprobs", self.prompt_logprobs, 0, "0 or above, or None (off)")
        _check_integer("seed", self.seed, -(2**63), "an integer of 64 bits, or None")
        if self.seed is not None and self.seed >= 2**64:
            raise _refusal("seed", self.seed, "an integer of 64 bits, or None")
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", self.ignore_eos, "True or False")
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature < _SMALLEST_TEMPERATURE


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_integer(name: str, value: object, minimum: int, allowed: str) -> None:
    is_optional = name != "top_k"
    if value is None and is_optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < minimum:
        raise _refusal(name, value, allowed)


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        raise _refusal("stop", stop, "a string or a list of strings, none of them empty")
    return tuple(strings)


def _refusal(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"SamplingParams: {name}={value!r} is not allowed; it takes {allowed}")
