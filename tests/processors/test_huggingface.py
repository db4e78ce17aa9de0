import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import CORPUS, KINDS, FolderCheckpoint, byte_level, sentencepiece, words, write_folder
from tokenizers import AddedToken
from transformers import AutoTokenizer

from infinilm.processors.huggingface import select_processor
from infinilm_hookspecs import CheckpointError, ParsedText, Processor, RequestError

TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two leading spaces",
    "zażółć gęślą jaźń",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\x00\x7f\xa0\ufeff",
    "<s>x</s>",
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """One folder for both sides: training a tokenizer twice gives two tokenizers."""
    return cache(lambda kind: write_folder(tmp_path_factory.mktemp(kind), KINDS[kind]()))


@pytest.fixture(scope="module")
def processor_of(folder_of):
    return cache(lambda kind: select_processor([], folder_of(kind)))


@pytest.fixture(scope="module")
def oracle_of(folder_of):
    return cache(lambda kind: AutoTokenizer.from_pretrained(folder_of(kind).path))


def vocab_size(processor: Processor) -> int:
    return len(processor.token_bytes())


def stream_text(processor: Processor, ids: list[int]) -> str:
    stream = processor.stream()
    return "".join(stream.put(token_id) for token_id in ids)


def test_takes_folders_with_a_tokenizer_and_no_others(tmp_path):
    assert select_processor([], FolderCheckpoint(tmp_path)) is None
    assert isinstance(select_processor([], write_folder(tmp_path, words())), Processor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_and_decodes_as_transformers_does(processor_of, oracle_of, kind, text, add_special_tokens):
    processor, oracle = processor_of(kind), oracle_of(kind)
    ids = processor.encode(text, add_special_tokens=add_special_tokens)
    assert ids == oracle.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert processor.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_decodes_random_tokens_as_transformers_does(processor_of, oracle_of, kind, data):
    processor, oracle = processor_of(kind), oracle_of(kind)
    ids = data.draw(st.lists(st.integers(0, vocab_size(processor) - 1), max_size=12))
    expected = oracle.decode(ids, skip_special_tokens=True)
    # The one difference: of a run of byte tokens that is not UTF-8, what is valid stays.
    if kind != "sentencepiece" or "\ufffd" not in expected:
        assert processor.decode(ids) == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_level_in_a_sequence"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_stream_of_random_tokens_is_their_text(processor_of, kind, data):
    processor = processor_of(kind)
    ids = data.draw(st.lists(st.integers(0, vocab_size(processor) - 1), max_size=40))
    streamed, text = stream_text(processor, ids), processor.decode(ids)
    assert text.startswith(streamed)
    # What is missing is half a character: at most three bytes.
    assert text[len(streamed) :] in ("", "\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "byte_level_in_a_sequence"])
@given(text=st.text(max_size=30))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_stream_of_a_text_is_the_text_and_never_half_a_character(processor_of, kind, text):
    processor = processor_of(kind)
    ids = processor.encode(text, add_special_tokens=False)
    stream = processor.stream()
    pieces = [stream.put(token_id) for token_id in ids]
    assert "".join(pieces) == processor.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_of_several_tokens_comes_whole(processor_of):
    processor = processor_of("sentencepiece")
    ids = processor.encode("a👧b", add_special_tokens=False)
    stream = processor.stream()
    pieces = [stream.put(token_id) for token_id in ids]
    assert len(ids) >= 6
    assert [piece for piece in pieces if piece][-2:] == ["👧", "b"]


def test_bytes_that_are_no_utf_8_do_not_change_what_was_streamed(processor_of):
    processor = processor_of("sentencepiece")
    euro, broken = [3 + byte for byte in "€".encode()], 3 + 0xFF
    assert processor.decode([*euro, broken]) == stream_text(processor, [*euro, broken]) == "€\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_costs_the_same_however_long_it_is(processor_of, kind):
    processor = processor_of(kind)
    decoded = []
    original = processor.decode
    stream = processor.stream()
    if hasattr(stream, "_decode"):
        stream._decode = lambda ids: decoded.append(len(ids)) or original(ids)
    for token_id in [*processor.encode(CORPUS[0]), *[0] * 50] * 20:
        stream.put(token_id)
    assert max(decoded, default=0) <= 16


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_token_bytes_add_up_to_the_text(processor_of, kind):
    processor = processor_of(kind)
    table = processor.token_bytes()
    for text in TEXTS[:10]:
        ids = processor.encode(text, add_special_tokens=False)
        joined = b"".join(table[token_id] for token_id in ids).decode()
        assert joined in (text, " " + text)


def test_token_bytes_of_special_tokens_are_none(processor_of):
    assert processor_of("byte_level").token_bytes()[0] is None
    assert processor_of("sentencepiece").token_bytes()[3 + 0x0A] == b"\n"
    assert processor_of("words").token_bytes()[1] == b"seven"


def test_added_tokens_that_are_not_special_are_text(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    processor = select_processor([], write_folder(tmp_path, tokenizer))
    ids = processor.encode("a<tool call>b", add_special_tokens=False)
    assert len(ids) == 3
    assert processor.decode(ids) == stream_text(processor, ids) == "a<tool call>b"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    processor = select_processor([], write_folder(tmp_path, tokenizer))
    assert processor.decode(processor.encode(CORPUS[0])) == CORPUS[0]
    assert len(processor.encode("a", add_special_tokens=False)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_without_text_do_not_cost_the_stream_its_context(kind, processor_of):
    processor = processor_of(kind)
    ids = processor.encode("seven plus", add_special_tokens=False)
    ids = [ids[0], *[10**6] * 50, *ids[1:], *[10**6] * 50, *ids]
    assert stream_text(processor, ids) == processor.decode(ids)


def test_ids_without_a_token_have_no_text(processor_of):
    processor = processor_of("byte_level")
    assert processor.decode([10**6, *processor.encode("hi")]) == "hi"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_level_in_a_sequence"])
@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_stream_that_does_not_skip_special_tokens_has_them(processor_of, kind, data):
    processor = processor_of(kind)
    ids = data.draw(st.lists(st.integers(0, vocab_size(processor) - 1), max_size=20))
    stream = processor.stream(skip_special_tokens=False)
    streamed, text = "".join(map(stream.put, ids)), processor.decode(ids, skip_special_tokens=False)
    assert text.startswith(streamed)
    assert not text[len(streamed) :].strip("\ufffd")
    assert "<s>" in streamed or not any(processor.decode([i], skip_special_tokens=False) == "<s>" for i in ids)


def test_without_a_chat_template_everything_is_content(processor_of):
    parser = processor_of("words").parser(tools=[{"name": "f"}])
    assert parser.put("<think>x") == ParsedText(content="<think>x")
    assert not parser.reads_special_tokens


def test_text_with_lone_surrogates_is_refused(processor_of):
    with pytest.raises(RequestError, match="not text in Unicode"):
        processor_of("byte_level").encode("a\ud800")


@pytest.mark.parametrize(
    ("generation_config", "lineage", "expected"),
    [
        ({"eos_token_id": [7, 8]}, [{"eos_token_id": 5}], {7, 8}),
        ({"eos_token_id": 7}, [{"eos_token_id": 5}], {7}),
        ({}, [{"model_type": "x"}, {"eos_token_id": 5}, {"eos_token_id": 6}], {5}),
        (None, [{"eos_token_id": None}, {"eos_token_id": (5, 6)}], {5, 6}),
        (None, [{}, object()], {2}),
    ],
)
def test_end_of_sequence_tokens(tmp_path, generation_config, lineage, expected):
    checkpoint = write_folder(tmp_path, sentencepiece())
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert select_processor(lineage, checkpoint).eos_token_ids == expected


@pytest.mark.parametrize("value", ["</s>", [1, "2"], [[1]], 1.5, True])
def test_an_end_of_sequence_that_is_no_token_id_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="eos_token_id of the model's config is "):
        select_processor([{"eos_token_id": value}], write_folder(tmp_path, words()))


def test_no_end_of_sequence_token_at_all(tmp_path):
    assert select_processor([], write_folder(tmp_path, words(), eos_token=None)).eos_token_ids == frozenset()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    checkpoint = write_folder(tmp_path, words())
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=name):
        select_processor([], checkpoint)


def test_importing_the_plugin_imports_no_tokenizer_library():
    code = (
        "import sys, infinilm.processors.huggingface; "
        "print([name for name in ('tokenizers', 'jinja2', 'torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_processor_works_without_transformers_and_torch(tmp_path):
    write_folder(tmp_path, byte_level(), chat_template="{{ messages[0].content }}")
    code = (
        "import sys\n"
        "sys.modules.update(transformers=None, torch=None)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from tokenizer_folders import FolderCheckpoint\n"
        "from infinilm.processors.huggingface import select_processor\n"
        f"processor = select_processor([], FolderCheckpoint(Path({str(tmp_path)!r})))\n"
        "prompt = processor.render_chat([{'role': 'user', 'content': 'hello'}])\n"
        "print(processor.decode(processor.encode(prompt)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "hello\n"
