"""`SamplingParams`: how one request wants its tokens chosen. Names and defaults are vLLM's; no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Any

from infinilm_hookspecs import RequestError

_SMALLEST_TEMPERATURE = 1e-5  # below it vLLM is greedy too
_SEED = "an integer of 64 bits, or None"
_TOKEN_IDS = "a list of token ids"


class RequestOutputKind(Enum):
    """What an output of a stream holds: all there is so far, what is new since the one before, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must look like: exactly one of these. Raises `RequestError` where it is none or several.

    `json` is a JSON schema, as text or as a mapping; `regex` must match the whole answer; the answer is one of the
    texts of `choice`; `grammar` is in Lark's notation; `json_object` is any JSON object. The JSON that is written has
    no whitespace but one space after a comma or colon.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        _check("json_object", self.json_object, isinstance(self.json_object, bool), "True or False")
        values = {name: getattr(self, name) for name in ("json", "regex", "choice", "grammar")}
        given = [name for name, value in values.items() if value is not None] + ["json_object"] * self.json_object
        if len(given) != 1:
            raise RequestError(
                f"StructuredOutputsParams takes exactly one of json, regex, choice, grammar and json_object, and has "
                f"{' and '.join(given) or 'none'}"
            )
        name, value = given[0], getattr(self, given[0])
        if name == "json":
            _check(name, value, isinstance(value, str | Mapping), "a JSON schema, as text or as a mapping")
        elif name == "choice":
            object.__setattr__(self, "choice", _texts(name, value))
            _check(name, value, bool(self.choice), "one text or more")
        elif name != "json_object":
            _check(name, value, isinstance(value, str) and bool(value), "a text that is not empty")

    @property
    def key(self) -> tuple[str, str]:
        """The kind, and what is asked for as text: equal for what compiles to the same."""
        if self.json_object:
            return "json_object", ""
        if self.json is not None:
            return "json", self.json if isinstance(self.json, str) else json.dumps(self.json, default=_plain)
        if self.choice is not None:
            return "choice", json.dumps(list(self.choice))
        return ("regex", self.regex) if self.regex is not None else ("grammar", self.grammar or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request, checked when made. Raises `RequestError` naming the option and what it takes.

    `n` answers are given to one prompt. `temperature=0` is greedy. `top_k` of 0 or -1 keeps every token, `min_p` those
    at least so likely as `min_p` times the likeliest. `presence_penalty` is taken off the logit of every token that was
    generated, `frequency_penalty` as often as it was; `repetition_penalty` divides those of all that were generated or
    are in the prompt (negative ones are multiplied). `logit_bias` is added, by token id.

    With the same `seed` a request gets the same tokens whatever else is in the batch. Generation ends before the first
    `stop` string and at a token of `stop_token_ids`, which are part of the text with `include_stop_str_in_output` only;
    a single string is taken too. Before `min_tokens` nothing ends it but a limit; `max_tokens=None` goes up to the
    model's length. `bad_words` are never generated, as whole sequences of tokens.

    `logprobs` and `prompt_logprobs` are how many of the likeliest tokens to report at each position, besides the one
    that stands there; they are of the model's own logits. `extra_args` are for plugins: each key is a logits processor
    that one of them provides.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    bad_words: Sequence[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    extra_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        object.__setattr__(self, "stop", _texts("stop", self.stop))
        object.__setattr__(self, "bad_words", _texts("bad_words", self.bad_words))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        wanted = self.structured_outputs
        is_wanted = wanted is None or isinstance(wanted, StructuredOutputsParams)
        _check("structured_outputs", wanted, is_wanted, "StructuredOutputsParams, or None")
        _check("output_kind", self.output_kind, isinstance(self.output_kind, RequestOutputKind), "a RequestOutputKind")
        is_named = isinstance(self.extra_args or {}, Mapping) and all(isinstance(k, str) for k in self.extra_args or ())
        _check("extra_args", self.extra_args, is_named, "a mapping from names to values, or None")

    def _check_numbers(self) -> None:
        _check_number("temperature", self.temperature, 0, math.inf, "a finite number, 0 (greedy) or above")
        _check_number("top_p", self.top_p, 0, 1, "a number above 0, up to 1 (off)")
        _check("top_p", self.top_p, self.top_p > 0, "a number above 0, up to 1 (off)")
        _check_number("min_p", self.min_p, 0, 1, "a number from 0 (off) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2, 2, "a number from -2 to 2, 0 (off)")
        # Beyond this float32, in which logits are, has no number for what comes out.
        _check_number("repetition_penalty", self.repetition_penalty, 1e-30, 1e30, "1e-30 to 1e30, 1 (off)")
        _check_integer("n", self.n, 1, "1 or above")
        _check_integer("top_k", self.top_k, -1, "0 or -1 (off), or a number of tokens")
        _check_integer("min_tokens", self.min_tokens, 0, "0 (off) or above")
        _check_optional("max_tokens", self.max_tokens, 1, "1 or above, or None (up to the model's length)")
        _check_optional("logprobs", self.logprobs, 0, "0 or above, or None (off)")
        _check_optional("prompt_logprobs", self.prompt_logprobs, 0, "0 or above, or None (off)")
        _check_optional("seed", self.seed, -(2**63), _SEED)
        _check("seed", self.seed, self.seed is None or self.seed < 2**64, _SEED)
        limit = math.inf if self.max_tokens is None else self.max_tokens
        _check("min_tokens", self.min_tokens, self.min_tokens <= limit, f"no more than max_tokens={self.max_tokens}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature < _SMALLEST_TEMPERATURE


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise RequestError(f"SamplingParams: {name}={value!r} is not allowed; it takes {allowed}")


def _check_number(name: str, value: object, minimum: float, maximum: float, allowed: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    _check(name, value, is_number and minimum <= value <= maximum, allowed)  # type: ignore[operator]  # a number


def _check_integer(name: str, value: object, minimum: int, allowed: str) -> None:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    _check(name, value, is_integer and value >= minimum, allowed)  # type: ignore[operator]  # an integer


def _check_optional(name: str, value: object, minimum: int, allowed: str) -> None:
    if value is not None:
        _check_integer(name, value, minimum, allowed)


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else () if value is None else value
    is_allowed = isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts)
    _check(name, value, is_allowed, "a string or a list of strings, none of them empty")
    return tuple(texts)  # type: ignore[arg-type]  # checked


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    ids = () if value is None else value
    _check(name, value, isinstance(ids, Sequence) and not isinstance(ids, str | bytes), _TOKEN_IDS)
    for token_id in ids:  # type: ignore[attr-defined]  # checked
        _check(name, value, isinstance(token_id, Integral) and not isinstance(token_id, bool), _TOKEN_IDS)
    return tuple(int(token_id) for token_id in ids)  # type: ignore[attr-defined]  # checked


def _biases(value: object) -> Mapping[int, float] | None:
    if value is None:
        return None
    allowed = "a mapping from token ids to finite numbers, or None"
    _check("logit_bias", value, isinstance(value, Mapping), allowed)
    for token_id, bias in value.items():  # type: ignore[attr-defined]  # checked
        _check("logit_bias", value, isinstance(token_id, Integral) and not isinstance(token_id, bool), allowed)
        is_number = isinstance(bias, Real) and not isinstance(bias, bool) and math.isfinite(bias)
        _check("logit_bias", value, is_number, allowed)
    return {int(token_id): float(bias) for token_id, bias in value.items()}  # type: ignore[attr-defined]  # checked


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise RequestError(f"StructuredOutputsParams: the schema holds {value!r:.80}, which is not JSON")
