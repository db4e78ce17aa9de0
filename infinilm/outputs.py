"""What generation returns, in vLLM's shapes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural log-probability at one position; `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer, or what is new of it.

    `text` continues the prompt: `prompt + text` reads on. `token_ids` include the end-of-sequence token, `text` does
    not. `logprobs` has one dict per token, with the chosen token first; `cumulative_logprob` is the sum of the chosen
    tokens' from the first on, in nats. `finish_reason` is "stop" at an end-of-sequence token, or at a stop string or
    stop token, which is then `stop_reason`; "length" where a limit was reached; "abort"; `None` while there is more to
    come.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic()`, `None` where they have not.

    `num_cached_tokens` are those of the prompt that were taken from the prefix cache when it started.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request's result, or what there is of it. `prompt_logprobs[0]` is `None`: nothing comes before the first.

    `outputs` are sorted by `index`: all answers, or in a stream of deltas those that have something new.
    `weight_version` names the weights that its last token was made with.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    weight_version: str = "0"


def merge_deltas(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """Return what a reader of a stream of deltas gets who missed `earlier`."""
    merged = {output.index: output for output in earlier.outputs}
    for output in later.outputs:
        before = merged.get(output.index)
        merged[output.index] = output if before is None else _joined(before, output)
    return replace(later, outputs=[merged[index] for index in sorted(merged)])


def _joined(before: CompletionOutput, after: CompletionOutput) -> CompletionOutput:
    logprobs = None if after.logprobs is None else [*(before.logprobs or ()), *after.logprobs]
    return replace(
        after, text=before.text + after.text, token_ids=[*before.token_ids, *after.token_ids], logprobs=logprobs
    )
