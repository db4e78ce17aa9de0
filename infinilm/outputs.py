"""What generation returns, in vLLM's shapes. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural log-probability at one position; `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer.

    `text` continues the prompt: `prompt + text` reads on. `token_ids` include the end-of-sequence token, `text` does
    not. `logprobs` has one dict per token, with the chosen token first; `cumulative_logprob` is their sum, in nats.
    `finish_reason` is "stop" at an end-of-sequence token or a stop string, which is then `stop_reason`; "length" where
    a limit was reached; `None` while there is more to come.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request's result. `prompt_logprobs[0]` is `None`: nothing comes before the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
