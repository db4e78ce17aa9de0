"""`Sequence`: one answer in the making: the tokens of a prompt and those generated from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from infinilm.engine.detokenizer import Detokenizer
from infinilm.engine.kv_cache import BlockTable
from infinilm.outputs import CompletionOutput, FinishReason, Logprob
from infinilm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy

    from infinilm.engine.logits import LogitsEdits
    from infinilm.engine.request import Request


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One answer to a request. Mutable: it changes at every step.

    `token_ids` are the prompt's and then the generated ones; the keys and values of the first `num_computed_tokens`
    are in the cache, in the blocks of `block_table`. Preemption takes blocks and slot and sets `num_computed_tokens` to
    0; tokens, text, logprobs, the state of a grammar and the random generator stay, so a preempted sequence goes on as
    if nothing had happened.
    """

    request: Request
    index: int
    sequence_id: int
    token_ids: list[int]
    max_num_tokens: int  # it is finished when it has so many, the prompt's included
    generator: numpy.random.Generator | None
    detokenizer: Detokenizer | None
    edits: LogitsEdits | None
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    block_table: BlockTable = field(default_factory=BlockTable)
    slot: int | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    _num_reported_tokens: int = 0
    _is_end_reported: bool = False

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def params(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are known and not in the cache: a whole prompt, what is left of it, or the one just sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """Of how many of its first tokens no logits are wanted: never of the last, nor of a prompt that is scored."""
        return min(len(self.token_ids) - 1, self.first_unscored)

    @property
    def first_unscored(self) -> int:
        """The first position whose logits score a prompt token that has no logprobs yet; past the prompt if none."""
        if self.index or self.params.prompt_logprobs is None or self.request.is_scored:
            return len(self.token_ids)
        return len(self.request.prompt_logprobs) - 1

    @property
    def is_finished(self) -> bool:
        """Whether it got its last token."""
        return self.finish_reason is not None

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Take one sampled token, and finish where it is the last."""
        self.token_ids.append(token_id)
        if self.edits is not None:
            self.edits.accept(token_id)
        is_end = self._ends_at(token_id, eos_token_ids)
        if not is_end and self.num_tokens >= self.max_num_tokens:
            self.finish_reason = "length"
        if self.detokenizer is None:
            return
        if not is_end:
            is_early = self.num_tokens - self.num_prompt_tokens <= self.params.min_tokens
            self.detokenizer.put(token_id, is_stopping=not is_early)
        if self.is_finished and self.detokenizer.stop_reason is None:
            self.detokenizer.finish()
        if self.detokenizer.stop_reason is not None:
            self.finish_reason, self.stop_reason = "stop", self.detokenizer.stop_reason

    def _ends_at(self, token_id: int, eos_token_ids: frozenset[int]) -> bool:
        """Finish where this token, or the end of a grammar, says so. Return whether it is no part of the text."""
        params = self.params
        is_complete = self.edits is not None and self.edits.is_complete
        if token_id in (params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token_id
            return not params.include_stop_str_in_output
        if token_id in eos_token_ids and (is_complete or not params.ignore_eos):
            self.finish_reason = "stop"
            return not params.include_stop_str_in_output
        if is_complete:
            self.finish_reason = "stop"
        return False

    def completion(self) -> CompletionOutput:
        """Return what there is so far."""
        return self._output(0, "" if self.detokenizer is None else self.detokenizer.text)

    def delta(self) -> CompletionOutput | None:
        """Return what is new since the last call, or `None` where nothing is."""
        start = self._num_reported_tokens
        if start == len(self.token_ids) - self.num_prompt_tokens and self.is_finished == self._is_end_reported:
            return None
        text = "" if self.detokenizer is None else self.detokenizer.take()
        self._num_reported_tokens = len(self.token_ids) - self.num_prompt_tokens
        self._is_end_reported = self.is_finished
        return self._output(start, text)

    def _output(self, start: int, text: str) -> CompletionOutput:
        has_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self.token_ids[self.num_prompt_tokens + start :],
            cumulative_logprob=self.cumulative_logprob if has_logprobs else None,
            logprobs=self.logprobs[start:] if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
