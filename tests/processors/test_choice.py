"""Who makes the processor: a plugin, by an object, by a class or by the name of another plugin; or another folder."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint

from infinilm import LLM, SamplingParams
from infinilm.cli import main
from infinilm.plugins import ModelSpec
from infinilm.processors import ContentParser, ResponseFormat, ToolCallMarkup, with_parser
from infinilm.processors._huggingface import HuggingFaceProcessor
from infinilm_hookspecs import (
    Checkpoint,
    CheckpointError,
    Config,
    DecoderConfig,
    ParsedText,
    PluginError,
    RequestError,
    hookimpl,
)

GREEDY = SamplingParams(temperature=0, max_tokens=5)
Lineage = Sequence[Config | DecoderConfig]


class Letters:
    """A processor of somebody's own: the letters of the alphabet, in a file of its own format."""

    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, lineage: Lineage, checkpoint: Checkpoint) -> None:
        path = checkpoint.file("letters.txt")
        assert path is not None
        self.letters = path.read_text()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self.letters[token_id % len(self.letters)] for token_id in token_ids)

    def stream(self, *, skip_special_tokens: bool = True) -> Letters:
        return self

    def put(self, token_id: int) -> str:
        return self.decode([token_id])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        return "".join(message["content"] for message in messages)

    def parser(self, *, tools: Sequence[Mapping[str, Any]] | None = None, prompt: str = "") -> ContentParser:
        return ContentParser()

    def token_bytes(self) -> Sequence[bytes | None]:
        return [letter.encode() for letter in self.letters]


class LettersPlugin:
    plugin_name = "letters"

    @hookimpl
    def select_processor(self, lineage: Lineage, checkpoint: Checkpoint) -> Letters | None:
        return Letters(lineage, checkpoint) if checkpoint.file("letters.txt") else None


class Naming:
    """Answers with the name of another plugin."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def select_processor(self, lineage: Lineage, checkpoint: Checkpoint) -> str:
        return self.name


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """A checkpoint of a model type of somebody's own, with two tokenizers."""
    folder = tiny_checkpoint.write_model(tmp_path / "acme", model_type="acme")
    (folder / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    return tiny_checkpoint.write_tokenizer(folder)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    return tiny_checkpoint.write_model(tmp_path / "bare")


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec(model_type="acme", backend_model_type="llama", **fields)


LLAMA = spec()
CHOICES: dict[str, tuple[list[object], str, type]] = {
    "nobody": ([LLAMA], "huggingface", HuggingFaceProcessor),
    "a hookimpl": ([LLAMA, LettersPlugin()], "letters", Letters),
    "a hookimpl with a name": ([LLAMA, LettersPlugin(), Naming("huggingface")], "huggingface", HuggingFaceProcessor),
    "a spec with a name": ([LettersPlugin(), spec(processor="huggingface")], "huggingface", HuggingFaceProcessor),
    "a spec with the other": ([LettersPlugin(), spec(processor="letters")], "letters", Letters),
    "a spec with a class": ([spec(processor_cls=Letters)], "model_spec:acme", Letters),
    "a spec with a function": (
        [LettersPlugin(), spec(processor_cls=HuggingFaceProcessor.open)],
        "model_spec:acme",
        HuggingFaceProcessor,
    ),
}


@pytest.mark.parametrize(("plugins", "owner", "kind"), CHOICES.values(), ids=CHOICES)
def test_processor_is_the_one_chosen_and_makes_the_tokens(
    acme: Path, plugins: list[object], owner: str, kind: type
) -> None:
    with LLM(acme, plugins=plugins) as llm:
        assert llm.processor is not None
        assert (llm.processor.plugin, type(llm.processor.value)) == (owner, kind)
        (output,) = llm.generate("cab", GREEDY, use_tqdm=False)
        assert output.prompt_token_ids == ([2, 0, 1] if kind is Letters else [66, 64, 65])
        assert output.outputs[0].text == llm.processor.value.decode(output.outputs[0].token_ids)


def test_chat_goes_through_the_chosen_processor(acme: Path) -> None:
    with LLM(acme, plugins=[spec(processor_cls=Letters)]) as llm:
        (output,) = llm.chat([{"role": "user", "content": "abc"}], GREEDY, use_tqdm=False)
        assert output.prompt_token_ids == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hugingface", r"there is no plugin 'hugingface', did you mean 'huggingface'\?"),
        ("sentencepiece", r"names the processor of plugin 'sentencepiece', and that one has none here"),
    ],
)
@pytest.mark.parametrize("as_spec", [True, False])
def test_name_that_leads_nowhere_is_an_error(acme: Path, name: str, message: str, as_spec: bool) -> None:
    plugins = [spec(processor=name)] if as_spec else [LLAMA, Naming(name)]
    with pytest.raises(PluginError, match=message):
        LLM(acme, plugins=plugins)


# ---------------------------------------------------------------- whose parser

FORMAT = ResponseFormat(tool_calls=ToolCallMarkup(begin="<call>", end="</call>"))
ANSWER = '<call>{"name": "add", "arguments": {}}</call>'
PARSED = ParsedText(tool_calls=({"index": 0, "name": "add", "arguments": "{}"},))
TOOLS = [{"type": "function", "function": {"name": "add"}}]


