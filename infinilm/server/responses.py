"""What clients get: OpenAI's responses. `reasoning_content` is named as vLLM names it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """How many tokens of the prompt were found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """What a request took, in tokens. Prompts of one request add up."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ModelCard(BaseModel):
    """One name of the model. `max_model_len` is in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "infinilm"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Error(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: Error


class TopLogprob(BaseModel):
    """A token that could have stood there; `bytes` where the token is not special."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was generated, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens, those of its reasoning and tool calls too."""

    content: list[TokenLogprob] | None = None
    refusal: None = None


class FunctionCall(BaseModel):
    """A function and its arguments, JSON as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call the model wants made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ResponseMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """`POST /v1/chat/completions`. `system_fingerprint` names the version of the weights that answered."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class FunctionCallDelta(BaseModel):
    """What is new of a function call: the name once, arguments piece by piece."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """What is new of the tool call `index`; the first has its id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChoiceDelta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """What is new of one of `n` answers; `finish_reason` with its last."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class CompletionLogprobs(BaseModel):
    """Log-probabilities of tokens; the first of an echoed prompt has none. Offsets count characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion of one prompt, or what is new of it. `index` counts all of a request: prompt by prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class Completion(BaseModel):
    """`POST /v1/completions`, whole or one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str


class Health(BaseModel):
    """`GET /health`: `reason` says why the server does not serve."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None


class PluginVersion(BaseModel):
    """An active plugin."""

    name: str
    origin: str
    distribution: str | None
    version: str | None


class Version(BaseModel):
    """`GET /version`."""

    version: str
    model: str
    weight_version: str
    plugins: list[PluginVersion]
