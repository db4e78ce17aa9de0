"""What an operator decides about a server: names, keys and limits."""

from __future__ import annotations

from dataclasses import dataclass, field

from infinilm_hookspecs import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask of the server. Sizes in bytes, lengths in tokens, times in seconds; `None` is no limit.

    `max_answers` are those to one request: prompts times `n`. `retry_after` is what a refused client is
    told to wait. Raises `RequestError` for a limit below 1.
    """

    max_body_size: int = 8 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_answers: int = 256
    max_concurrent_requests: int = 1024
    max_num_waiting: int | None = 1024
    request_timeout: float | None = 600.0
    body_timeout: float = 30.0
    retry_after: int = 1

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RequestError(f"the limit {name}={value!r} is not allowed; it takes a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A server's settings. `served_model_names` are the names a request may give; answers bear the first.

    With `api_keys`, everything but `/health` and the chat page wants one of them as `Authorization: Bearer KEY`.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    limits: Limits = field(default_factory=Limits)
