"""The demo model on any backend: the sums it was not trained on, and the logits of every token of sentences."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from infinilm import LLM
from infinilm.testing import Context, make_batch

MINIMAL = Path(__file__).resolve().parents[2] / "example_plugins" / "minimal"
MODEL = MINIMAL / "model"
_AT_ONCE = 32  # sentences of a step


@dataclass(frozen=True, slots=True)
class Questions:
    """Token ids of questions, and of the answers that follow them, their end included."""

    asked: list[list[int]]
    answers: list[list[int]]

    @property
    def sentences(self) -> list[list[int]]:
        """Every question with its answer."""
        return [asked + answer for asked, answer in zip(self.asked, self.answers, strict=True)]


def _train() -> ModuleType:
    """Return the script the model was trained by, which holds some sums out."""
    name = "demo_model_train"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MINIMAL / "train.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def held_out(llm: LLM, count: int | None = None) -> Questions:
    """Return so many sums that the model was not trained on, spread over all of them; `None`: all."""
    train = _train()
    _, sums = train.split_sums()
    chosen = sums if count is None else sums[:: len(sums) // count][:count]
    encode = llm.processor.value.encode
    return Questions(
        [encode(f"{item.question} is") for item in chosen], [encode(f" {item.answer}{train.END}") for item in chosen]
    )


def logits(folder: Path, sentences: Sequence[list[int]], *, backend: str, dtype: str) -> torch.Tensor:
    """Return the logits of a checkpoint on a backend, every sentence's behind those of the one before."""
    with LLM(folder, backend=backend, platform="cpu", dtype=dtype, max_model_len=128) as llm:
        assert llm.choice.plugin == backend
        return logits_of(llm, sentences)


def logits_of(llm: LLM, sentences: Sequence[list[int]]) -> torch.Tensor:
    """Return the logits (number of tokens, vocab_size) of sentences, in steps of several."""
    size = llm.backend.cache_spec().block_size
    pieces = []
    for start in range(0, len(sentences), _AT_ONCE):
        first = 0
        work = []
        for slot, tokens in enumerate(sentences[start : start + _AT_ONCE]):
            num_blocks = -(-len(tokens) // size)
            work.append((Context(tokens, list(range(first, first + num_blocks)), slot=slot), len(tokens)))
            first += num_blocks
        pieces.append(llm.backend.forward(make_batch(work, size)).clone())
    return torch.cat(pieces)
