"""Log-probabilities in the shapes of the chat and the completions API."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from infinilm.outputs import Logprob
from infinilm.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_IMPOSSIBLE = -9999.0  # OpenAI's number for a token that cannot come; JSON has no -Infinity

Position = Mapping[int, Logprob]
"""The chosen token first, then the likeliest ones."""


def chat_logprobs(positions: Sequence[Position], num_top: int, token_bytes: Sequence[bytes | None]) -> ChatLogprobs:
    """Return the log-probabilities of new tokens, with exact bytes where a token is half a character."""

    def top(token_id: int, entry: Logprob) -> TopLogprob:
        known = token_bytes[token_id] if token_id < len(token_bytes) else None
        return TopLogprob(
            token=entry.decoded_token or "",
            logprob=_finite(entry.logprob),
            bytes=None if known is None else list(known),
        )

    content = []
    for position in positions:
        (chosen_id, chosen), *_ = position.items()
        likeliest = [top(token_id, entry) for token_id, entry in position.items() if entry.rank <= num_top]
        token = top(chosen_id, chosen)
        content.append(
            TokenLogprob(
                token=token.token,
                logprob=token.logprob,
                bytes=token.bytes,
                top_logprobs=sorted(likeliest, key=lambda it: -it.logprob)[:num_top],
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    positions: Sequence[Position | None], token_ids: Sequence[int], num_top: int, offset: int, first_text: str = ""
) -> CompletionLogprobs:
    """Return the log-probabilities of tokens that begin at character `offset`.

    A position is `None` for the first token of a prompt, whose text is `first_text`.
    """
    tokens: list[str] = []
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for position, token_id in zip(positions, token_ids, strict=True):
        text = first_text if position is None else position[token_id].decoded_token or ""
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        chosen.append(None if position is None else _finite(position[token_id].logprob))
        tops.append(None if position is None else _tops(position, token_id, num_top))
    return CompletionLogprobs(
        tokens=tokens, token_logprobs=chosen, top_logprobs=tops if num_top else None, text_offset=offsets
    )


def _tops(position: Position, token_id: int, num_top: int) -> dict[str, float]:
    """Return the likeliest tokens and the chosen one by their text; of two with one text, the likelier stays."""
    found: dict[str, float] = {}
    for entry in sorted(position.values(), key=lambda it: it.rank):
        if entry.rank <= num_top or entry is position[token_id]:
            found.setdefault(entry.decoded_token or "", _finite(entry.logprob))
    return found


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
