"""`POST /v1/completions`: prompts continued, whole or in pieces, with the prompt itself on request."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal

from infinilm.outputs import CompletionOutput, RequestOutput
from infinilm.sampling_params import SamplingParams
from infinilm.server.chat import fingerprint
from infinilm.server.errors import ApiError
from infinilm.server.logprobs import Position, completion_logprobs
from infinilm.server.prompts import TokenizedPrompt, completion_prompts
from infinilm.server.protocol import CompletionRequest
from infinilm.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from infinilm.server.sampling import limited_max_tokens, sampling_params, structure_of
from infinilm.server.service import Service
from infinilm.server.streaming import DONE, event
from infinilm.server.trace import Trace

_MAX_LOGPROBS = 20
_DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this route alone


@dataclass(slots=True)
class _Choice:
    """How far one completion has come."""

    is_started: bool = False
    num_characters: int = 0


class Continuation:
    """One completion request on its way: prompts and parameters are known, nothing is generated yet."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        trace: Trace,
        *,
        model: str,
        prompts: Sequence[TokenizedPrompt],
    ) -> None:
        self._service = service
        self._request = request
        self._trace = trace
        self._model = model
        self._prompts = prompts
        self._id = f"cmpl-{trace.request_id}"
        self._created = int(time.time())
        self._generates_nothing = request.max_tokens == 0
        self._params = _params_of(request, service)
        self._choices = [_Choice() for _ in range(len(prompts) * self._params.n)]

    @classmethod
    async def prepare(cls, service: Service, request: CompletionRequest, trace: Trace) -> Continuation:
        """Take a request. Raises `ApiError` or `RequestError` where it asks for what cannot be."""
        model = service.check_model(request.model)
        service.check_health()
        service.check_num_answers(request.num_prompts * (request.n or 1))
        prompts = await completion_prompts(request, service.processor, service.max_prompt_tokens)
        return cls(service, request, trace, model=model, prompts=prompts)

    async def complete(self) -> Completion:
        """Return the whole of every completion, prompt by prompt."""
        choices: list[CompletionChoice] = []
        async with aclosing(self._service.generate(self._prompts, self._params, self._trace)) as outputs:
            async for at, output in outputs:
                choices += [self._choice(at, completion, output) for completion in output.outputs]
        answer = self._chunk(sorted(choices, key=lambda it: it.index), output)
        answer.usage = self._usage()
        return answer

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of all completions."""
        async with aclosing(self._service.generate(self._prompts, self._params, self._trace)) as outputs:
            async for at, output in outputs:
                choices = [self._choice(at, completion, output) for completion in output.outputs]
                news = [it for it in choices if it.text or it.finish_reason or it.logprobs]
                if news:
                    yield b"".join(event(self._chunk([choice], output)) for choice in news)
        if self._request.wants_usage:
            chunk = self._chunk([], output)
            chunk.usage = self._usage()
            yield event(chunk)
        yield DONE

    def _usage(self) -> Usage:
        if self._generates_nothing:
            self._trace.num_generated_tokens = 0
        return self._trace.usage()

    def _chunk(self, choices: list[CompletionChoice], output: RequestOutput) -> Completion:
        chunk = Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=fingerprint(output),
        )
        if self._request.wants_usage_so_far:
            chunk.usage = self._usage()
        elif self._request.wants_usage:
            chunk.usage = None
        return chunk

    def _choice(self, at: int, completion: CompletionOutput, output: RequestOutput) -> CompletionChoice:
        """Return what is new of one completion; with its first piece, the prompt where it is to be echoed."""
        if self._generates_nothing:
            completion = replace(completion, text="", token_ids=[], logprobs=[], finish_reason="length")
        index = at * self._params.n + completion.index
        choice = self._choices[index]
        echoed = bool(self._request.echo) and not choice.is_started
        choice.is_started = True
        prompt = self._prompt_text(at) if echoed else ""
        logprobs = self._logprobs(at, completion, output, choice.num_characters, echoed)
        if logprobs is not None and logprobs.tokens:
            choice.num_characters = logprobs.text_offset[-1] + len(logprobs.tokens[-1])
        return CompletionChoice(
            index=index,
            text=prompt + completion.text,
            logprobs=logprobs,
            finish_reason=_finish_reason(completion),
            stop_reason=completion.stop_reason,
        )

    def _logprobs(
        self, at: int, completion: CompletionOutput, output: RequestOutput, offset: int, echoed: bool
    ) -> CompletionLogprobs | None:
        if self._request.logprobs is None:
            return None
        positions: list[Position | None] = list(completion.logprobs or ())
        token_ids = list(completion.token_ids)
        first_text = ""
        if echoed:
            token_ids = [*self._prompts[at].token_ids, *token_ids]
            positions = [*(output.prompt_logprobs or ()), *positions]
            first_text = self._decode(token_ids[:1])
        if not token_ids:
            return None
        return completion_logprobs(positions, token_ids, self._request.logprobs, offset, first_text)

    def _prompt_text(self, at: int) -> str:
        prompt = self._prompts[at]
        return prompt.text if prompt.text is not None else self._decode(prompt.token_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        processor = self._service.processor
        return processor.decode(token_ids, skip_special_tokens=False) if processor else ""


def _params_of(request: CompletionRequest, service: Service) -> SamplingParams:
    if request.logprobs is not None and not 0 <= request.logprobs <= _MAX_LOGPROBS:
        message = f"logprobs={request.logprobs} is not allowed; it takes 0 to {_MAX_LOGPROBS}"
        raise ApiError(400, message, param="logprobs")
    wanted = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if wanted == 0:
        if not request.echo:
            raise ApiError(400, "max_tokens=0 generates nothing; it takes 1 or above, or echo", param="max_tokens")
        wanted = 1  # the engine samples a token to finish; it is not shown
    is_default = request.max_tokens is None
    limits = service.settings.limits
    return sampling_params(
        request,
        service.default_params,
        max_tokens=min(wanted, limits.max_tokens or wanted) if is_default else limited_max_tokens(wanted, limits),
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        structure=structure_of(request),
    )


def _finish_reason(completion: CompletionOutput) -> Literal["stop", "length"] | None:
    assert completion.finish_reason != "abort"  # the service has raised
    return completion.finish_reason
