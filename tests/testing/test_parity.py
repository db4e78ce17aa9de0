"""The parity kit: a plugin for a family by other names is proven, and one that maps it wrongly is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from infinilm.testing import ConformanceError, ParityCase, ParitySubject
from infinilm.testing.parity import PROMPT_LENGTHS, Answer, Stored, assert_parity
from infinilm_hookspecs import Config, hookimpl

torch.set_num_threads(1)


def acme_config(config: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in config.items() if key != "hidden_size"}, "model_type": "acme", "width": 32}


def acme_names(stored: Stored) -> Stored:
    return {name.replace("self_attn", "attn"): tensor for name, tensor in stored.items()}


class Acme:
    model_types = ("acme",)

    def __init__(self, value: str = "v_proj") -> None:
        self.names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": value, "o_proj": "o_proj"}
        if value == "k_proj":
            self.names["k_proj"] = "v_proj"

    @hookimpl
    def adapt_config(self, config: Config) -> Config | None:
        if config["model_type"] != "acme":
            return None
        return {**config, "model_type": "llama", "hidden_size": config["width"]}

    @hookimpl
    def remap_weight(self, config: Config) -> dict[str, str] | None:
        if config["model_type"] != "acme":
            return None
        return {
            f"model.layers.{{i}}.attn.{theirs}.weight": f"model.layers.{{i}}.self_attn.{ours}.weight"
            for theirs, ours in self.names.items()
        }


@pytest.fixture(scope="module")
def examine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Acme], ParitySubject]:
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    case = ParityCase("acme", config, spelling=acme_config, names=acme_names)
    subject = case.examine(tmp_path_factory.mktemp("acme"))
    return lambda plugin: ParitySubject(subject.folder, subject.prompts, subject.expected, (plugin,))


def test_a_right_plugin_is_proven(examine):
    examine(Acme()).check()


def test_a_wrong_plugin_is_not(examine):
    with pytest.raises(ConformanceError, match=r"prompt 0: \[.*\], not \["):
        examine(Acme(value="k_proj")).check()


def test_prompts_cross_blocks_and_differ_in_length(examine):
    assert tuple(map(len, examine(Acme()).prompts)) == PROMPT_LENGTHS


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (Answer([0.1], [1, 2], [0.0, 0.0]), "prompt 0: a log-probability is off by 1.00e-01"),
        (Answer([0.0], [1, 3], [0.0, 0.0]), r"prompt 0: \[1, 3\], not \[1, 2\]"),
        (Answer([0.0], [1, 2], [0.0, 0.5]), "answer 0: a log-probability is off by 5.00e-01"),
        (Answer([0.0], [1, 2], [0.0, float("nan")]), "answer 0: a log-probability is off by nan"),
    ],
)
def test_what_is_off_is_said(answer, complaint):
    expected = Answer([0.0], [1, 2], [0.0, 0.0])
    assert_parity([expected], [expected])
    with pytest.raises(ConformanceError, match=complaint):
        assert_parity([answer], [expected])


def test_a_missing_answer_is_said():
    with pytest.raises(ConformanceError, match="0 answers, and 1 were expected"):
        assert_parity([], [Answer([], [], [])])
