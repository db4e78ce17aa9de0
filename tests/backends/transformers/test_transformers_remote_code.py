"""Code beside the weights: run where the user trusts it, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from infinilm import LLM, SamplingParams
from infinilm_hookspecs import ConfigError, PlanError, hookimpl

CODE = '''
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class CounterConfig(PreTrainedConfig):
    model_type = "counter"
    vocab_size: int = 20
    num_hidden_layers: int = 1
    step: int = 1


class CounterForCausalLM(PreTrainedModel, GenerationMixin):
    """After every token comes the one `step` above it."""

    config_class = CounterConfig

    def __init__(self, config):
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(config.vocab_size, config.vocab_size))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        logits = torch.roll(torch.eye(self.config.vocab_size), self.config.step, 1)[input_ids] + self.shift[input_ids]
        return CausalLMOutputWithPast(logits=logits)

    def _init_weights(self, module):
        pass
'''
OPTIONS: dict[str, Any] = {"platform": "cpu", "dtype": "float32", "max_model_len": 32}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "counter"
    model.mkdir()
    (model / "modeling_counter.py").write_text(CODE)
    auto_map = {
        "AutoConfig": "modeling_counter.CounterConfig",
        "AutoModelForCausalLM": "modeling_counter.CounterForCausalLM",
    }
    config = {"model_type": "counter", "vocab_size": 20, "step": 3, "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config))
    save_file({"shift": torch.zeros(20, 20)}, model / "model.safetensors")
    return model


def test_trusted_code_runs(folder: Path) -> None:
    llm = LLM(folder, trust_remote_code=True, **OPTIONS)
    assert llm.choice.plugin == "transformers"
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [10]}], params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [[5, 8, 11, 14], [13, 16, 19, 2]]


def test_code_that_nobody_trusts_is_not_looked_at(folder: Path) -> None:
    (folder / "modeling_counter.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="no plugin adapts model_type 'counter'"):
        LLM(folder, **OPTIONS)


def test_code_that_is_broken_is_the_reason(folder: Path) -> None:
    (folder / "modeling_counter.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"cannot read the code of '.*counter'.*ZeroDivisionError"):
        LLM(folder, trust_remote_code=True, **OPTIONS)


def test_code_of_another_repository_is_not_fetched(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other/repository--modeling_counter.CounterForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="code of another repository, 'other/repository--modeling_counter"):
        LLM(folder, trust_remote_code=True, **OPTIONS)


class Renaming:
    """Makes a family that transformers has of one that brings code along."""

    plugin_name = "renaming"

    @hookimpl
    def adapt_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return {**config, "model_type": "mpt"} if config["model_type"] == "counter" else None


def test_code_is_for_the_stored_config_alone(folder: Path) -> None:
    (folder / "modeling_counter.py").write_text("raise SystemExit('ran')")
    with pytest.raises(PlanError):  # an mpt has other weights
        LLM(folder, plugins=[Renaming()], trust_remote_code=True, **OPTIONS)
