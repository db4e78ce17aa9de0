"""`LLM` around its engine: chats, defaults, progress, and what is left after an error."""

from __future__ import annotations

import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import TEMPLATE, write_model, write_tokenizer

from infinilm import LLM, SamplingParams
from infinilm.generation_config import default_sampling_params
from infinilm_hookspecs import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = TEMPLATE + "{{ tools | tojson if tools }}{{ mood }}{{ 'A:' if add_generation_prompt }}"
    folder = tmp_path_factory.mktemp("model")
    return write_tokenizer(write_model(folder, max_position_embeddings=256), chat_template=template)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(folder) as llm:
        yield llm


def test_a_chat_takes_vllms_names(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert llm.chat(CHAT, GREEDY)[0].prompt == "user: hi\nA:"
    options = {"tools": [tool], "add_generation_prompt": False, "chat_template_kwargs": {"mood": "calm"}}
    assert llm.chat([CHAT, CHAT], GREEDY, **options)[1].prompt == f"user: hi\n{json.dumps(tool)}calm".replace(
        json.dumps(tool), json.dumps([tool])
    )
    with pytest.raises(TypeError, match="mood"):
        llm.chat(CHAT, GREEDY, mood="calm")


def test_prefix_caching_is_on_unless_it_is_switched_off(folder: Path) -> None:
    for is_on in (True, False):
        with LLM(folder, enable_prefix_caching=is_on) as llm:
            for _ in range(2):
                (result,) = llm.generate("a" * 40, GREEDY)
            assert (result.metrics.num_cached_tokens, llm.weight_version) == (32 * is_on, "0")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, SamplingParams()),
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(temperature=0.0)),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1),
        ),
        ({"max_new_tokens": 99, "min_p": None}, SamplingParams(max_tokens=99)),
        ({"no_repeat_ngram_size": 3}, SamplingParams(extra_args={"no_repeat_ngram_size": 3})),
        ({"no_repeat_ngram_size": 0}, SamplingParams()),
    ],
)
def test_defaults_are_the_engines_unless_the_checkpoint_says_otherwise(
    stored: dict[str, Any], expected: SamplingParams
) -> None:
    assert default_sampling_params(stored) == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr("infinilm.progress._SECONDS_BETWEEN_RATES", 0.0)
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    llm.generate(["a", "b"], GREEDY)
    assert ("generating" in stream.getvalue()) == ("tokens/s" in stream.getvalue()) == is_terminal
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert stream.getvalue().count("2/2") <= 1


def test_a_backend_that_fails_is_the_calls_error_and_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: Any) -> Any:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as context:
        context.setattr(llm.backend, "forward", fail)
        with pytest.raises(RuntimeError, match="on fire"):
            llm.generate(["a"] * 3, GREEDY)
    llm.engine._pool.check([])
    assert not llm.engine.has_unfinished()
    assert len(llm.generate("a", GREEDY)) == 1


def test_two_calls_at_once_are_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    started, going_on = threading.Event(), threading.Event()
    forward = llm.backend.forward

    def wait(batch: Any) -> Any:
        started.set()
        assert going_on.wait(30)
        return forward(batch)

    monkeypatch.setattr(llm.backend, "forward", wait)
    thread = threading.Thread(target=llm.generate, args=("a", GREEDY))
    thread.start()
    assert started.wait(30)
    with pytest.raises(RequestError, match=r"this LLM is in use by a call of generate\(\)"):
        llm.generate("a", GREEDY)
    going_on.set()
    thread.join()
    assert not llm.engine.has_unfinished()
