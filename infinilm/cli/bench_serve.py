"""`bench serve`: requests to a live server at random times, each timed token by token."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from infinilm.cli.bench_http import HttpClient
from infinilm.cli.bench_report import Report, distribution
from infinilm_hookspecs import UnavailableError

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
)


@dataclass(slots=True)
class Measured:
    """One request: moments in seconds of `time.perf_counter()`, `event_times` those of events with text."""

    started: float
    event_times: list[float] = field(default_factory=list)
    finished: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


def drive(arguments: Any) -> Report:
    """Send requests for as long as is wanted, and return what was seen. Raises `UnavailableError` where none worked."""
    started = time.perf_counter()
    measured = asyncio.run(_Driver(arguments).run())
    seconds = max((it.finished for it in measured), default=started) - min((it.started for it in measured), default=0)
    worked = [it for it in measured if it.error is None]
    errors = Counter(it.error for it in measured if it.error is not None)
    if not worked:
        told = "; ".join(f"{count} x {message}" for message, count in errors.items())
        raise UnavailableError(f"no request to {arguments.base_url} worked: {told}")
    return _report(arguments, worked, errors, seconds)


class _Driver:
    """Sends requests to one server: at the times a Poisson process says, or whenever a client is free."""

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments
        self._chance = random.Random(arguments.seed)
        self._client = HttpClient(arguments.base_url, api_key=arguments.api_key)
        self._clients = asyncio.Semaphore(arguments.num_clients)
        self._model = arguments.model

    async def run(self) -> list[Measured]:
        if self._model is None:
            self._model = (await self._client.get_json("/v1/models"))["data"][0]["id"]
        measured: list[Measured] = []
        async with asyncio.TaskGroup() as group:
            async for due, body in self._arrivals():
                one = Measured(due)
                measured.append(one)
                group.create_task(self._send(body, one))
        return measured

    async def _arrivals(self) -> AsyncIterator[tuple[float, Mapping[str, Any]]]:
        """Yield request bodies when they can be sent, each with the moment from which its time counts.

        Of a Poisson process that is when it was due: waiting for a client that is free is part of what a user waits.
        """
        given, now = self._arguments, time.perf_counter()
        end = None if given.num_requests else now + given.duration
        due, number = now, 0
        while given.num_requests is None or number < given.num_requests:
            number += 1
            if given.request_rate is not None:
                due += self._chance.expovariate(given.request_rate)
                await asyncio.sleep(max(0.0, min(due, end or due) - time.perf_counter()))
            await self._clients.acquire()
            if end is not None and max(due, time.perf_counter()) >= end:
                self._clients.release()
                return
            yield (time.perf_counter() if given.request_rate is None else due), self._body()

    def _body(self) -> Mapping[str, Any]:
        given = self._arguments
        prompt = self._chance.choice(given.prompt) if given.prompt else self._random_words()
        is_chat = given.endpoint == "chat"
        asked = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
        return {
            "model": self._model,
            **asked,
            "max_tokens": given.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if given.ignore_eos else {}),
        }

    def _random_words(self) -> str:
        return " ".join(self._chance.choices(_WORDS.split(), k=self._arguments.input_len))

    async def _send(self, body: Mapping[str, Any], measured: Measured) -> None:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        try:
            async with asyncio.timeout(self._arguments.timeout):
                async for data in self._client.stream_events(path, body):
                    _take(data, measured)
        except TimeoutError:
            measured.error = f"no whole answer within {self._arguments.timeout:g} s"
        except (UnavailableError, OSError, ValueError) as err:
            measured.error = f"{type(err).__name__}: {err}"
        finally:
            measured.finished = time.perf_counter()
            self._clients.release()
        if measured.error is None and not measured.event_times:
            measured.error = "an answer without a token"


def _take(data: str, measured: Measured) -> None:
    """Take note of one event. Raises `ValueError` where it is an error, or not JSON."""
    event = json.loads(data)
    if "error" in event:
        raise ValueError(event["error"].get("message", "an error without a message"))
    if event.get("usage"):
        measured.num_prompt_tokens = event["usage"]["prompt_tokens"]
        measured.num_output_tokens = event["usage"]["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta", choice)
        if any(delta.get(name) for name in ("text", "content", "reasoning_content", "tool_calls")):
            measured.event_times.append(time.perf_counter())


def _report(arguments: Any, worked: list[Measured], errors: Counter[str], seconds: float) -> Report:
    num_output_tokens = sum(it.num_output_tokens for it in worked)
    first_start = min(it.started for it in worked)
    by_second = Counter(int(moment - first_start) for it in worked for moment in it.event_times)
    times = {
        "time to first token": [it.event_times[0] - it.started for it in worked],
        "inter-token latency": [b - a for it in worked for a, b in pairwise(it.event_times)],
        "time per output token": [
            (it.event_times[-1] - it.event_times[0]) / (it.num_output_tokens - 1)
            for it in worked
            if it.num_output_tokens > 1
        ],
        "whole answer": [it.finished - it.started for it in worked],
    }
    figures = {
        "seconds": seconds,
        "requests": float(len(worked)),
        "errors": float(errors.total()),
        "requests/s": len(worked) / seconds,
        "output tokens/s": num_output_tokens / seconds,
        "total tokens/s": (num_output_tokens + sum(it.num_prompt_tokens for it in worked)) / seconds,
    }
    left_out = ("run", "command", "plugins", "action", "json", "plot", "api_key")
    return Report(
        command="bench serve",
        settings={name: value for name, value in vars(arguments).items() if name not in left_out},
        figures=figures,
        distributions={name: distribution(values) for name, values in times.items() if values},
        errors=dict(errors),
        events_by_second=[by_second[second] for second in range(int(seconds) + 1)],
    )
