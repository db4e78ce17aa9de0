"""Checkpoints made by hand: a tiny llama folder, and safetensors files that say whatever a test wants them to say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
WORDS = ("<unk>", "</s>", "zero", "one", "two", "three", "four", "five", "plus", "minus", "is")


def llama_tensors(*, seed: int = 0) -> dict[str, Tensor]:
    """Return the tensors of a model of `CONFIG`, all of them random, under Hugging Face's names."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 16)}
    for layer in range(2):
        rows = {"self_attn.q_proj": 16, "self_attn.k_proj": 8, "self_attn.v_proj": 8, "self_attn.o_proj": 16}
        rows |= {"mlp.gate_proj": 24, "mlp.up_proj": 24}
        shapes |= {f"model.layers.{layer}.{name}.weight": (size, 16) for name, size in rows.items()}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (16, 24)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (16,)
    shapes |= {"model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.25 for name, shape in shapes.items()}


def write_llama(folder: Path, *, tokenizer: bool = False, config: Mapping[str, Any] | None = None) -> Path:
    """Write a llama that loads and generates; `config` replaces keys of `CONFIG`."""
    write_folder(folder, llama_tensors(), config={**CONFIG, **(config or {})})
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_folder(folder: Path, tensors: Mapping[str, Tensor], *, config: object = CONFIG) -> Path:
    """Write a folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], *, weight_map: object = None) -> Path:
    """Write a folder with a file for each of `shards`, and an index that agrees unless `weight_map` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file, tensors in shards.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(dict(tensors), folder / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words, one for each of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def safetensors_bytes(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file. A `header` of bytes is written as it is, and `length` in place of its own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body
