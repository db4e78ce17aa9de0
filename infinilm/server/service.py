"""`Service`: what every route needs: the engine, the settings, the metrics, and one way to generate."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cached_property

from infinilm.async_llm import AsyncLLM, QueueFullError
from infinilm.outputs import RequestOutput
from infinilm.sampling_params import SamplingParams
from infinilm.server.errors import ApiError
from infinilm.server.metrics import Metrics
from infinilm.server.prompts import TokenizedPrompt
from infinilm.server.settings import Settings
from infinilm.server.streaming import merged
from infinilm.server.trace import Trace
from infinilm_hookspecs import Processor, UnavailableError


class Service:
    """One engine behind one app."""

    def __init__(self, engine: AsyncLLM, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine.stats)
        self.started = int(time.time())
        self._numbers = itertools.count()

    @property
    def processor(self) -> Processor | None:
        """The model's processor, where it has one."""
        return self.engine.llm.processor.value if self.engine.llm.processor else None

    @property
    def default_params(self) -> SamplingParams:
        """What a request gets where it says nothing."""
        return self.engine.llm.get_default_sampling_params()

    @property
    def max_prompt_tokens(self) -> int:
        """How long a prompt may be: there must be room for one token after it."""
        room = self.engine.llm.engine.max_model_len - 1
        return min(room, self.settings.limits.max_prompt_tokens or room)

    @cached_property
    def token_bytes(self) -> Sequence[bytes | None]:
        """The bytes of every token, `None` for special ones."""
        return self.processor.token_bytes() if self.processor else ()

    def check_model(self, name: str) -> str:
        """Return the name that answers bear. Raises `ApiError` where no model is served as `name`."""
        names = self.settings.served_model_names
        if name not in names:
            served = ", ".join(map(repr, names))
            raise ApiError(
                404, f"there is no model {name!r} here; this server has {served}", param="model", code="model_not_found"
            )
        return names[0]

    def check_health(self) -> None:
        """Raise `ApiError` with the reason where the engine does not serve."""
        reason = self.engine.health()
        if reason is not None:
            raise _unavailable(reason)

    def check_num_answers(self, num_answers: int) -> None:
        """Raise `ApiError` where one request wants more answers than the operator allows."""
        limit = self.settings.limits.max_answers
        if num_answers > limit:
            raise ApiError(
                400, f"{num_answers} answers to one request are above this server's limit of {limit}", param="n"
            )

    async def generate(
        self, prompts: Sequence[TokenizedPrompt], params: SamplingParams, trace: Trace
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield what the engine makes of the prompts, each output with its prompt's number, and keep the books.

        Raises `RequestError` for what can never be served and `ApiError` for what cannot be now, both before the first
        output, as a rule; anything later means that the answer broke off.
        """
        self.check_health()
        streams = [self._generate_one(prompt, params, trace) for prompt in prompts]
        try:
            async with aclosing(merged(streams)) as outputs:
                async for at, output in outputs:
                    yield at, output
        except QueueFullError as err:
            headers = {"Retry-After": str(self.settings.limits.retry_after)}
            raise ApiError(429, str(err), code="queue_full", headers=headers) from err
        except UnavailableError as err:
            raise _unavailable(str(err)) from err

    async def _generate_one(
        self, prompt: TokenizedPrompt, params: SamplingParams, trace: Trace
    ) -> AsyncGenerator[RequestOutput, None]:
        request_id = f"{trace.request_id}-{next(self._numbers)}"
        lengths: dict[int, int] = {}
        trace.num_prompt_tokens += len(prompt.token_ids)
        stream = self.engine.generate(prompt.for_engine(), params, request_id=request_id)
        assert isinstance(stream, AsyncGenerator)
        async with aclosing(stream) as outputs:
            async for output in outputs:
                for completion in output.outputs:
                    num_tokens = len(completion.token_ids)
                    lengths[completion.index] = lengths.get(completion.index, 0) + num_tokens
                    trace.num_generated_tokens += num_tokens
                    if completion.finish_reason == "abort":
                        raise ApiError(503, "the server stopped before the answer was complete", code="aborted")
                    if completion.finish_reason is not None:
                        trace.finish_reasons.append(completion.finish_reason)
                if output.finished and output.metrics is not None:
                    trace.num_cached_tokens += output.metrics.num_cached_tokens
                    self.metrics.observe(output.metrics, max(lengths.values(), default=0))
                yield output


def _unavailable(reason: str) -> ApiError:
    return ApiError(503, f"this server does not serve now: {reason}", code="unavailable")
