"""What is checked and prepared before a request may join the step loop. Safe to use from many threads."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass
from operator import index

from infinilm.engine.detokenizer import Detokenizer
from infinilm.engine.grammar import Grammars, Matcher
from infinilm.engine.logits import LogitsEdits, has_penalties
from infinilm.engine.request import Request
from infinilm.engine.sampler import make_generator
from infinilm.engine.sequence import Sequence
from infinilm.sampling_params import SamplingParams
from infinilm_hookspecs import Processor, RequestError
from infinilm_hookspecs.types import LogitsProcessor, LogitsProcessorFactory


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be served, with everything it takes that is slow to make."""

    token_ids: list[int]
    prompt: str | None
    params: SamplingParams
    max_num_tokens: int
    bad_words: tuple[tuple[int, ...], ...] = ()
    matcher: Matcher | None = None


class Admission:
    """Refuses requests that are malformed or could never be served, even alone. Lengths are in tokens.

    The cache has `num_blocks` blocks of `block_size`. `logits_processors` are by the key of `extra_args`.
    """

    def __init__(
        self,
        processor: Processor | None,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        logits_processors: abc.Mapping[str, LogitsProcessorFactory],
    ) -> None:
        self._processor = processor
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._logits_processors = logits_processors
        self._grammars = Grammars(processor, vocab_size) if processor is not None else None

    def prepare(
        self, request_id: str, prompt_token_ids: abc.Sequence[int], params: SamplingParams, prompt: str | None = None
    ) -> Prepared:
        """Check a request and compile its grammar, which may take seconds. Raises `RequestError`."""
        token_ids = self._checked_token_ids(request_id, prompt_token_ids)
        full = self._checked_length(request_id, len(token_ids), params.max_tokens)
        self._check_vocabulary(request_id, "stop_token_ids", params.stop_token_ids or ())
        self._check_vocabulary(request_id, "logit_bias", params.logit_bias or ())
        for name in ("stop", "bad_words", "structured_outputs"):
            if getattr(params, name) and self._processor is None:
                raise RequestError(
                    f"request {request_id!r}: {name}={getattr(params, name)!r} needs text, and this model has no "
                    f"processor; leave {name} out, or give the model a tokenizer"
                )
        self._fresh_processors(params)
        wanted = params.structured_outputs
        matcher = self._grammars.matcher(wanted) if wanted is not None and self._grammars is not None else None
        return Prepared(token_ids, prompt, params, full, self._bad_words(params), matcher)

    def make_request(
        self, request_id: str, prepared: Prepared, seed: int, sequence_ids: Iterator[int], arrival_time: float
    ) -> Request:
        """Return the request with its sequences, each with a random generator of its own."""
        params = prepared.params
        request = Request(
            request_id=request_id,
            prompt=prepared.prompt,
            prompt_token_ids=prepared.token_ids,
            params=params,
            arrival_time=arrival_time,
        )
        for number in range(params.n):
            sequence = Sequence(
                request=request,
                index=number,
                sequence_id=next(sequence_ids),
                token_ids=list(prepared.token_ids),
                max_num_tokens=prepared.max_num_tokens,
                generator=None if params.is_greedy else make_generator(seed + number),
                detokenizer=self._detokenizer(params, prepared.token_ids[-1:]),
                edits=self._edits(prepared),
            )
            request.sequences.append(sequence)
        return request

    def _detokenizer(self, params: SamplingParams, context: abc.Sequence[int]) -> Detokenizer | None:
        if self._processor is None:
            return None
        return Detokenizer(
            self._processor,
            params.stop or (),
            context,
            includes_stop=params.include_stop_str_in_output,
            skips_special_tokens=params.skip_special_tokens,
        )

    def _edits(self, prepared: Prepared) -> LogitsEdits | None:
        """Return what one answer to the request does to its logits, or `None` for nothing."""
        params, matcher = prepared.params, prepared.matcher
        processors = self._fresh_processors(params)
        is_plain = matcher is None and not (params.logit_bias or params.min_tokens or has_penalties(params))
        if is_plain and not processors and not prepared.bad_words:
            return None
        ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._eos_token_ids)}
        return LogitsEdits(
            params,
            prepared.token_ids,
            matcher=None if matcher is None else matcher.copy(),
            bad_words=prepared.bad_words,
            end_token_ids=sorted(token_id for token_id in ends if token_id < self._vocab_size),
            processors=processors,
        )

    def _fresh_processors(self, params: SamplingParams) -> list[LogitsProcessor]:
        """Return fresh logits processors, as `extra_args` ask for them. Raises `RequestError` for one nobody has."""
        unknown = sorted(set(params.extra_args or ()) - set(self._logits_processors))
        if unknown:
            known = ", ".join(sorted(self._logits_processors)) or "none"
            raise RequestError(f"extra_args: no plugin provides the logits processor {unknown[0]!r}; known: {known}")
        return [self._logits_processors[name](value) for name, value in (params.extra_args or {}).items()]

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of each word, at the start of a text and after a space."""
        if not params.bad_words or self._processor is None:
            return ()
        texts = [text for word in params.bad_words for text in (word.lstrip(" "), " " + word.lstrip(" "))]
        words = (tuple(self._processor.encode(text, add_special_tokens=False)) for text in texts)
        return tuple(dict.fromkeys(word for word in words if word))

    def _check_vocabulary(
        self, request_id: str, name: str, token_ids: abc.Sequence[int] | abc.Mapping[int, float]
    ) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise RequestError(
                    f"request {request_id!r}: token id {token_id} of {name} is not in the vocabulary; ids go from 0 to "
                    f"{self._vocab_size - 1}"
                )

    def _checked_token_ids(self, request_id: str, prompt_token_ids: abc.Sequence[int]) -> list[int]:
        try:
            token_ids = [index(token_id) for token_id in prompt_token_ids]
        except TypeError as err:
            raise RequestError(f"request {request_id!r}: prompt_token_ids must be integers: {err}") from err
        if not token_ids:
            raise RequestError(f"request {request_id!r}: the prompt is empty; give at least one token")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            position = next(at for at, token_id in enumerate(token_ids) if not 0 <= token_id < self._vocab_size)
            raise RequestError(
                f"request {request_id!r}: token id {token_ids[position]} at position {position} of the prompt is not "
                f"in the vocabulary; ids go from 0 to {self._vocab_size - 1}"
            )
        return token_ids

    def _checked_length(self, request_id: str, prompt_length: int, max_tokens: int | None) -> int:
        """Return the length at which the request is full, after making sure that the cache can hold it."""
        if prompt_length + 1 > self._max_model_len:
            raise RequestError(
                f"request {request_id!r}: a prompt of {prompt_length} tokens leaves no room to generate, max_model_len "
                f"is {self._max_model_len}; shorten the prompt, or raise max_model_len"
            )
        full = self._max_model_len if max_tokens is None else min(prompt_length + max_tokens, self._max_model_len)
        needed = -(-(full - 1) // self._block_size)  # the last token is never computed, only sampled
        if needed > self._num_blocks:
            raise RequestError(
                f"request {request_id!r}: {prompt_length} prompt tokens and max_tokens={max_tokens} can reach {full} "
                f"tokens, which takes {needed} blocks of {self._block_size}, and the cache has {self._num_blocks} "
                f"({self._num_blocks * self._block_size} tokens); lower max_tokens or max_model_len, or give the cache "
                "more memory"
            )
        return full
