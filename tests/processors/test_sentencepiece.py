"""Folders with a sentencepiece model trained here, against sentencepiece itself and against transformers."""

import io
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import CORPUS, TEMPLATE, FolderCheckpoint, words, write_folder
from transformers import AutoTokenizer

from infinilm.processors.sentencepiece import select_processor
from infinilm_hookspecs import CheckpointError, Processor, RequestError, UnavailableError

TEXTS = [
    *CORPUS[:4],
    "",
    "a",
    "zażółć gęślą jaźń",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\x00\x7f\xa0\ufeff",
    "x1234 5",
    "trailing  ",
]
WITH_SPACES_BEFORE = [" ", "  two leading spaces", "\n\n a"]
WITH_TOKENS = [
    "<s>x</s>",
    "qux,quxx aqux,qux",
    "a<s>b <s>c",
    "<unk>a<pad>b",
    "a<|im|> b<tool>  c <tool>d",
    "<tool>box<tool>bo",
    "<|im|>a<|im|>\n",
]
SIZE = 400
# As llama's own model was trained (meta-llama/llama, the trainer_spec and normalizer_spec in its tokenizer.model).
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
KINDS = {
    "llama": LLAMA,
    "no_prefix": {**LLAMA, "add_dummy_prefix": False},
    "unigram_bytes": {**LLAMA, "model_type": "unigram"},
    "unigram": {"model_type": "unigram"},
    "symbols": {**LLAMA, "control_symbols": ["<|im|>"], "user_defined_symbols": ["<tool>"]},
    "char": {"model_type": "char"},
}


@cache
def train(kind):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=SIZE,
        hard_vocab_limit=False,
        minloglevel=2,
        **KINDS[kind],
    )
    return model.getvalue()


def oracle_of(kind):
    return sentencepiece.SentencePieceProcessor(model_proto=train(kind))


@pytest.fixture
def write(tmp_path):
    def write(kind="llama", name="tokenizer.model", *, added=None, special=None, **tokenizer_config):
        (tmp_path / name).write_bytes(train(kind))
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # where transformers looks
        files = {"tokenizer_config.json": tokenizer_config, "added_tokens.json": added}
        for file, values in {**files, "special_tokens_map.json": special}.items():
            if values is not None:
                (tmp_path / file).write_text(json.dumps(values))
        return FolderCheckpoint(tmp_path)

    return write


@pytest.fixture(scope="module")
def processor_of(tmp_path_factory):
    @cache
    def processor_of(kind):
        path = tmp_path_factory.mktemp(kind)
        (path / "tokenizer.model").write_bytes(train(kind))
        return select_processor([], FolderCheckpoint(path))

    return processor_of


def test_takes_folders_with_a_model_and_no_tokenizer_json(write, tmp_path):
    assert select_processor([], FolderCheckpoint(tmp_path)) is None
    assert isinstance(select_processor([], write()), Processor)
    (tmp_path / "tokenizer.model").rename(tmp_path / "spiece.model")
    assert isinstance(select_processor([], FolderCheckpoint(tmp_path)), Processor)
    assert select_processor([], write_folder(tmp_path, words())) is None


# ---------------------------------------------------------------- against sentencepiece


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS + WITH_SPACES_BEFORE)
def test_encodes_and_decodes_as_sentencepiece_does(processor_of, kind, text):
    processor, oracle = processor_of(kind), oracle_of(kind)
    ids = oracle.encode(text)
    assert processor.encode(text) == [oracle.bos_id(), *ids]
    assert processor.encode(text, add_special_tokens=False) == ids
    # What is not in the vocabulary is special here, as in transformers, and written as a sign there.
    if oracle.unk_id() not in ids:
        assert processor.decode(ids) == oracle.decode(ids)


