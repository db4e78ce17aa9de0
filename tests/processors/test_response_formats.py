"""From a chat template to what a server sends: the format it speaks of, the tokens of an answer, and their parts."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import sentencepiece
from tokenizer_folders import CORPUS, FolderCheckpoint, byte_level, write_folder
from tokenizers import AddedToken

from infinilm.processors import ContentParser, ParserFactory, ResponseFormat, ToolCallMarkup, with_parser
from infinilm.processors import huggingface as huggingface_plugin
from infinilm.processors import sentencepiece as sentencepiece_plugin
from infinilm.processors._response_formats import recognise_format
from infinilm_hookspecs import ParsedText, PluginError, Processor, RequestError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ARGUMENTS = [{"a": [1, "é <b>"], "c": None}, {"text": "</tool_call>{"}]
SPECIAL = ["<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|eot_id|>"]
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


@pytest.fixture
def processor_with(tmp_path: Path) -> Any:
    """A processor with the markers of every family in its vocabulary, special as in the family's own."""

    def processor_with(template: str) -> Processor:
        tokenizer = byte_level()
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in NOT_SPECIAL])
        processor = huggingface_plugin.select_processor([], write_folder(tmp_path, tokenizer, chat_template=template))
        assert processor is not None
        return processor

    return processor_with


def tool_call(number: int) -> dict[str, Any]:
    function = {"name": "add", "arguments": ARGUMENTS[number]}
    return {"id": f"abcdef12{number}", "type": "function", "function": function}


def read(processor: Processor, answer: str, *, tools: Any = TOOLS, prompt: str = "") -> ParsedText:
    """Encode an answer, and read it token by token, as a server does."""
    parser = processor.parser(tools=tools, prompt=prompt)
    stream = processor.stream(skip_special_tokens=not parser.reads_special_tokens)
    total = ParsedText()
    for token_id in processor.encode(answer, add_special_tokens=False):
        total += parser.put(stream.put(token_id))
    return total + parser.finish()


WRITTEN = {
    "tagged": ("<|im_end|>\n", False, 2),
    "thinking": ("<|im_end|>\n", False, 2),
    "listed": ("</s>", True, 2),
    "named": ("</s>", True, 2),
    "bare": ("<|eot_id|>", True, 1),
}


@pytest.mark.parametrize(("name", "end", "is_special", "num_calls"), [(k, *v) for k, v in WRITTEN.items()])
@pytest.mark.parametrize("content", ["", "I add."])
def test_calls_as_a_familys_template_writes_them_are_read_back(
    processor_with: Any, name: str, end: str, is_special: bool, num_calls: int, content: str
) -> None:
    """The template that shows a model its own past calls is the oracle of what a call looks like."""
    if name in ("bare", "listed"):
        content = ""  # these families' templates have no text beside calls
    processor = processor_with(chat_templates.TEMPLATES[name])
    question = [{"role": "user", "content": "3 + 4"}]
    answer = {
        "role": "assistant",
        "content": content,
        "tool_calls": [tool_call(number) for number in range(num_calls)],
        **({"reasoning_content": "Let me <b> think"} if name == "thinking" else {}),
    }
    prompt = processor.render_chat(question, tools=TOOLS)
    whole = processor.render_chat([*question, answer], tools=TOOLS, add_generation_prompt=False)
    assert whole.startswith(prompt)
    assert whole.endswith(end)
    text = whole[len(prompt) : -len(end)]
    assert processor.parser(tools=TOOLS).reads_special_tokens is is_special
    parsed = read(processor, text, prompt=prompt)
    assert parsed.content == content
    assert parsed.reasoning == answer.get("reasoning_content", "")
    assert [json.loads(part["arguments"]) for part in parsed.tool_calls] == ARGUMENTS[:num_calls]
    assert [part["name"] for part in parsed.tool_calls] == ["add"] * num_calls


@pytest.mark.parametrize("name", ["tagged", "thinking"])
@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_a_call_is_content(processor_with: Any, name: str, tools: Any) -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\n'
    assert read(processor_with(chat_templates.TEMPLATES[name]), text, tools=tools) == ParsedText(text)


def test_without_tools_special_tokens_are_skipped(processor_with: Any) -> None:
    processor = processor_with(chat_templates.TEMPLATES["named"])
    assert not processor.parser().reads_special_tokens
    assert read(processor, 'a[TOOL_CALLS]add[ARGS]{"x": 1}', tools=None) == ParsedText('aadd{"x": 1}')


def test_tools_that_do_not_exist_are_reported_where_a_marker_says_that_it_is_a_call(processor_with: Any) -> None:
    processor = processor_with(chat_templates.TEMPLATES["tagged"])
    parsed = read(processor, '<tool_call>{"name": "sing", "arguments": {}}</tool_call>')
    assert parsed.tool_calls == ({"index": 0, "name": "sing", "arguments": "{}"},)


def test_a_prompt_may_open_the_reasoning_or_close_it(processor_with: Any) -> None:
    question = [{"role": "user", "content": "<think>"}]
    processor = processor_with(chat_templates.TEMPLATES["opened"])
    prompt = processor.render_chat(question)
    assert read(processor, "a\n</think>\n\nb", prompt=prompt) == ParsedText("b", "a")
    prompt = processor.render_chat(question, add_generation_prompt=False) + "<|Assistant|>"
    assert read(processor, "a</think>b", prompt=prompt) == ParsedText("a</think>b")
    processor = processor_with(chat_templates.TEMPLATES["thinking"])
    prompt = processor.render_chat(question, enable_thinking=False)
    assert prompt.endswith("</think>\n\n")
    assert read(processor, "a", prompt=prompt) == ParsedText("a")
    assert read(processor, "<think>\na\n</think>\n\nb", prompt=processor.render_chat(question)) == ParsedText("b", "a")


