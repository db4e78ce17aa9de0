"""bfloat16 on the installed cpu backend: how far logits are from float32 arithmetic on the same, rounded, weights.

Off is the largest difference as a share of the largest logit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_library import isas
from demo_model import MODEL, held_out, logits, logits_of
from test_parity_families import GEMMA2, GPT2, MISTRAL, QWEN2, QWEN3
from test_parity_families import SIZES as TINY
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from infinilm import LLM
from infinilm.testing import ParityCase
from infinilm.testing.parity import edit_config, edit_tensors, write_checkpoint

OFF, AGREEMENT = 2e-2, 0.99
LENGTHS = (1, 2, 15, 16, 30, 45, 75, 100)
LARGER = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
TINY_CASES = [
    ParityCase("llama", LlamaConfig(**TINY)),
    *(cases[0] for cases in (MISTRAL, QWEN2, QWEN3, GEMMA2, GPT2)),
]


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def off_and_agreement(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return off, float((found.argmax(-1) == wanted.argmax(-1)).float().mean())


def rounded(folder: Path) -> None:
    """Round the weights of a checkpoint to bfloat16, so that every dtype begins with the same."""
    edit_tensors(folder, lambda stored: {name: tensor.bfloat16() for name, tensor in stored.items()})


def compare(folder: Path, vocab_size: int) -> dict[str, tuple[float, float]]:
    """Return how far bfloat16 is off and how often it agrees, for both backends."""
    asked = prompts(vocab_size)
    wanted = logits(folder, asked, backend="torch", dtype="float32")
    return {
        backend: off_and_agreement(logits(folder, asked, backend=backend, dtype="bfloat16"), wanted)
        for backend in ("cpu", "torch")
    }


# ---------------------------------------------------------------- a model that has learned something


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """The demo model rounded to bfloat16, and its logits of 300 sums it was not trained on."""
    folder = tmp_path_factory.mktemp("demo")
    for file in MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rounded(folder)
    edit_config(folder, lambda config: {**config, "dtype": "bfloat16"})
    with LLM(folder, backend="torch", dtype="float32") as llm:
        return folder, logits_of(llm, held_out(llm, 300).sentences)


DEMO_CODE = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch
from demo_model import held_out, logits_of
from infinilm import LLM
with LLM(sys.argv[2], backend="cpu") as llm:
    assert llm.choice.plugin == "cpu"
    torch.save(logits_of(llm, held_out(llm, 300).sentences), sys.argv[3])
"""


@pytest.mark.parametrize("isa", isas())
def test_demo_on_every_level(demo, isa, tmp_path):
    folder, wanted = demo
    environment = {**os.environ, "INFINILM_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DEMO_CODE, json.dumps(sys.path), str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    off, agreement = off_and_agreement(torch.load(tmp_path / "logits.pt"), wanted)
    assert off <= OFF
    assert agreement >= AGREEMENT


# ---------------------------------------------------------------- models that have not


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config], ids=["llama", "qwen2"])
def test_larger_models_as_they_are_initialised(config, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(**LARGER, num_attention_heads=8, num_key_value_heads=4), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    off, agreement = compare(tmp_path, 1000)["cpu"]
    assert off <= OFF
    assert agreement >= AGREEMENT


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_tiny_models_whose_weights_are_large(case, tmp_path):
    """Scores of these are large, so that a softmax makes much of what is rounded: torch's bfloat16 is off by more.

    What a cache in bfloat16 rounds is alone enough to be off by 2e-2 with a quarter of them.
    """
    write_checkpoint(tmp_path, case.config, **case.options)
    edit_config(tmp_path, case.spelling)
    edit_tensors(tmp_path, case.names)
    rounded(tmp_path)
    found = compare(tmp_path, case.config.vocab_size)
    off, agreement = found["cpu"]
    assert off <= OFF or off <= found["torch"][0], found
    assert agreement >= min(AGREEMENT, found["torch"][1]), found
