"""`Request`: a prompt, the answers to it, and what is reported of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from infinilm.engine.sequence import Sequence
from infinilm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from infinilm.sampling_params import RequestOutputKind, SamplingParams


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that ended because something raised `error`: the backend, or what is done for this request alone."""

    request_id: str
    error: Exception


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One prompt and `params.n` sequences that go on from it, of which `num_queued` are with the scheduler.

    Times are seconds of `time.monotonic()`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    sequences: list[Sequence] = field(default_factory=list)
    num_queued: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether every answer is."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def is_scored(self) -> bool:
        """Whether every prompt token has its logprobs."""
        return len(self.prompt_logprobs) == len(self.prompt_token_ids)

    def abort(self, now: float) -> None:
        """Finish every answer that is not finished."""
        self.finished_time = now
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or "abort"

    def output(self, weight_version: str) -> RequestOutput | None:
        """Return what is due now by `params.output_kind`, or `None`."""
        kind, is_finished = self.params.output_kind, self.is_finished
        if kind is RequestOutputKind.DELTA:
            deltas = [delta for sequence in self.sequences if (delta := sequence.delta()) is not None]
            return self._output(deltas, is_finished, weight_version) if deltas else None
        if kind is RequestOutputKind.FINAL_ONLY and not is_finished:
            return None
        return self._output([sequence.completion() for sequence in self.sequences], is_finished, weight_version)

    def _output(self, outputs: list[CompletionOutput], is_finished: bool, weight_version: str) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=None if self.params.prompt_logprobs is None else self.prompt_logprobs,
            outputs=outputs,
            finished=is_finished,
            metrics=RequestMetrics(
                self.arrival_time,
                self.first_scheduled_time,
                self.first_token_time,
                self.finished_time,
                self.num_cached_tokens,
            ),
            weight_version=weight_version,
        )