def test_templates_that_speak_of_no_format_have_none() -> None:
    for name in ("chatml", "alternating", "documents", "trained", "thought"):
        assert recognise_format([chat_templates.TEMPLATES[name]]) == ResponseFormat()
    assert recognise_format([]) == ResponseFormat()


def test_a_template_may_write_its_format_in_a_string_of_its_own() -> None:
    taught = '{{- "in tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <object>}\\n</tool_call>" }}'
    assert recognise_format([taught]) == recognise_format([chat_templates.TEMPLATES["tagged"]])
    assert recognise_format(["{{ '<tool_call><function=' }}"]) == ResponseFormat()


def test_any_of_several_templates_may_speak_of_the_format() -> None:
    both = [chat_templates.TEMPLATES["chatml"], chat_templates.TEMPLATES["tagged"]]
    assert recognise_format(both) == recognise_format(both[1:]) != ResponseFormat()


@pytest.mark.parametrize("tools", [[{}], [{"function": {}}], [{"function": None}], [{"name": 1}]])
def test_tools_without_a_name_are_refused(processor_with: Any, tools: Any) -> None:
    processor = processor_with(chat_templates.TEMPLATES["tagged"])
    with pytest.raises(RequestError, match=r"tools\[0\] has no function with a name"):
        processor.parser(tools=tools)


def test_a_sentencepiece_model_has_its_markers_too(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=500,
        hard_vocab_limit=False,
        minloglevel=2,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        control_symbols=["[TOOL_CALLS]", "[INST]"],
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "chat_template.jinja").write_text(chat_templates.TEMPLATES["listed"])
    processor = sentencepiece_plugin.select_processor([], FolderCheckpoint(tmp_path))
    assert processor is not None
    parser = processor.parser(tools=TOOLS)
    marker = next(i for i in range(500) if processor.decode([i], skip_special_tokens=False) == "[TOOL_CALLS]")
    ids = [marker, *processor.encode('[{"name": "add", "arguments": {"é": 1}}]', add_special_tokens=False)]
    assert parser.reads_special_tokens
    assert (
        with_parser(processor, recognise_format([chat_templates.TEMPLATES["listed"]]))
        .parser(tools=TOOLS)
        .reads_special_tokens
    )
    stream = processor.stream(skip_special_tokens=False)
    parsed = sum((parser.put(stream.put(token_id)) for token_id in ids), ParsedText()) + parser.finish()
    assert parsed.tool_calls == ({"index": 0, "name": "add", "arguments": '{"é": 1}'},)


# ---------------------------------------------------------------- a parser of somebody's own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToolCallMarkup(begin=""), "give begin, the marker before a call"),
        (lambda: ToolCallMarkup(begin="a", id_begin="b"), "name_end, which is missing"),
        (lambda: ResponseFormat(reasoning=("", "b")), r"reasoning=\('', 'b'\) is not two markers"),
    ],
)
def test_markup_that_could_not_be_found_is_refused(make: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make()


class Shouting:
    """Finds tool calls where nobody else does."""

    reads_special_tokens = False

    def __init__(self, tools: Sequence[Any] | None, prompt: str) -> None:
        self.prompt = prompt

    def put(self, text: str) -> ParsedText:
        return ParsedText(text.upper())

    def finish(self) -> ParsedText:
        return ParsedText(f" (to {self.prompt})")


OWN: dict[str, tuple[ResponseFormat | ParserFactory, str, ParsedText]] = {
    "a format": (
        ResponseFormat(
            reasoning=("[", "]"), tool_calls=ToolCallMarkup(begin="call:", name_end=" with ", separator=" and ")
        ),
        '[hm] so call: add with {"a": 1}!',
        ParsedText("so!", "hm", ({"index": 0, "name": "add", "arguments": '{"a": 1}'},)),
    ),
    "a function": (Shouting, "hello", ParsedText("HELLO (to the prompt)")),
    "nothing": (ResponseFormat(), "<think>", ParsedText("<think>")),
}


@pytest.mark.parametrize(("parser", "answer", "expected"), OWN.values(), ids=OWN)
def test_a_processor_takes_another_parser(processor_with: Any, parser: Any, answer: str, expected: ParsedText) -> None:
    processor = with_parser(processor_with(chat_templates.TEMPLATES["thinking"]), parser)
    assert isinstance(processor, Processor)
    assert read(processor, answer, prompt="the prompt") == expected


def test_a_processor_with_another_parser_is_the_same_in_all_else(processor_with: Any) -> None:
    original = processor_with(chat_templates.TEMPLATES["thinking"])
    processor = with_parser(original, lambda tools, prompt: ContentParser())
    ids = original.encode("<s>hé<|im_end|>")
    question = [{"role": "user", "content": "x"}]
    assert processor.eos_token_ids == original.eos_token_ids
    assert processor.token_bytes() == original.token_bytes()
    for skip in (True, False):
        assert processor.encode("<s>hé<|im_end|>", add_special_tokens=skip) == original.encode(
            "<s>hé<|im_end|>", add_special_tokens=skip
        )
        assert processor.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)
        stream = processor.stream(skip_special_tokens=skip)
        assert "".join(map(stream.put, ids)) == original.decode(ids, skip_special_tokens=skip)
        assert processor.render_chat(
            question, tools=TOOLS, add_generation_prompt=skip, enable_thinking=False
        ) == original.render_chat(question, tools=TOOLS, add_generation_prompt=skip, enable_thinking=False)
