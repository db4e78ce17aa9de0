"""`POST /v1/chat/completions`: from messages to an answer, whole or in pieces."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from infinilm.outputs import CompletionOutput, RequestOutput
from infinilm.sampling_params import SamplingParams
from infinilm.server.answers import Answer, new_answer
from infinilm.server.errors import ApiError
from infinilm.server.logprobs import chat_logprobs
from infinilm.server.prompts import TokenizedPrompt, chat_prompt
from infinilm.server.protocol import ChatRequest
from infinilm.server.responses import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChoiceDelta,
    ChunkChoice,
    FunctionCall,
    FunctionCallDelta,
    ResponseMessage,
    ToolCall,
    ToolCallDelta,
)
from infinilm.server.sampling import limited_max_tokens, sampling_params, structure_of
from infinilm.server.service import Service
from infinilm.server.streaming import DONE, event
from infinilm.server.tools import ToolUse, tool_use
from infinilm.server.trace import Trace
from infinilm_hookspecs import ParsedText
from infinilm_hookspecs.types import ResponseParser

_MAX_TOP_LOGPROBS = 20


@dataclass(slots=True)
class _Choice:
    """One of the answers, as far as it has come."""

    answer: Answer
    parsed: ParsedText = field(default_factory=ParsedText)
    num_calls: int = 0
    is_started: bool = False

    def put(self, completion: CompletionOutput) -> ParsedText:
        """Return what is new of the answer."""
        new = self.answer.put(completion.text)
        if completion.finish_reason is not None:
            new += self.answer.finish()
        self.num_calls = max([self.num_calls, *(call["index"] + 1 for call in new.tool_calls)])
        return new

    def finish_reason(self, completion: CompletionOutput) -> Literal["stop", "length", "tool_calls"] | None:
        """Return why the answer ended, in the API's words."""
        assert completion.finish_reason != "abort"  # the service has raised
        return "tool_calls" if completion.finish_reason == "stop" and self.num_calls else completion.finish_reason


