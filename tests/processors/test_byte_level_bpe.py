"""Folders of vocab.json and merges.txt, against transformers' tokenizer of the same folder."""

import json

import pytest
from tokenizer_folders import CORPUS, FolderCheckpoint, words, write_folder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from infinilm.processors.huggingface import select_processor
from infinilm_hookspecs import CheckpointError

TEXTS = [
    *CORPUS[:4],
    "",
    "  a   b ",
    "<s>x</s>",
    "qux quxx aqux, qux",
    "a<|endoftext|> b<|im_start|>  c <tool> d",
    "don't I'LL 1234  x\n\n  y (quick",
    "e\u0301 ﬁ",  # composed by NFC, and not by NFKC
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Vocabulary and merges, with an end of text, that cross words: how a text is cut into them makes a difference."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*CORPUS, *["(quick 1234 (quick I'LL\n\n"] * 4], trainer)
    tokenizer.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    return {**vocab, "<|endoftext|>": len(vocab)}, (folder / "merges.txt").read_text()


@pytest.fixture
def write(trained, tmp_path):
    def write(model_type="gpt2", added=None, **tokenizer_config):
        vocab, merges = trained
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text(merges)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))  # where transformers looks
        if tokenizer_config:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        if added:
            (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        return FolderCheckpoint(tmp_path)

    return write


def token(content, **flags):
    flags = {"special": False, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}
    return {"content": content, **flags}


def added_tokens(size):
    tokens = [token("<|endoftext|>", special=True), token("<|im_start|>", special=True)]
    tokens += [token("<tool>", lstrip=True, rstrip=True), token("qux", single_word=True)]
    return {str(size - 1 + at): token for at, token in enumerate(tokens)}


CASES = {
    "no_config": ("gpt2", {}),
    "gpt2": ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}),
    "bos": ("gpt2", {"tokenizer_class": "GPT2TokenizerFast", "bos_token": "<s>", "add_bos_token": True}),
    "both": ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True}),
    "prefix_space": ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "codegen": ("codegen", {"tokenizer_class": "CodeGenTokenizer"}),
    "qwen2": ("qwen2", {"tokenizer_class": "Qwen2Tokenizer", "errors": "replace"}),
    "qwen2_added": ("qwen2", {"tokenizer_class": "Qwen2TokenizerFast", "added_tokens_decoder": added_tokens}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_and_decodes_as_transformers_does(write, trained, case, add_special_tokens):
    model_type, config = CASES[case]
    config = {key: value(len(trained[0])) if callable(value) else value for key, value in config.items()}
    checkpoint = write(model_type, **config)
    processor, oracle = select_processor([], checkpoint), AutoTokenizer.from_pretrained(checkpoint.path)
    for text in TEXTS:
        ids = processor.encode(text, add_special_tokens=add_special_tokens)
        assert ids == oracle.encode(text, add_special_tokens=add_special_tokens)
        stream = processor.stream()
        assert "".join(map(stream.put, ids)) == processor.decode(ids)
        for skip in (True, False):
            assert processor.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_added_tokens_of_older_folders(write, trained):
    size = len(trained[0])
    checkpoint = write(tokenizer_class="GPT2Tokenizer", added={"<|im_start|>": size, "<tool>": size + 1})
    processor, oracle = select_processor([], checkpoint), AutoTokenizer.from_pretrained(checkpoint.path)
    ids = processor.encode("a<|im_start|>b<tool>")
    assert ids == oracle.encode("a<|im_start|>b<tool>")
    assert ids[1::2] == [size, size + 1]
    assert processor.decode(ids) == oracle.decode(ids, skip_special_tokens=True) == "a<|im_start|>b<tool>"


def test_added_tokens_keep_the_ids_they_are_given(write, trained):
    """The weights have a row for each id. transformers 5 numbers these anew, without the gap."""
    size = len(trained[0])
    processor = select_processor([], write(added_tokens_decoder={str(size + 7): token("<late>", special=True)}))
    assert processor.encode("<late>") == [size + 7]
    assert processor.token_bytes()[size + 7] is None
    assert len(processor.token_bytes()) == size + 8


def test_tokenizer_json_comes_first(write, tmp_path):
    write(tokenizer_class="GPT2Tokenizer")
    processor = select_processor([], write_folder(tmp_path, words()))
    assert processor.encode("seven plus") == [1, 2]


def test_one_of_the_two_files_is_not_enough(write, tmp_path):
    checkpoint = write()
    (tmp_path / "merges.txt").unlink()
    assert select_processor([], checkpoint) is None


def test_class_whose_words_are_not_known_is_an_error(write):
    with pytest.raises(CheckpointError, match=r"how 'CTRLTokenizer' cuts words .*save_pretrained.*--tokenizer"):
        select_processor([], write(tokenizer_class="CTRLTokenizer"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", r"vocab\.json and merges\.txt are not a vocabulary and its merges"),
        ("merges.txt", "#version: 0.2\na b c\n", r"vocab\.json and merges\.txt are not a vocabulary and its merges"),
        ("merges.txt", "no such\n", r"vocab\.json and merges\.txt are not a vocabulary and its merges"),
        ("added_tokens.json", '{"<a>": "7"}', r"added_tokens\.json gives '<a>' the id '7'"),
        ("added_tokens.json", "[]", r"added_tokens\.json holds list"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": [1]}',
            r"tokenizer_config\.json is \[1\], and tokens by id",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": "b"}}', r"gives the id 'a' the token 'b'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": ""}}}', r"the id '7' the token"),
    ],
)
def test_damaged_files_are_named(write, tmp_path, name, content, message):
    checkpoint = write()
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        select_processor([], checkpoint)
