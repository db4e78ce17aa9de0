"""Mistral's layout, made of a transformers model by rules written here anew: the same answers, and every refusal."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MixtralConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mistral import convert_tekken_tokenizer

from infinilm import LLM
from infinilm.plugins import create_plugin_manager, trace_lineage
from infinilm_hookspecs import CheckpointError, ConfigError
from infinilm_mistral_format.checkpoint import MistralCheckpoint

README = Path(__file__).parent.parent / "README.md"
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
PARAMS: dict[str, Any] = {
    "dim": 48,
    "n_layers": 2,
    "head_dim": 12,
    "hidden_dim": 72,
    "n_heads": 6,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 2.0}
LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe.gate": "feed_forward.gate",
    "mlp.gate": "feed_forward.gate",
}
OUTSIDE = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


# ---------------------------------------------------------------- the layout


def in_mistrals_layout(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a transformers checkpoint as Mistral would have written them."""
    return {theirs_of(name): interleaved(tensor) if is_rotated(name) else tensor for name, tensor in stored.items()}


def is_rotated(name: str) -> bool:
    return ".q_proj." in name or ".k_proj." in name


def theirs_of(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    if ".experts." in rest:
        _, _, expert = rest.partition(".experts.")
        return f"layers.{layer}.feed_forward.experts.{expert}.weight"
    return f"layers.{layer}.{LAYER[rest]}.weight"


def interleaved(tensor: Tensor) -> Tensor:
    """Return rows in the order 0, h/2, 1, h/2 + 1, ... within every head of h."""
    head_dim, half = PARAMS["head_dim"], PARAMS["head_dim"] // 2
    rows: list[int] = []
    for head in range(0, len(tensor), head_dim):
        for i in range(half):
            rows += [head + i, head + half + i]
    return tensor[rows]


def write_mistral(folder: Path, tensors: Mapping[str, Tensor], num_shards: int = 0, **params: Any) -> Path:
    """Write the layout: one file, or shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if not num_shards:
        save_file(tensors, folder / "consolidated.safetensors")
    for number in range(num_shards):
        part = {name: tensors[name] for name in sorted(tensors)[number::num_shards]}
        save_file(part, folder / shard_name(number, num_shards))
    return folder


def shard_name(number: int, total: int) -> str:
    return f"consolidated-{number + 1:05}-of-{total:05}.safetensors"


def write_index(folder: Path) -> None:
    weight_map = {name: path.name for path in folder.glob("consolidated-*") for name in load_file(path)}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "window": (
        MistralConfig(**SIZES, sliding_window=20),
        {"sliding_window": 20},  # without rope_theta: 10000 it is, as in the first 7B
    ),
    "no_window": (
        MistralConfig(**SIZES, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {"moe": None, "lora": None, "use_biases": False, "max_batch_size": 4, "model_type": "transformer"},
    ),
    "tied_yarn": (
        MistralConfig(
            **SIZES, sliding_window=None, tie_word_embeddings=True, rope_parameters={**YARN, "rope_theta": 5e3}
        ),
        {
            "tied_embeddings": True,
            "rope_theta": 5e3,
            "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta": 8, "alpha": 2},
        },
    ),
    "yarn_unscaled": (
        MistralConfig(
            **SIZES,
            sliding_window=20,
            rope_parameters={**YARN, "rope_theta": 1e4, "attention_factor": 1.0},
        ),
        {
            "sliding_window": [20, 20],
            "yarn": {
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta": 8,
                "alpha": 2,
                "apply_scale": False,
            },
        },
    ),
    "experts": (
        MixtralConfig(
            **SIZES,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        {"moe": {"num_experts": 4, "num_experts_per_tok": 2}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_transformers(tmp_path: Path, name: str) -> None:
    config, params = CASES[name]
    model = oracle.write_checkpoint(tmp_path / "hf", config)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    folder = write_mistral(tmp_path / "native", in_mistrals_layout(stored), **params)
    subject = oracle.Subject(folder, *oracle.examine(model, (1, 15, 45, 75)))
    with subject.load() as llm:
        assert llm.checkpoint.plugin == "mistral_format"
        family = "mixtral" if params.get("moe") else "mistral"
        assert llm.lineage.plugins == ("mistral_format", family)
        assert not llm.plan.dropped
        oracle.check_parity(llm, subject.prompts, subject.expected)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("model")
    oracle.write_checkpoint(folder, MistralConfig(**SIZES))
    return in_mistrals_layout(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("has_index", [True, False])
def test_shards(tmp_path: Path, tensors: dict[str, Tensor], has_index: bool) -> None:
    folder = write_mistral(tmp_path, tensors, num_shards=3)
    if has_index:
        write_index(folder)
    checkpoint = opened(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        checkpoint.read(name, tuple(slice(0, size) for size in tensor.shape), out)
        assert torch.equal(out, tensor), name
    checkpoint.close()


def opened(folder: Path) -> MistralCheckpoint:
    pm = create_plugin_manager()
    answer = pm.ask_one("open_checkpoint", source=str(folder))
    assert answer is not None
    assert answer.plugin == "mistral_format"
    assert isinstance(answer.value, MistralCheckpoint)
    return answer.value


# ---------------------------------------------------------------- what it claims


def test_folder_with_both_layouts_is_opened_in_the_original(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    oracle.write_checkpoint(tmp_path, MistralConfig(**SIZES))
    write_mistral(tmp_path, tensors)
    opened(tmp_path).close()
    with LLM(tmp_path, plugins=["no:mistral_format"]) as llm:
        assert llm.checkpoint.plugin == "safetensors"


@pytest.mark.parametrize("model_type", ["mamba", "transformer"])
def test_claims_transformers_with_weights_in_this_layout(tmp_path: Path, model_type: str) -> None:
    pm = create_plugin_manager()
    assert pm.ask_one("open_checkpoint", source=str(tmp_path)) is None
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").write_text("")
    assert pm.ask_one("open_checkpoint", source=str(tmp_path)) is None
    write_mistral(tmp_path, {"norm.weight": torch.ones(2)}, model_type=model_type)
    answer = pm.ask_one("open_checkpoint", source=str(tmp_path))
    assert (answer is not None) is (model_type == "transformer")
    if answer is not None:
        answer.value.close()


# ---------------------------------------------------------------- what is wrong


def refusal_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        create_plugin_manager().ask_one("open_checkpoint", source=str(folder))
    return str(caught.value)


def test_shard_that_is_missing(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_mistral(tmp_path, tensors, num_shards=3)
    (folder / shard_name(1, 3)).unlink()
    assert refusal_of(folder) == (
        f"'{folder}' has 2 of the shards consolidated-00001-of-00003.safetensors, ...; is the download complete?"
    )


def test_one_name_in_two_shards(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_mistral(tmp_path, tensors, num_shards=2)
    twice = {**load_file(folder / shard_name(1, 2)), min(tensors): torch.ones(2)}
    save_file(twice, folder / shard_name(1, 2))
    assert f"lies in {shard_name(1, 2)} and in {shard_name(0, 2)}" in refusal_of(folder)


def test_index_that_disagrees(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_mistral(tmp_path, tensors, num_shards=2)
    write_index(folder)
    path = folder / "consolidated.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["extra.weight"] = shard_name(0, 2)
    path.write_text(json.dumps(index))
    assert f"'extra.weight' is not in {shard_name(0, 2)}, where the index says it is" in refusal_of(folder)
    index["weight_map"]["extra.weight"] = "../x.safetensors"
    path.write_text(json.dumps(index))
    assert "leads out of the folder" in refusal_of(folder)


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"dim": None}, "params.json lacks dim"),
    ({"vision_encoder": {"hidden_size": 8}}, "params.json has vision_encoder, which this plugin does not know"),
    ({"llama_4_scaling": {"beta": 0.1}}, "params.json has llama_4_scaling, which"),
    (
        {"sliding_window": [20, None]},
        "sliding_window of params.json is [20, None], and the same in all layers is wanted",
    ),
    ({"yarn": {"factor": 4.0}}, "yarn of params.json lacks original_max_position_embeddings"),
    ({"yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "gamma": 1}}, "yarn of params.json has gamma,"),
    ({"moe": {"num_experts": 4}}, "moe of params.json lacks num_experts_per_tok"),
    ({"moe": 4}, "moe of params.json is 4, and an object is wanted"),
]


@pytest.mark.parametrize(("params", "message"), PROBLEMS)
def test_params_that_would_change_what_is_computed(params: dict[str, Any], message: str) -> None:
    config = {"model_type": "mistral_native", **PARAMS, **params}
    with pytest.raises(ConfigError) as caught:
        trace_lineage(create_plugin_manager(), config)
    assert message in str(caught.value)


# ---------------------------------------------------------------- the tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln — ça va? 日本語", "12 34  x\n\ny"] * 4
TEXTS = [
    *CORPUS[:3],
    "a zxqv zxqvs",
    "",
    " ",
    "theth 123\n\n\n  the",
    "👩‍👩‍👧‍👦",
    "\x00\x7f\xa0",
    "[INST]fox[/INST] the</s>",
]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tekken(folder: Path, *, has_special_tokens: bool = True) -> Path:
    """Train a byte-level BPE, and write it down as tekken does."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    merged = [left + right for left, right in json.loads(trained.to_str())["model"]["merges"]]
    bytes_of = {spelt: bytes([byte]) for byte, spelt in bytes_to_unicode().items()}
    tokens = [bytes([byte]) for byte in range(256)] + [b"".join(map(bytes_of.__getitem__, token)) for token in merged]
    tokens.append(b" zxqv")  # of no two others: a word that is a token as a whole, or not at all
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    data: dict[str, Any] = {
        "config": {
            "pattern": PATTERN,
            "version": "v11" if has_special_tokens else "v3",
            "default_num_special_tokens": 32,
            "default_vocab_size": len(tokens) + 32,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate([*tokens, b"padding that is cut off"])
        ],
    }
    if has_special_tokens:
        listed = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(special)]
        data["special_tokens"] = listed[::-1]
    path = folder / "tekken.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def with_tekken(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    folder = write_mistral(tmp_path_factory.mktemp("tekken"), tensors)
    write_tekken(folder)
    return folder