@pytest.mark.parametrize("kind", ["llama", "no_prefix", "symbols", "unigram_bytes"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_tokens_decode_and_stream_as_in_sentencepiece(processor_of, kind, data):
    processor, oracle = processor_of(kind), oracle_of(kind)
    ids = data.draw(st.lists(st.integers(3, oracle.get_piece_size() - 1), max_size=30))
    # A space spelt as a byte, which no text is encoded to, is stripped at the start, as transformers does.
    ids = [token_id for token_id in ids if oracle.id_to_piece(token_id) not in ("<0x20>", "<|im|>")]
    text, stream = processor.decode(ids), processor.stream()
    streamed = "".join(map(stream.put, ids))
    assert text.startswith(streamed)
    assert text[len(streamed) :] in ("", "\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd")  # half a character
    if "\ufffd" not in text:
        assert text == oracle.decode(ids)


@given(text=st.text(max_size=30))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_text_survives_and_never_streams_half_a_character(processor_of, text):
    processor = processor_of("llama")
    ids = processor.encode(text)
    stream = processor.stream()
    pieces = [stream.put(token_id) for token_id in ids]
    assert "".join(pieces) == processor.decode(ids) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_are_the_pieces(processor_of, kind):
    oracle, table = oracle_of(kind), processor_of(kind).token_bytes()
    assert len(table) == oracle.get_piece_size()
    for token_id, data in enumerate(table):
        if oracle.is_control(token_id) or oracle.is_unknown(token_id):
            assert data is None
        elif oracle.is_byte(token_id):
            assert data == bytes([int(oracle.id_to_piece(token_id)[3:5], 16)])
        else:
            assert data == oracle.id_to_piece(token_id).replace("▁", " ").encode()


# ---------------------------------------------------------------- against transformers


def token(content, **flags):
    flags = {"special": False, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}
    return {"content": content, **flags}


DECODER = {
    **{str(at): token(content, special=True) for at, content in enumerate(("<unk>", "<s>", "</s>"))},
    str(SIZE): token("<|im|>", special=True, rstrip=True),
    str(SIZE + 1): token("<tool>", lstrip=True, rstrip=True),
    str(SIZE + 2): token("qux", single_word=True),
    str(SIZE + 3): token("<tool>box"),
}
FOLDERS = {
    "plain": {"add_bos_token": True},
    "no_bos": {"add_bos_token": False},
    "eos": {"add_bos_token": True, "add_eos_token": True},
    "legacy": {"add_bos_token": True, "legacy": True},
    "not_legacy": {"add_bos_token": True, "legacy": False},
    "added": {"add_bos_token": True, "added_tokens_decoder": DECODER},
    "added_legacy": {"add_bos_token": True, "added_tokens_decoder": DECODER, "legacy": True},
    "older": {
        "add_bos_token": True,
        "added": {"<pad>": SIZE, "<|im|>": SIZE + 1},
        "special": {"bos_token": token("<s>"), "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    },
}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_and_decodes_as_transformers_does(write, folder, add_special_tokens):
    checkpoint = write(tokenizer_class="LlamaTokenizer", **FOLDERS[folder])
    processor, oracle = select_processor([], checkpoint), AutoTokenizer.from_pretrained(checkpoint.path)
    for text in TEXTS + WITH_TOKENS:
        ids = processor.encode(text, add_special_tokens=add_special_tokens)
        assert ids == oracle.encode(text, add_special_tokens=add_special_tokens), text
        for skip in (True, False):
            assert processor.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_spaces_that_a_text_begins_with_all_survive(write):
    """transformers 5 puts no space before a text that begins with one, and loses it; sentencepiece always puts one."""
    checkpoint = write(tokenizer_class="LlamaTokenizer", add_bos_token=True)
    processor, oracle = select_processor([], checkpoint), AutoTokenizer.from_pretrained(checkpoint.path)
    assert processor.decode(processor.encode("  a")) == "  a"
    assert oracle.decode(oracle.encode("  a"), skip_special_tokens=True) == " a"


# ---------------------------------------------------------------- the files beside it


def test_without_a_word_a_text_begins_with_bos_and_does_not_end_with_eos(write):
    """As meta-llama/llama's `Llama.text_completion` encodes: `encode(text, bos=True, eos=False)`."""
    assert select_processor([], write()).encode("a") == [1, *oracle_of("llama").encode("a")]


def test_declared_special_tokens_replace_the_models_own(write):
    special = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    checkpoint = write(added={"<|begin|>": SIZE, "<|end|>": SIZE + 1}, special=special, add_eos_token=True)
    processor = select_processor([], checkpoint)
    assert processor.encode("") == [SIZE, SIZE + 1]
    assert processor.eos_token_ids == {SIZE + 1}
    assert processor.decode([SIZE, SIZE + 1]) == ""
    assert processor.decode([SIZE, SIZE + 1], skip_special_tokens=False) == "<|begin|><|end|>"


def test_special_token_without_an_id_is_none(write):
    processor = select_processor([], write(special={"bos_token": "<|begin|>"}))
    assert processor.encode("a") == oracle_of("llama").encode("a")


def test_additional_special_tokens_have_no_text(write):
    checkpoint = write(added={"<|im|>": SIZE}, special={"additional_special_tokens": ["<|im|>"]})
    processor = select_processor([], checkpoint)
    assert processor.decode(processor.encode("a<|im|>b")) == "ab"
    assert processor.token_bytes()[SIZE] is None


@pytest.mark.parametrize(
    ("generation_config", "lineage", "expected"),
    [
        ({"eos_token_id": [7, 8]}, [{"eos_token_id": 5}], {7, 8}),
        (None, [{"model_type": "x"}, {"eos_token_id": 5}], {5}),
        (None, [{}, object()], {2}),
    ],
)
def test_end_of_sequence_tokens(write, tmp_path, generation_config, lineage, expected):
    checkpoint = write()
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert select_processor(lineage, checkpoint).eos_token_ids == expected


def test_chat(write):
    processor = select_processor([], write(chat_template=TEMPLATE, bos_token="<s>", eos_token="</s>"))
    prompt = processor.render_chat([{"role": "user", "content": "hello"}])
    assert prompt == "<s><|user|>hello</s>\n"
    ids = processor.encode(prompt, add_special_tokens=False)
    assert (ids[0], ids.count(2)) == (1, 1)
    assert processor.parser().put("x").content == "x"
    with pytest.raises(RequestError, match="no chat template"):
        select_processor([], write()).render_chat([])


# ---------------------------------------------------------------- what goes wrong


def test_without_the_package_the_error_says_what_to_install(write, monkeypatch):
    checkpoint = write()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UnavailableError, match=r"pip install 'infinilm\[sentencepiece\]', or .* -p no:sentencepiece"):
        select_processor([], checkpoint)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"version https://git-lfs.github.com/spec/v1\n"])
def test_file_that_is_no_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a sentencepiece model"):
        select_processor([], FolderCheckpoint(tmp_path))


def test_text_with_lone_surrogates_is_refused(processor_of):
    with pytest.raises(RequestError, match="not text in Unicode"):
        processor_of("llama").encode("a\ud800")


def test_ids_without_a_token_have_no_text(processor_of):
    processor = processor_of("llama")
    assert processor.decode([10**6, -1, *processor.encode("hi")]) == "hi"


def test_plugin_imports_nothing_until_it_is_needed(write, tmp_path):
    write(chat_template="{{ messages[0].content }}")
    code = (
        "import sys\n"
        "sys.modules.update(transformers=None, torch=None, google=None)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import infinilm.processors.sentencepiece as plugin\n"
        "print('sentencepiece' in sys.modules)\n"
        "from pathlib import Path\n"
        "from tokenizer_folders import FolderCheckpoint\n"
        f"processor = plugin.select_processor([], FolderCheckpoint(Path({str(tmp_path)!r})))\n"
        "print(processor.decode(processor.encode(processor.render_chat([{'role': 'user', 'content': 'hello'}]))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\nhello\n"
