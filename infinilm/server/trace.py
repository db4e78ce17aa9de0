"""What is known of one HTTP request while it lasts: its id, for every line of the log, and what it took."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from infinilm.server.responses import PromptTokensDetails, Usage

_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)


@dataclass(slots=True)
class Trace:
    """One request's id and figures, in tokens."""

    request_id: str
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def usage(self) -> Usage:
        """Return the figures as a client gets them."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_generated_tokens,
            total_tokens=self.num_prompt_tokens + self.num_generated_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens),
        )


def new_request_id(given: str | None) -> str:
    """Return the id a client gave its request, where it is one, and otherwise a new one."""
    return given if given is not None and _VALID_ID.fullmatch(given) else uuid.uuid4().hex
