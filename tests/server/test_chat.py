"""`/v1/chat/completions`, through OpenAI's own client: answers, streams, tools, formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from live_server import MODEL, LiveServer, serving, write_tiny
from openai import OpenAI
from pydantic import BaseModel

from infinilm import LLM

SUM: list[Any] = [{"role": "user", "content": "seven plus eight"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Look outside", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
THINKING = (
    "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}({{ m.reasoning_content | trim }}) {% endif %}"
    "{{ (m.content.split('</think>') | last) | trim }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def said(text: str) -> dict[str, Any]:
    """Return options that leave a random model nothing to say but `text`."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


def added_up(stream: Any) -> tuple[dict[int, dict[str, Any]], list[Any]]:
    """Return every choice of a stream put together as a client puts them together, and the chunks."""
    chunks = list(stream)
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            it = found.setdefault(choice.index, {"content": "", "reasoning": "", "calls": {}, "reason": None})
            it["content"] += choice.delta.content or ""
            it["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            assert it["reason"] is None, "something comes after the finish reason"
            it["reason"] = choice.finish_reason
            for call in choice.delta.tool_calls or ():
                known = it["calls"].setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
                known["arguments"] += call.function.arguments or ""
    return found, chunks


# ---------------------------------------------------------------- answers


def test_conversation_is_answered(calculator: OpenAI) -> None:
    messages = [*SUM, {"role": "assistant", "content": "fifteen"}, {"role": "user", "content": "three minus nine"}]
    answer = calculator.chat.completions.create(messages=messages, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == " minus six"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens_details is not None


def test_stream_has_the_role_first_and_adds_up(calculator: OpenAI) -> None:
    found, chunks = added_up(
        calculator.chat.completions.create(
            messages=SUM, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert {index: it["content"] for index, it in found.items()} == {0: " fifteen", 1: " fifteen"}
    assert {it["reason"] for it in found.values()} == {"stop"}
    for index in (0, 1):
        first = next(choice for chunk in chunks for choice in chunk.choices if choice.index == index)
        assert first.delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.system_fingerprint for chunk in chunks} == {"weights-0"}


def test_openais_stream_helper_reads_it(calculator: OpenAI) -> None:
    with calculator.chat.completions.stream(messages=SUM, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == " fifteen"
        assert stream.get_final_completion().choices[0].message.content == " fifteen"


def test_usage_so_far_comes_with_every_event(client: OpenAI) -> None:
    options = {"stream_options": {"continuous_usage_stats": True}, "extra_body": {"ignore_eos": True}}
    chunks = list(client.chat.completions.create(messages=HELLO, max_tokens=20, stream=True, **options, **GREEDY))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 20


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_with_bytes(calculator: OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"messages": SUM, "logprobs": True, "top_logprobs": 2, **GREEDY}
    if stream:
        chunks = [c.choices[0] for c in calculator.chat.completions.create(stream=True, **options)]
        content = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content or ()]
    else:
        choice = calculator.chat.completions.create(**options).choices[0]
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
    assert [entry.token for entry in content] == [" fifteen", "<|end|>"]
    assert content[0].bytes == list(b" fifteen")
    assert content[1].bytes is None
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob > entry.top_logprobs[1].logprob


def test_bytes_of_half_characters_are_exact(client: OpenAI) -> None:
    """A token of the tiny model is one byte, and most bytes are no text of their own."""
    answer = client.chat.completions.create(messages=HELLO, max_tokens=2, logprobs=True, model=MODEL, **said("é"))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [entry.bytes for entry in logprobs.content or ()] == [[0xC3], [0xA9]]


def test_limit_on_an_answers_length(client: OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(messages=HELLO, extra_body={"ignore_eos": True}, **GREEDY, **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3


def test_without_a_limit_an_answer_fills_the_model(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=HELLO, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024


def test_equal_prompts_are_found_in_the_cache(demo: LiveServer) -> None:
    prompt = " ".join(["seven plus eight is fifteen"] * 40)
    options = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1, **GREEDY}
    demo.client.chat.completions.create(**options)
    usage = demo.client.chat.completions.create(**options).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert 0 < (usage.prompt_tokens_details.cached_tokens or 0) < usage.prompt_tokens


# ---------------------------------------------------------------- what the template sees


def prompt_of(client: OpenAI, messages: list[Any], **options: Any) -> int:
    """Return how many characters a conversation came to: in the tiny model a token is a byte."""
    answer = client.chat.completions.create(messages=messages, model=MODEL, max_tokens=1, **options)
    assert answer.usage is not None
    return answer.usage.prompt_tokens


def test_messages_reach_the_template_as_it_knows_them(client: OpenAI) -> None:
    plain = prompt_of(client, [{"role": "system", "content": "be kind"}, *HELLO])
    assert plain == len("system: be kind\nuser: hello\nassistant:")
    assert prompt_of(client, [{"role": "developer", "content": "be kind"}, *HELLO]) == plain
    parts = [{"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]}, *HELLO]
    assert prompt_of(client, parts) == plain
    assert prompt_of(client, HELLO, extra_body={"chat_template_kwargs": {"greeting": "Hi!"}}) == len(
        "user: hello\nassistant:Hi!"
    )


def test_answer_of_openais_client_goes_back_as_it_came(client: OpenAI) -> None:
    """Clients send back the message objects they were given, null fields and all."""
    first = (
        client.chat.completions.create(
            messages=HELLO, model=MODEL, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}}
        )
        .choices[0]
        .message
    )
    assert first.tool_calls
    call = first.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    length = prompt_of(client, [*HELLO, first.model_dump(), result])
    arguments = json.dumps(json.loads(call.function.arguments))  # type: ignore[union-attr]
    assert length == len(f"user: hello\nassistant: weather({arguments})\ntool: rain\nassistant:")


# ---------------------------------------------------------------- tools


@pytest.mark.parametrize("stream", [False, True])
def test_named_tool_is_called(client: OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {
        "messages": HELLO,
        "model": MODEL,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    }
    if stream:
        found, _ = added_up(client.chat.completions.create(stream=True, **options))
        content, reason, (call,) = found[0]["content"], found[0]["reason"], found[0]["calls"].values()
    else:
        choice = client.chat.completions.create(**options).choices[0]
        content, reason = choice.message.content or "", choice.finish_reason
        ((found_call),) = choice.message.tool_calls or ()
        call = {"id": found_call.id, **found_call.function.model_dump()}  # type: ignore[union-attr]
    assert (content, reason, call["name"]) == ("", "tool_calls", "weather")
    assert call["id"].startswith("call_")
    jsonschema.validate(json.loads(call["arguments"]), WEATHER)


@pytest.mark.parametrize("stream", [False, True])
def test_required_tool_is_called(client: OpenAI, stream: bool) -> None:
    """A random model would go on calling: `parallel_tool_calls` bounds it to one."""
    options: dict[str, Any] = {
        "messages": HELLO,
        "model": MODEL,
        "tools": TOOLS[:1],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 1,
    }
    if stream:
        found, _ = added_up(client.chat.completions.create(stream=True, **options))
        calls, reason = list(found[0]["calls"].values()), found[0]["reason"]
    else:
        choice = client.chat.completions.create(**options).choices[0]
        calls, reason = [it.function.model_dump() for it in choice.message.tool_calls or ()], choice.finish_reason  # type: ignore[union-attr]
        assert choice.message.content is None
    assert reason == "tool_calls"
    assert [call["name"] for call in calls] == ["weather"]
    jsonschema.validate(json.loads(calls[0]["arguments"]), WEATHER)


CALLS = (
    'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call>'
    '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_parallel", [None, False])
def test_calls_are_found_in_what_the_model_writes(client: OpenAI, stream: bool, is_parallel: bool | None) -> None:
    options: dict[str, Any] = {"messages": HELLO, "model": MODEL, "tools": TOOLS, **said(CALLS)}
    if is_parallel is not None:
        options["parallel_tool_calls"] = is_parallel
    if stream:
        found, _ = added_up(client.chat.completions.create(stream=True, **options))
        content, reason = found[0]["content"], found[0]["reason"]
        calls = [(it["name"], json.loads(it["arguments"])) for it in found[0]["calls"].values()]
    else:
        choice = client.chat.completions.create(**options).choices[0]
        content, reason = choice.message.content or "", choice.finish_reason
        calls = [(it.function.name, json.loads(it.function.arguments)) for it in choice.message.tool_calls or ()]  # type: ignore[union-attr]
    assert (content.strip(), reason) == ("Let me see.", "tool_calls")
    assert calls == [("weather", {"city": "Oslo", "days": 2}), ("now", {})][: 1 if is_parallel is False else 2]


def test_tools_that_may_not_be_called_are_not_shown(client: OpenAI) -> None:
    assert prompt_of(client, HELLO, tools=TOOLS, tool_choice="none") == prompt_of(client, HELLO)
    assert prompt_of(client, HELLO, tools=TOOLS) > prompt_of(client, HELLO)
    answer = client.chat.completions.create(messages=HELLO, model=MODEL, tools=TOOLS, tool_choice="none", **said(CALLS))
    assert answer.choices[0].message.content == CALLS
    assert answer.choices[0].finish_reason == "stop"


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_apart_from_the_answer(tmp_path: Path, stream: bool) -> None:
    model = write_tiny(tmp_path / "m", chat_template=THINKING)
    options: dict[str, Any] = {"messages": HELLO, "model": MODEL, **said("<think>Let me see.</think>Hello!")}
    with serving(LLM(model, kv_cache_memory=2**21)) as live:
        if stream:
            found, _ = added_up(live.client.chat.completions.create(stream=True, **options))
            assert (found[0]["reasoning"].strip(), found[0]["content"].strip()) == ("Let me see.", "Hello!")
        else:
            message = live.client.chat.completions.create(**options).choices[0].message
            assert (message.content or "").strip() == "Hello!"
            assert message.model_dump()["reasoning_content"].strip() == "Let me see."
            length = prompt_of(live.client, [*HELLO, message.model_dump()])
            assert length == len("user: hello\nassistant: (Let me see.) Hello!\nassistant:")


# ---------------------------------------------------------------- formats


class Place(BaseModel):
    city: str
    is_capital: bool


@pytest.mark.parametrize("stream", [False, True])
def test_answer_keeps_to_a_schema(client: OpenAI, stream: bool) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    options: dict[str, Any] = {"messages": HELLO, "model": MODEL, "response_format": wanted}
    if stream:
        text = added_up(client.chat.completions.create(stream=True, **options))[0][0]["content"]
    else:
        text = client.chat.completions.create(**options).choices[0].message.content or ""
    jsonschema.validate(json.loads(text), WEATHER)


def test_openais_parse_helper_gets_its_class(client: OpenAI) -> None:
    class City(BaseModel):
        is_capital: bool

    answer = client.chat.completions.parse(messages=HELLO, model=MODEL, response_format=City)
    assert isinstance(answer.choices[0].message.parsed, City)


def test_answer_is_a_json_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=HELLO, model=MODEL, response_format={"type": "json_object"}, max_tokens=900, seed=3
    )
    choice = answer.choices[0]
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


# ---------------------------------------------------------------- refusals

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]}]


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages.0", "narrator"),
        ({"messages": IMAGE}, "messages.0.content.0.image_url", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities.1", "text"),
        ({"functions": [{"name": "x"}]}, "functions", "functions is not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"store": True}, "store", "False"),
        ({"service_tier": "flex"}, "service_tier", "default"),
        ({"top_logprobs": 2}, "top_logprobs", "wants logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "it takes 0 to 20"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "wants stream"),
        ({"tool_choice": "auto"}, "tool_choice", "there are none"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'weather'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "same function name"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "say different things",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format", "yaml"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            None,
            "nonsense",
        ),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs", "cannot set 'messages'"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"n": 300}, "n", "limit of 256"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]}
                ]
            },
            "messages",
            "no JSON object",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: OpenAI, options: dict[str, Any], param: str | None, message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "stream": stream, **options})
        body = caught.value.body
        assert isinstance(body, dict)
        assert message in body["message"]
        assert body["param"] == param


def test_what_only_names_the_caller_is_taken(client: OpenAI) -> None:
    harmless: dict[str, Any] = {"user": "u", "metadata": {"a": "b"}, "store": False, "safety_identifier": "s"}
    assert client.chat.completions.create(messages=HELLO, max_tokens=1, **harmless, **GREEDY).choices
