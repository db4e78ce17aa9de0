"""Structured outputs: what may come next under a JSON schema, a regex, a grammar or a choice, through llguidance.

Compiling takes milliseconds to seconds, so it is done before a request reaches the step loop, once per specification.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from torch import Tensor

from infinilm.sampling_params import StructuredOutputsParams
from infinilm_hookspecs import Processor, RequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_Value = TypeVar("_Value")

_MAX_CACHED_GRAMMARS = 256
# As json.dumps writes it: a model that may put whitespace anywhere may never stop putting it.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """Follows one answer along a grammar. What was accepted stays accepted: preemption does not touch it."""

    __slots__ = ("matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self.matcher.is_stopped()

    def copy(self) -> Matcher:
        """Return another that is as far as this one."""
        return Matcher(self.matcher.deep_copy())

    def accept(self, token_id: int) -> None:
        """Take the next token, one that is allowed. Raises `RequestError` where the grammar has become too complex."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token_id)
        self.check()

    def check(self) -> None:
        """Raise `RequestError` where the grammar has become too complex to go on."""
        if self.matcher.is_error():
            raise RequestError(f"structured_outputs: {self.matcher.get_error():.500}")


class Grammars:
    """Compiles grammars for one vocabulary, and keeps the last ones. Safe to use from many threads."""

    def __init__(self, processor: Processor, vocab_size: int) -> None:
        self._processor = processor
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[tuple[str, str], Future[LLMatcher | str]] = OrderedDict()

    def matcher(self, wanted: StructuredOutputsParams) -> Matcher:
        """Return a matcher at the start of an answer. Raises `RequestError` with what the compiler says."""
        key = wanted.key
        with self._lock:
            future = self._compiled.get(key)
            is_new = future is None
            if future is None:
                future = self._compiled[key] = Future()
            self._compiled.move_to_end(key)
            if len(self._compiled) > _MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        if is_new:
            _settle(future, lambda: self._compile(wanted), lambda: self._forget(key))
        compiled = future.result()
        if isinstance(compiled, str):
            kind, text = key
            raise RequestError(f"structured_outputs: {kind}={text!r:.200} cannot be compiled: {compiled}")
        return Matcher(compiled.deep_copy())

    def _compile(self, wanted: StructuredOutputsParams) -> LLMatcher | str:
        try:
            grammar = _grammar_of(wanted)
        except ValueError as err:
            return str(err)
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        return matcher.get_error() if matcher.is_error() else matcher

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            future, is_new = self._tokenizer, self._tokenizer is None
            if future is None:
                future = self._tokenizer = Future()
        if is_new:
            _settle(future, self._make_tokenizer, self._forget_tokenizer)
        return future.result()

    def _make_tokenizer(self) -> LLTokenizer:
        return _Vocabulary(self._processor, self._vocab_size).tokenizer()

    def _forget(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._compiled.pop(key, None)

    def _forget_tokenizer(self) -> None:
        self._tokenizer = None


class _Vocabulary:
    """The vocabulary in the shape that llguidance asks for. Bits of a mask are token ids of the model."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, processor: Processor, vocab_size: int) -> None:
        stored = processor.token_bytes()[:vocab_size]
        # One more than the model has, which can never be sampled: the end for a model that says none.
        tokens = [*stored, *[None] * (vocab_size + 1 - len(stored))]
        ends = sorted(token_id for token_id in processor.eos_token_ids if token_id < vocab_size) or [vocab_size]
        self.eos_token_ids = ends
        self.eos_token_id = ends[0]
        self.tokens = [b"" if token is None or at in ends else token for at, token in enumerate(tokens)]
        self.special_token_ids = sorted({*ends, *(at for at, token in enumerate(tokens) if token is None)})
        self._processor = processor

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._processor.encode(text, add_special_tokens=False)

    def tokenizer(self) -> LLTokenizer:
        """Return llguidance's own form of it, a trie."""
        return LLTokenizer(self, len(self.tokens), self.eos_token_ids)  # type: ignore[arg-type]  # of that shape


class Masks:
    """Computes which tokens may come next, for several matchers at once by several threads."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None

    def allowed_tokens(self, matchers: Sequence[Matcher], vocab_size: int) -> tuple[Tensor, dict[int, RequestError]]:
        """Return bool (num_rows, vocab_size), and what is wrong with the rows whose grammar is at its limits."""
        masks = np.zeros((len(matchers), vocab_size // 32 + 1), np.int32)
        if len(matchers) == 1:
            matchers[0].matcher.unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
        else:
            self._executor = self._executor or LLExecutor()
            rows = [(its.matcher, row) for row, its in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(rows, masks.ctypes.data, masks[0].nbytes, len(rows))
        failed: dict[int, RequestError] = {}
        for row, matcher in enumerate(matchers):
            try:
                matcher.check()
            except RequestError as err:
                failed[row] = err
        bits = np.unpackbits(masks.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)), failed


def _grammar_of(wanted: StructuredOutputsParams) -> str:
    if wanted.json_object:
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
    if wanted.json is not None:
        _, schema = wanted.key
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in wanted.choice))
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    return LLMatcher.grammar_from_lark(wanted.grammar or "")


def _settle(future: Future[_Value], compute: Callable[[], _Value], forget: Callable[[], object]) -> None:
    """Compute what others may wait for; what is raised is raised to them too, and not remembered."""
    try:
        future.set_result(compute())
    except BaseException as err:
        forget()
        future.set_exception(err)
        raise
