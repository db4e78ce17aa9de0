"""What clients send: OpenAI's requests, with vLLM's sampling options as fields of their own.

Types are exact, nothing is coerced, and a field that is not here is refused by name. Ranges are `SamplingParams`' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

JsonObject = dict[str, Any]


class Message(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Message):
    """A piece of a message's text. Other kinds of content are refused: models here read text."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class InstructionMessage(Message):
    """What the operator or developer says. Templates know it as the system's."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Message):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Message):
    """A function and the arguments a model gave it, JSON as text."""

    name: str
    arguments: str


class CalledTool(Message):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Message):
    """What the model said. `refusal`, `annotations`, `audio` and `function_call` may be there, empty."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Message):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Message):
    """A function the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Message):
    """A tool the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Message):
    """Names a function."""

    name: str


class NamedTool(Message):
    """A tool the model must call."""

    type: Literal["function"]
    function: FunctionName


class TextFormat(Message):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Message):
    """Some JSON object."""

    type: Literal["json_object"]


class NamedSchema(Message):
    """A JSON schema. It is always kept strictly, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: Annotated[JsonObject, Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(Message):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Message):
    """vLLM's way to say what the answer must look like: exactly one of these."""

    json_: Annotated[str | JsonObject | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(Message):
    """With `include_usage`, the last event has no choices and the usage of the whole request.

    With `continuous_usage_stats`, vLLM's, every event has the usage so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Message):
    """What both requests have. `user`, `safety_identifier`, `prompt_cache_key` and `metadata` have no effect."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    extra_args: JsonObject | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `max_tokens` of 0 with `echo` scores a prompt and generates nothing."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: None = None
    best_of: Literal[1] | None = None
    add_special_tokens: bool | None = None

    @property
    def num_prompts(self) -> int:
        """How many prompts there are; none where the list is empty."""
        return len(self.prompts())

    def prompts(self) -> Sequence[str | list[int]]:
        """Return every prompt: one is given as text or token ids, several as a list of those."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [cast("list[int]", self.prompt)]
        return cast("Sequence[str | list[int]]", self.prompt)


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`. `chat_template_kwargs` are variables of the model's chat template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    chat_template_kwargs: JsonObject | None = None

    def messages_for_template(self) -> list[Mapping[str, Any]]:
        """Return the messages as plain JSON, without what is not said."""
        return [message.model_dump(exclude_none=True) for message in self.messages]
