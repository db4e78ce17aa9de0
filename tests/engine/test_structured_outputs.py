"""Answers that must follow a schema, a regex, a grammar or a choice, from a model that knows nothing."""

from __future__ import annotations

import json
import random
import re
import threading
from typing import Any

import jsonschema
import pytest
from engine_fakes import FakeProcessor
from tiny_checkpoint import write_model, write_tokenizer

from infinilm import LLM, SamplingParams, StructuredOutputsParams
from infinilm.engine import grammar
from infinilm.engine.grammar import Grammars
from infinilm_hookspecs import RequestError

WORDS = ["a", "bc", 'say "hi"', "back\\slash", "naïve", "日本", "new\nline", "€ 5", ""]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(write_model(folder, max_position_embeddings=2048))
    with LLM(folder, max_num_seqs=64, max_num_batched_tokens=2048) as llm:
        yield llm


def random_schema(rng: random.Random, depth: int = 3) -> Any:
    """Return a schema whose every answer is of bounded length."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const"] + ["object", "array", "anyOf"] * (depth > 0) * 2
    kind = rng.choice(kinds if depth < 3 else ["object", "array"])
    match kind:
        case "object":
            names = rng.sample([word for word in WORDS if word], rng.randint(0, 3))
            properties = {name: random_schema(rng, depth - 1) for name in names}
            required = [name for name in names if rng.random() < 0.7]
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            fewest = rng.randint(0, 2)
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": fewest, "maxItems": fewest + rng.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "string":
            fewest = rng.randint(0, 4)
            pattern = {"type": "string", "pattern": "^[a-z]{2}-\\d{1,3}$"}
            return rng.choice(
                [{"type": "string", "minLength": fewest, "maxLength": fewest + rng.randint(0, 6)}, pattern]
            )
        case "integer":
            lowest = rng.randint(-1000, 1000)
            return {"type": "integer", "minimum": lowest, "maximum": lowest + rng.randint(0, 3000)}
        case "enum":
            return {"enum": rng.sample([*WORDS, 1, -2.5, None, True, [1, "x"], {"k": 0}], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice([*WORDS, 0, False, None])}
    return {"type": kind}


def test_every_answer_to_a_random_schema_ends_and_is_valid(llm: LLM) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(200)]
    params = [
        SamplingParams(
            max_tokens=1500,
            seed=seed,
            temperature=(0, 1, 3)[seed % 3],
            structured_outputs=StructuredOutputsParams(json=its),
        )
        for seed, its in enumerate(schemas)
    ]
    for schema, result in zip(schemas, llm.generate(["an answer: "] * 200, params, use_tqdm=False), strict=True):
        (completion,) = result.outputs
        assert completion.finish_reason == "stop", (schema, completion.text)
        jsonschema.validate(json.loads(completion.text), schema)


def answer(llm: LLM, structured: StructuredOutputsParams, **options: Any) -> Any:
    params = SamplingParams(**{"max_tokens": 100, "seed": 0, **options}, structured_outputs=structured)
    return llm.generate("x", params, use_tqdm=False)[0].outputs


@pytest.mark.parametrize("seed", range(8))
def test_the_other_kinds(llm: LLM, seed: int) -> None:
    regex = r"(é|[^a]){2}\d{3}(foo|b+c){0,2}"
    kinds = {
        StructuredOutputsParams(regex=regex): lambda text: re.fullmatch(regex, text),
        StructuredOutputsParams(choice=["yes", "no", "yes or no", 'a "b" \\ / €\n']): lambda text: (
            text in ("yes", "no", "yes or no", 'a "b" \\ / €\n')
        ),
        StructuredOutputsParams(grammar='start: sum\nsum: DIGIT ("+" DIGIT)?\nDIGIT: /[0-9]/'): lambda text: (
            re.fullmatch(r"\d(\+\d)?", text)
        ),
    }
    for structured, is_right in kinds.items():
        (completion,) = answer(llm, structured, seed=seed)
        assert completion.finish_reason == "stop"
        assert is_right(completion.text), completion.text


def test_an_answer_that_may_go_on_ends_with_the_end_of_sequence(llm: LLM) -> None:
    (completion,) = answer(llm, StructuredOutputsParams(regex="a+"), logit_bias={257: 100.0}, max_tokens=5)
    assert (completion.text, completion.finish_reason, completion.token_ids[-1]) == ("a", "stop", 257)
    (completion,) = answer(llm, StructuredOutputsParams(regex="a+"), logit_bias={257: -100.0}, max_tokens=5)
    assert (completion.text, completion.finish_reason) == ("aaaaa", "length")
    (completion,) = answer(llm, StructuredOutputsParams(regex="a+"), logit_bias={257: 100.0}, ignore_eos=True)
    assert (completion.text, completion.finish_reason) == ("a", "stop")


def test_with_n_stop_and_logprobs(llm: LLM) -> None:
    outputs = answer(llm, StructuredOutputsParams(regex="[ab]{8}c"), n=4, logprobs=1, stop=["abb"])
    assert len({its.text for its in outputs}) > 1
    for its in outputs:
        assert len(its.logprobs) == len(its.token_ids)
        if its.stop_reason is None:
            assert re.fullmatch("[ab]{8}c", its.text)
            assert "abb" not in its.text
        else:
            assert (its.stop_reason, "abb" in its.text) == ("abb", False)


def test_a_model_that_loves_whitespace_does_not_get_it(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"type": "array", "minItems": 2, "maxItems": 2}}}
    schema["properties"]["b"]["items"] = {"type": "null"}
    white = {llm.processor.value.encode(its)[0]: 100.0 for its in " \n\t"}
    structured = StructuredOutputsParams(json={**schema, "required": ["a", "b"], "additionalProperties": False})
    (completion,) = answer(llm, structured, logit_bias=white)
    assert completion.text == json.dumps({"a": 1, "b": [None, None]})


def test_any_json_object(llm: LLM) -> None:
    (completion,) = answer(llm, StructuredOutputsParams(json_object=True), logit_bias={ord("}") - 33: 100.0})
    assert json.loads(completion.text) == {}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (StructuredOutputsParams(json={"type": "wat"}), r"json='\{\"type\": \"wat\"\}' cannot be compiled: .*wat"),
        (StructuredOutputsParams(json='{"type'), r"cannot be compiled: "),
        (StructuredOutputsParams(json={"not": {}}), r"cannot be compiled: .*Unimplemented keys: \[\"not\"\]"),
        (StructuredOutputsParams(regex="a(("), r"regex='a\(\(' cannot be compiled: .*unclosed group"),
        (StructuredOutputsParams(grammar="start: foo"), r"cannot be compiled: .*unknown name: \"foo\""),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_the_compilers_words(
    llm: LLM, wanted: StructuredOutputsParams, message: str
) -> None:
    for _ in range(2):  # the second time from the cache
        with pytest.raises(RequestError, match=re.compile(message, re.DOTALL)):
            answer(llm, wanted)
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of .*, and has none"),
        ({"json": {}, "regex": "a"}, "and has json and regex"),
        ({"json_object": False}, "has none"),
        ({"json_object": 1}, "json_object=1"),
        ({"json": 3}, "json=3"),
        ({"regex": ""}, "regex=''"),
        ({"choice": []}, r"choice=\[\]"),
        ({"choice": ["a", 1]}, "choice="),
    ],
)
def test_a_malformed_wish_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams(**options)


def test_a_schema_is_compiled_once_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = grammar._grammar_of
    monkeypatch.setattr(grammar, "_grammar_of", lambda wanted: compiled.append(wanted.key[1]) or original(wanted))
    grammars = Grammars(FakeProcessor(), 12)
    schema = {"enum": ["a", "b"]}
    asking = [
        threading.Thread(target=grammars.matcher, args=(StructuredOutputsParams(json=its),))
        for its in (schema, dict(schema), json.dumps(schema)) * 4
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert compiled == [json.dumps(schema)]
    for at in range(grammar._MAX_CACHED_GRAMMARS):
        grammars.matcher(StructuredOutputsParams(regex=f"a{{{at + 1}}}"))
    grammars.matcher(StructuredOutputsParams(json=schema))
    assert len(grammars._compiled) == grammar._MAX_CACHED_GRAMMARS
    assert compiled.count(json.dumps(schema)) == 2


def test_what_goes_wrong_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = StructuredOutputsParams(regex="a")
    for name in ("_grammar_of", "LLTokenizer", "_Vocabulary"):
        grammars = Grammars(FakeProcessor(), 12)
        with monkeypatch.context() as context:
            context.setattr(grammar, name, lambda *given: exec("raise KeyboardInterrupt"))
            with pytest.raises(KeyboardInterrupt):
                grammars.matcher(wanted)
        assert not grammars.matcher(wanted).is_complete


@pytest.mark.parametrize("vocab_size", [12, 32, 33, 64, 70])
def test_masks_have_the_models_size_and_a_model_without_an_end_has_none(vocab_size: int) -> None:
    class Endless(FakeProcessor):
        eos_token_ids: frozenset[int] = frozenset()

    for processor, num_more in ((FakeProcessor(), 1), (Endless(), 0)):
        matcher = Grammars(processor, vocab_size).matcher(StructuredOutputsParams(regex="a+"))
        matcher.accept(1)
        other = matcher.copy()
        other.accept(1)
        for together in ([matcher], [matcher, other, matcher.copy()]):  # by one thread, by several
            allowed, failed = grammar.Masks().allowed_tokens(together, vocab_size)
            assert allowed.shape == (len(together), vocab_size)
            assert (allowed.sum(-1).tolist(), failed) == ([1 + num_more] * len(together), {})
