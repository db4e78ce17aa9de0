"""From what a client wrote to a prompt's tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from infinilm.server.errors import ApiError
from infinilm.server.protocol import ChatRequest, CompletionRequest
from infinilm.server.tools import ToolUse
from infinilm_hookspecs import Processor, RequestError

_SHORT = 20_000  # characters the event loop waits for; what is longer goes to a thread


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the engine takes it, and its text where there is one."""

    token_ids: Sequence[int]
    text: str | None

    def for_engine(self) -> Mapping[str, Any]:
        """Return the prompt as `AsyncLLM.generate` takes it."""
        return {"prompt_token_ids": self.token_ids} | ({} if self.text is None else {"prompt": self.text})


async def chat_prompt(
    request: ChatRequest, tools: ToolUse, processor: Processor | None, max_tokens: int
) -> TokenizedPrompt:
    """Return a conversation as the model's chat template writes it, of up to `max_tokens`."""
    if processor is None:
        raise RequestError("chat needs a tokenizer, and this model has none; use /v1/completions with token ids")
    kwargs = request.chat_template_kwargs or {}
    taken = kwargs.keys() & {"messages", "tools", "add_generation_prompt", "conversation"}
    if taken:
        raise ApiError(400, f"chat_template_kwargs cannot set {min(taken)!r}", param="chat_template_kwargs")
    messages = [_for_template(message) for message in request.messages_for_template()]
    render = partial(processor.render_chat, messages, tools=tools.shown, **kwargs)
    is_short = sum(len(message["content"]) for message in messages) <= _SHORT
    text = render() if is_short else await asyncio.to_thread(render)
    return await _tokenize(processor, text, max_tokens, add_special_tokens=False)


async def completion_prompts(
    request: CompletionRequest, processor: Processor | None, max_tokens: int
) -> list[TokenizedPrompt]:
    """Return every prompt of a completion request, each of up to `max_tokens`."""
    if not request.num_prompts:
        raise ApiError(400, "prompt is an empty list; give one prompt or more", param="prompt")
    add_special_tokens = request.add_special_tokens is not False
    prompts = []
    for prompt in request.prompts():
        if isinstance(prompt, str):
            if processor is None:
                raise RequestError("a text prompt needs a tokenizer, and this model has none; give token ids")
            prompts.append(await _tokenize(processor, prompt, max_tokens, add_special_tokens=add_special_tokens))
        else:
            _check_length(len(prompt), max_tokens)
            prompts.append(TokenizedPrompt(prompt, None))
    return prompts


async def _tokenize(processor: Processor, text: str, max_tokens: int, *, add_special_tokens: bool) -> TokenizedPrompt:
    if len(text) <= _SHORT:
        token_ids = processor.encode(text, add_special_tokens=add_special_tokens)
    else:
        token_ids = await asyncio.to_thread(processor.encode, text, add_special_tokens=add_special_tokens)
    _check_length(len(token_ids), max_tokens)
    return TokenizedPrompt(token_ids, text)


def _check_length(num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise ApiError(
            400,
            f"the prompt has {num_tokens} tokens, and this server's limit is {max_tokens}",
            code="context_length_exceeded",
        )


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates know it: one text, the system's role, arguments as an object."""
    plain = dict(message)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(plain.get("content"), list):
        plain["content"] = "\n".join(part["text"] for part in plain["content"])
    plain.setdefault("content", "")
    if "tool_calls" in plain:
        plain["tool_calls"] = [_with_object_arguments(call) for call in plain["tool_calls"]]
    return plain


def _with_object_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as err:
        arguments = err
    if not isinstance(arguments, dict):
        raise ApiError(
            400, f"the arguments of tool call {call['id']!r} are no JSON object: {arguments}", param="messages"
        )
    return {**call, "function": {**function, "arguments": arguments}}
