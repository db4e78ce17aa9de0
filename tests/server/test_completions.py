"""`/v1/completions`, through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from live_server import DEMO, DEMO_PLUGIN, MODEL, LiveServer
from openai import OpenAI

from infinilm import LLM, SamplingParams

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def expected() -> Any:
    """What the engine itself says, without a server."""
    prompts = ["seven plus eight is", "three minus nine is"]
    with LLM(DEMO / "model", plugins=DEMO_PLUGIN) as llm:
        return llm.generate(prompts, SamplingParams(temperature=0, logprobs=3, prompt_logprobs=3))


def test_prompt_is_continued(calculator: OpenAI) -> None:
    answer = calculator.completions.create(prompt="seven plus eight is", **GREEDY)
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint == "weights-0"
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, " fifteen", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 2, 6)


def test_several_prompts_and_answers_are_numbered_prompt_by_prompt(calculator: OpenAI) -> None:
    prompts = ["seven plus eight is", "three minus nine is"]
    answer = calculator.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [(it.index, it.text) for it in answer.choices] == [
        (0, " fifteen"),
        (1, " fifteen"),
        (2, " minus six"),
        (3, " minus six"),
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 8


def test_token_ids_are_prompts_too(calculator: OpenAI, expected: Any) -> None:
    ids = [result.prompt_token_ids for result in expected]
    one = calculator.completions.create(prompt=ids[0], **GREEDY)
    both = calculator.completions.create(prompt=ids, **GREEDY)
    assert one.choices[0].text == " fifteen"
    assert [choice.text for choice in both.choices] == [" fifteen", " minus six"]


def test_stream_adds_up_to_the_whole(calculator: OpenAI) -> None:
    prompts = ["seven plus eight is", "ninety-nine plus ninety-nine is"]
    whole = calculator.completions.create(prompt=prompts, **GREEDY)
    texts, reasons = ["", ""], [None, None]
    chunks = list(
        calculator.completions.create(prompt=prompts, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["stop", "stop"]
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_options_has_no_usage(calculator: OpenAI) -> None:
    for chunk in calculator.completions.create(prompt="one plus one is", stream=True, **GREEDY):
        assert "usage" not in chunk.model_fields_set


def test_logprobs_are_the_engines(calculator: OpenAI, expected: Any) -> None:
    answer = calculator.completions.create(prompt="seven plus eight is", logprobs=3, **GREEDY)
    found, theirs = answer.choices[0].logprobs, expected[0].outputs[0]
    assert found is not None
    assert found.tokens == [" fifteen", "<|end|>"]
    assert found.text_offset == [0, 8]
    assert found.token_logprobs == pytest.approx(
        [position[token] for position, token in zip(_plain(theirs.logprobs), theirs.token_ids, strict=True)]
    )
    assert found.top_logprobs is not None
    assert [len(top) for top in found.top_logprobs] == [3, 3]
    assert max(found.top_logprobs[0], key=found.top_logprobs[0].__getitem__) == " fifteen"


def _plain(positions: Any) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in position.items()} for position in positions]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_and_its_logprobs(calculator: OpenAI, expected: Any, stream: bool) -> None:
    """`max_tokens=0` scores a prompt: that is how evaluation harnesses compare continuations."""
    options = {"prompt": "seven plus eight is fifteen", "echo": True, "logprobs": 1, "max_tokens": 0, **GREEDY}
    answers = list(calculator.completions.create(stream=True, **options)) if stream else []
    answer = answers[0] if stream else calculator.completions.create(**options)
    (choice,) = answer.choices
    assert choice.text == "seven plus eight is fifteen"
    assert choice.finish_reason == "length"
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.tokens == ["seven", " plus", " eight", " is", " fifteen"]
    assert found.text_offset == [0, 5, 10, 16, 19]
    assert found.token_logprobs[0] is None
    theirs = expected[0].prompt_logprobs
    ids = expected[0].prompt_token_ids
    assert found.token_logprobs[1:4] == pytest.approx([theirs[at][ids[at]].logprob for at in (1, 2, 3)], abs=1e-3)
    if not stream:
        assert answer.usage.completion_tokens == 0


def test_echo_before_an_answer(calculator: OpenAI) -> None:
    answer = calculator.completions.create(prompt="seven plus eight is", echo=True, logprobs=0, **GREEDY)
    choice = answer.choices[0]
    assert choice.text == "seven plus eight is fifteen"
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [0, 5, 10, 16, 19, 27]
    assert choice.logprobs.top_logprobs is None


def test_options_reach_the_engine(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 12, "seed": 7}
    first, again = (client.completions.create(**options).choices[0].text for _ in range(2))
    assert first == again
    assert client.completions.create(**{**options, "seed": 8}).choices[0].text != first
    forced = client.completions.create(**{**options, "logit_bias": {"65": 100}}, extra_body={"ignore_eos": True})
    token = forced.choices[0].text[0]
    assert forced.choices[0].text == token * 12
    stopped = client.completions.create(**options, logit_bias={"65": 100}, stop=[token * 3])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == 3


def test_vllms_options_are_fields(client: OpenAI) -> None:
    body = {
        "top_k": 1,
        "min_tokens": 2,
        "ignore_eos": True,
        "repetition_penalty": 1.1,
        "min_p": 0.1,
        "bad_words": ["q"],
    }
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=4, extra_body=body)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    answer = client.completions.create(
        model=MODEL, prompt="x", extra_body={"structured_outputs": {"choice": ["left", "right"]}}
    )
    assert answer.choices[0].text in ("left", "right")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"max_tokens": 0}, "max_tokens", "generates nothing"),
        ({"logprobs": 21}, "logprobs", "it takes 0 to 20"),
        ({"n": 0}, "n", "n=0"),
        ({"n": 257}, "n", "limit of 256"),
        ({"n": 2, "extra_body": {"best_of": 4}}, "best_of", "best_of"),
        ({"suffix": "x"}, "suffix", "suffix"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, None, "empty"),
        ({"prompt": [10**6]}, None, "not in the vocabulary"),
        ({"prompt": [-1]}, None, "not in the vocabulary"),
        ({"prompt": "x" * 1024}, None, "1024 tokens, and this server's limit is 1023"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "by token id"),
        ({"extra_body": {"temprature": 1}}, "temprature", "temprature is not supported by this server"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, None, "exactly one"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, None, "regex"),
        ({"extra_body": {"temperature": "0.5"}}, "temperature", "valid number"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: OpenAI, server: LiveServer, options: dict[str, Any], param: str | None, message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": MODEL, "prompt": "x", "stream": stream, **options})
        body = caught.value.body
        assert isinstance(body, dict)
        assert message in body["message"]
        assert (body["param"], body["type"]) == (param, "invalid_request_error")
    server.wait_until_idle()


def test_unknown_model_is_named_with_the_one_there_is(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here; this server has 'tiny'") as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"


def test_events_are_json_lines_of_openais_form(demo: LiveServer) -> None:
    with demo.client.completions.with_streaming_response.create(prompt="one plus one is", stream=True, **GREEDY) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        events = [line for line in raw.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"