def test_tekken_gives_the_tokens_that_transformers_makes_of_it(with_tekken: Path) -> None:
    theirs = convert_tekken_tokenizer(str(with_tekken / "tekken.json"))
    with LLM(with_tekken) as llm:
        assert llm.processor is not None
        assert llm.processor.plugin == "huggingface"
        processor = llm.processor.value
    assert processor.eos_token_ids == {2}
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert processor.encode(text, add_special_tokens=False) == ids, text
        assert processor.encode(text) == [1, *ids]
        assert processor.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_tekken_of_the_first_versions_leaves_its_special_tokens_out(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_mistral(tmp_path, tensors)
    write_tekken(folder, has_special_tokens=False)
    checkpoint = opened(folder)
    path = checkpoint.file("tokenizer.json")
    assert path is not None
    tokenizer = Tokenizer.from_file(str(path))
    assert [tokenizer.token_to_id(token) for token in ("[/INST]", "[TOOL_CONTENT]", "<SPECIAL_31>")] == [4, 19, 31]
    checkpoint.close()
    assert not path.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"config": {}}, "is not a tekken tokenizer: KeyError: 'default_num_special_tokens'"),
        ({"vocab": []}, "lists 0 tokens, and"),
        ({"vocab": 3}, "is not a tekken tokenizer: TypeError"),
        ({"special_tokens": [{"rank": 7, "token_str": "<s>"}]}, "has special_tokens whose ranks are not 0, 1, 2, ..."),
        ({"special_tokens": None}, "is of version 'v11' and has no special_tokens"),
    ],
)
def test_damaged_tekken(tmp_path: Path, tensors: dict[str, Tensor], edit: dict[str, Any], message: str) -> None:
    path = write_tekken(write_mistral(tmp_path, tensors))
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    checkpoint = opened(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.file("tokenizer.json")
    assert str(caught.value).startswith(f"'{path}' ")
    assert message in str(caught.value)
    checkpoint.close()


def test_own_sentencepiece_model_counts_before_a_converted_one(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_mistral(tmp_path, tensors)
    for version, corpus in ("v1", CORPUS[:1] * 4), ("v3", CORPUS):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_prefix=str(tmp_path / version),
            vocab_size=330,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
        (tmp_path / f"{version}.model").rename(tmp_path / f"tokenizer.model.{version}")
    (tmp_path / "tokenizer.json").write_text("{}")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model.v3"))
    with LLM(tmp_path) as llm:
        assert llm.processor is not None
        assert llm.processor.plugin == "sentencepiece"
        assert llm.processor.value.encode(CORPUS[0]) == [model.bos_id(), *model.encode(CORPUS[0])]


# ---------------------------------------------------------------- the rest


def test_export_is_what_transformers_reads(tmp_path: Path, with_tekken: Path, tensors: dict[str, Tensor]) -> None:
    with LLM(with_tekken) as llm:
        llm.export(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    stored = in_mistrals_layout(dict(model.named_parameters()))
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    theirs = convert_tekken_tokenizer(str(with_tekken / "tekken.json"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.encode(CORPUS[1], add_special_tokens=False) == theirs.encode(CORPUS[1], add_special_tokens=False)


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, infinilm_mistral_format as plugin\nplugin.open_checkpoint('.')\n"
        "print({'torch', 'transformers', 'numpy', 'tokenizers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_command_of_the_readme_inspects_a_folder(with_tekken: Path) -> None:
    (line,) = [line for line in README.read_text().splitlines() if line.startswith("$ infinilm inspect")]
    words = line.removeprefix("$ infinilm ").replace("MODEL", str(with_tekken)).split()
    done = subprocess.run([sys.executable, "-m", "infinilm", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mistral_format" in done.stdout