class Family:
    """A plugin for a family that writes calls its own way, whatever processor its checkpoints have."""

    @hookimpl(wrapper=True)
    def select_processor(self, lineage: Lineage, checkpoint: Checkpoint) -> Generator[None, Any, Any]:
        processor = yield
        return processor if processor is None else with_parser(processor, FORMAT)


PARSERS: dict[str, list[object]] = {
    "a wrapper around what is in the tree": [LLAMA, Family()],
    "a wrapper around another plugin's": [LLAMA, LettersPlugin(), Family()],
    "a spec": [spec(processor_cls=lambda *args: with_parser(Letters(*args), FORMAT))],
}


@pytest.mark.parametrize("plugins", PARSERS.values(), ids=PARSERS)
def test_parser_is_the_plugins(acme: Path, plugins: list[object]) -> None:
    with LLM(acme, plugins=plugins) as llm:
        assert llm.processor is not None
        parser = llm.processor.value.parser(tools=TOOLS)
        assert parser.put(ANSWER) + parser.finish() == PARSED
        (output,) = llm.generate("cab", GREEDY, use_tqdm=False)
        assert output.outputs[0].text == llm.processor.value.decode(output.outputs[0].token_ids)


# ---------------------------------------------------------------- nobody


def assert_is_one_line(err: BaseException, *parts: str) -> None:
    assert "\n" not in str(err)
    for part in parts:
        assert part in str(err)


def test_model_without_a_processor_takes_token_ids_and_says_so(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(bare) as llm:
        assert llm.processor is None
        (output,) = llm.generate({"prompt_token_ids": [1, 2]}, GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 5
        with pytest.raises(RequestError) as text:
            llm.generate("hello", GREEDY)
        with pytest.raises(RequestError) as chat:
            llm.chat([{"role": "user", "content": "hello"}])
    for err in (text.value, chat.value):
        assert_is_one_line(err, "needs a tokenizer", "'prompt_token_ids': [...]", "--tokenizer PATH")
    assert main(["generate", str(bare), "--prompt", "hello"]) == 2
    assert capsys.readouterr().err == f"infinilm: error: {text.value}\n"


def test_chat_without_a_template_says_what_to_do(bare: Path) -> None:
    with LLM(tiny_checkpoint.write_tokenizer(bare)) as llm:
        with pytest.raises(RequestError) as caught:
            llm.chat([{"role": "user", "content": "hello"}])
        assert_is_one_line(caught.value, "no chat template", "use generate()", "put a chat_template.jinja beside")
        (bare / "chat_template.jinja").write_text(tiny_checkpoint.TEMPLATE)
    with LLM(bare) as llm:
        (output,) = llm.chat([{"role": "user", "content": "hello"}], GREEDY, use_tqdm=False)
    assert output.prompt == "user: hello\n"


# ---------------------------------------------------------------- another folder


def test_tokenizer_of_another_folder(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_checkpoint.write_tokenizer(tmp_path / "other", chat_template=tiny_checkpoint.TEMPLATE)
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    (bare / "generation_config.json").write_text('{"eos_token_id": 7}')
    (bare / "chat_template.jinja").write_text("not this one")
    with LLM(bare, tokenizer=other) as llm:
        assert llm.processor is not None
        assert llm.processor.value.eos_token_ids == {7}  # the model's: a tokenizer has no say in it
        (output,) = llm.chat([{"role": "user", "content": "a"}], GREEDY, use_tqdm=False)
        assert output.prompt == "user: a\n"
    command = ["--prompt", "cab", "--max-tokens", "2", "--temperature", "0", "--json", "--tokenizer", str(other)]
    assert main(["generate", str(bare), *command]) == 0
    assert json.loads(capsys.readouterr().out)[0]["prompt_token_ids"] == [66, 64, 65]
    assert main(["inspect", str(bare), "--json", "--tokenizer", str(other)]) == 0
    assert json.loads(capsys.readouterr().out)["processor"]["plugin"] == "huggingface"


def test_tokenizer_of_another_folder_is_what_plugins_see(acme: Path, bare: Path) -> None:
    with LLM(bare, tokenizer=acme, plugins=[LettersPlugin()]) as llm:
        assert llm.processor is not None
        assert llm.processor.plugin == "letters"


class Climbing:
    @hookimpl
    def select_processor(self, lineage: Lineage, checkpoint: Checkpoint) -> None:
        checkpoint.file("../config.json")


@pytest.mark.parametrize(
    ("tokenizer", "plugins", "message"),
    [
        ("model.safetensors", [], "model.safetensors' is no folder; give the one its files lie in"),
        ("nowhere", [], "nowhere' does not exist"),
        (".", [], "no plugin makes a processor of what lies in '.*'; a tokenizer.json"),
        (".", [Climbing()], r"the file name '../config.json' leads out of the folder"),
        ("x://y", [], "the tokenizer 'x://y' is no folder"),
    ],
)
def test_tokenizer_that_is_none_is_an_error(bare: Path, tokenizer: str, plugins: list[object], message: str) -> None:
    given = tokenizer if "://" in tokenizer else bare / tokenizer
    with pytest.raises(CheckpointError, match=message):
        LLM(bare, tokenizer=given, plugins=plugins)
