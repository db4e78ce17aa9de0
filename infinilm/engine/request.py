"""`Request`: everything the engine knows about one request, from its arrival to its last token."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from infinilm.engine.detokenizer import Detokenizer
from infinilm.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from infinilm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One prompt and what was generated from it. Mutable: it changes at every step.

    `token_ids` are the prompt's and then the generated ones; the keys and values of the first `num_computed_tokens`
    are in the cache, in the blocks of `block_table`. Preemption takes blocks and slot and sets `num_computed_tokens` to
    0; tokens, text, logprobs and the random generator stay, so a preempted request goes on as if nothing had happened.
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    max_num_tokens: int  # it is finished when it has so many, the prompt's included
    seed: int
    detokenizer: Detokenizer | None
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    slot: int | None = None
    generator: torch.Generator | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are known and not in the cache: a whole prompt, what is left of it, or the one just sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it got its last token."""
        return self.finish_reason is not None

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Take one sampled token, and finish where it is the last: end of sequence, stop string, or full."""
        self.token_ids.append(token_id)
        is_eos = token_id in eos_token_ids and not self.params.ignore_eos
        if is_eos:
            self.finish_reason = "stop"
        elif self.num_tokens >= self.max_num_tokens:
            self.finish_reason = "length"
        if self.detokenizer is None:
            return
        if not is_eos:
            self.detokenizer.put(token_id)
        if self.is_finished and self.detokenizer.stop_reason is None:
            self.detokenizer.finish(self.token_ids[self.num_prompt_tokens : self.num_tokens - is_eos])
        if self.detokenizer.stop_reason is not None:
            self.finish_reason = "stop"

    def output(self) -> RequestOutput:
        """Return what there is so far."""
        params = self.params
        completion = CompletionOutput(
            index=0,
            text="" if self.detokenizer is None else self.detokenizer.text,
            token_ids=self.token_ids[self.num_prompt_tokens :],
            cumulative_logprob=None if params.logprobs is None else self._cumulative_logprob(),
            logprobs=None if params.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=None if self.detokenizer is None else self.detokenizer.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids[: self.num_prompt_tokens],
            prompt_logprobs=None if params.prompt_logprobs is None else list(self.prompt_logprobs),
            outputs=[completion],
            finished=self.is_finished,
        )

    def _cumulative_logprob(self) -> float:
        chosen = self.token_ids[self.num_prompt_tokens :]
        return sum(entries[token_id].logprob for token_id, entries in zip(chosen, self.logprobs, strict=True))