class Chat:
    """One chat request on its way: prompt and parameters are known, nothing is generated yet."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        trace: Trace,
        *,
        model: str,
        tools: ToolUse,
        prompt: TokenizedPrompt,
    ) -> None:
        self._service = service
        self._request = request
        self._trace = trace
        self._model = model
        self._prompt = prompt
        self._id = f"chatcmpl-{trace.request_id}"
        self._created = int(time.time())
        self._params = _params_of(request, service, tools)
        if tools.mode == "auto" and self._new_parser(tools).reads_special_tokens:
            self._params = replace(self._params, skip_special_tokens=False)
        self._choices = [_Choice(new_answer(tools, partial(self._new_parser, tools))) for _ in range(self._params.n)]

    @classmethod
    async def prepare(cls, service: Service, request: ChatRequest, trace: Trace) -> Chat:
        """Take a request. Raises `ApiError` or `RequestError` where it asks for what cannot be."""
        model = service.check_model(request.model)
        service.check_health()
        service.check_num_answers(request.n or 1)
        tools = tool_use(request)
        prompt = await chat_prompt(request, tools, service.processor, service.max_prompt_tokens)
        if request.logprobs:
            await asyncio.to_thread(lambda: service.token_bytes)  # long, the first time
        return cls(service, request, trace, model=model, tools=tools, prompt=prompt)

    async def complete(self) -> ChatCompletion:
        """Return the whole answer."""
        choices: list[ChatChoice] = []
        async with aclosing(self._service.generate([self._prompt], self._params, self._trace)) as outputs:
            async for _, output in outputs:
                choices = [self._whole_choice(completion) for completion in output.outputs]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._trace.usage(),
            system_fingerprint=fingerprint(output),
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer's events."""
        async with aclosing(self._service.generate([self._prompt], self._params, self._trace)) as outputs:
            async for _, output in outputs:
                events = [event(chunk) for completion in output.outputs for chunk in self._chunks(completion, output)]
                if events:
                    yield b"".join(events)
        if self._request.wants_usage:
            chunk = self._chunk([], output)
            chunk.usage = self._trace.usage()
            yield event(chunk)
        yield DONE

    def _new_parser(self, tools: ToolUse) -> ResponseParser:
        processor = self._service.processor
        assert processor is not None  # it has written the prompt
        return processor.parser(tools=tools.shown, prompt=self._prompt.text or "")

    def _whole_choice(self, completion: CompletionOutput) -> ChatChoice:
        choice = self._choices[completion.index]
        parsed = ParsedText() + choice.put(completion)
        calls = [
            ToolCall(
                id=call.get("id") or _new_call_id(),
                function=FunctionCall(name=call["name"], arguments=call["arguments"]),
            )
            for call in parsed.tool_calls
        ]
        finish_reason = choice.finish_reason(completion)
        assert finish_reason is not None
        return ChatChoice(
            index=completion.index,
            message=ResponseMessage(
                content=parsed.content or (None if calls else ""),
                reasoning_content=parsed.reasoning or None,
                tool_calls=calls or None,
            ),
            logprobs=self._logprobs(completion),
            finish_reason=finish_reason,
        )

    def _chunks(self, completion: CompletionOutput, output: RequestOutput) -> list[ChatCompletionChunk]:
        """Return the events for what is new of one answer: before its first, one with the role."""
        choice = self._choices[completion.index]
        found = []
        if not choice.is_started:
            choice.is_started = True
            role = ChoiceDelta(role="assistant", content="")
            found.append(self._chunk([ChunkChoice(index=completion.index, delta=role, finish_reason=None)], output))
        delta = _delta(choice.put(completion))
        logprobs = self._logprobs(completion)
        if delta.model_fields_set or logprobs is not None or completion.finish_reason is not None:
            news = ChunkChoice(index=completion.index, delta=delta, finish_reason=choice.finish_reason(completion))
            if logprobs is not None:
                news.logprobs = logprobs
            found.append(self._chunk([news], output))
        return found

    def _chunk(self, choices: list[ChunkChoice], output: RequestOutput) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=fingerprint(output),
        )
        if self._request.wants_usage_so_far:
            chunk.usage = self._trace.usage()
        elif self._request.wants_usage:
            chunk.usage = None
        return chunk

    def _logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        if not self._request.logprobs or not completion.logprobs:
            return None
        return chat_logprobs(completion.logprobs, self._request.top_logprobs or 0, self._service.token_bytes)


def fingerprint(output: RequestOutput) -> str:
    """Return the name of what answered: the version of the weights."""
    return f"weights-{output.weight_version}"


def _params_of(request: ChatRequest, service: Service, tools: ToolUse) -> SamplingParams:
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs wants logprobs to be true", param="top_logprobs")
    if not 0 <= (request.top_logprobs or 0) <= _MAX_TOP_LOGPROBS:
        message = f"top_logprobs={request.top_logprobs} is not allowed; it takes 0 to {_MAX_TOP_LOGPROBS}"
        raise ApiError(400, message, param="top_logprobs")
    structure = structure_of(request)
    if structure is not None and tools.structure is not None:
        raise ApiError(
            400, "a forced tool call and response_format say different things; give one", param="tool_choice"
        )
    by_name = {"max_completion_tokens": request.max_completion_tokens, "max_tokens": request.max_tokens}
    given = [name for name, value in by_name.items() if value is not None] or ["max_tokens"]
    return sampling_params(
        request,
        service.default_params,
        max_tokens=limited_max_tokens(by_name[given[0]], service.settings.limits, given[0]),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        structure=tools.structure or structure,
    )


def _delta(new: ParsedText) -> ChoiceDelta:
    said: dict[str, Any] = {}
    if new.content:
        said["content"] = new.content
    if new.reasoning:
        said["reasoning_content"] = new.reasoning
    if new.tool_calls:
        said["tool_calls"] = [_call_delta(call) for call in new.tool_calls]
    return ChoiceDelta(**said)


def _call_delta(part: Mapping[str, Any]) -> ToolCallDelta:
    arguments = part.get("arguments", "")
    if "name" not in part:
        return ToolCallDelta(index=part["index"], function=FunctionCallDelta(arguments=arguments))
    return ToolCallDelta(
        index=part["index"],
        id=part.get("id") or _new_call_id(),
        type="function",
        function=FunctionCallDelta(name=part["name"], arguments=arguments),
    )


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
