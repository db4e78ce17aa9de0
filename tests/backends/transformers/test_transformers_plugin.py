"""One out-of-tree plugin, two backends: the same log-probabilities, provenance, and an export to read elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from infinilm import LLM, SamplingParams
from infinilm_hookspecs import hookimpl

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOLERANCE = 1e-4  # of log-probabilities

CONFIGS = {
    "dense": LlamaConfig(**SIZES),
    "normed": Qwen3Config(**SIZES, head_dim=16),
    "experts": MixtralConfig(**SIZES, num_local_experts=4),
}


class Acme:
    """A family by other names: `width` for the hidden size, `acme.` before every weight."""

    plugin_name = "acme"

    @hookimpl
    def adapt_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if config.get("model_type") != "acme":
            return None
        kept = {key: value for key, value in config.items() if key not in ("width", "extends")}
        return {**kept, "model_type": config["extends"], "hidden_size": config["width"]}

    @hookimpl
    def remap_weight(self, config: Mapping[str, Any]) -> Any:
        if config.get("model_type") == "acme":
            return lambda weight: weight.rename(weight.name.removeprefix("acme."))
        return None


def as_acme(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: value for key, value in config.items() if key not in ("hidden_size", "architectures")},
        "model_type": "acme",
        "extends": config["model_type"],
        "width": config["hidden_size"],
    }


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> oracle.Subject:
    case = oracle.Case(
        request.param,
        CONFIGS[request.param],
        as_acme,
        lambda stored: {f"acme.{name}": tensor for name, tensor in stored.items()},
    )
    return case.examine(tmp_path_factory.mktemp(request.param))


def load(subject: oracle.Subject, backend: str, **options: Any) -> LLM:
    sizes = {"platform": "cpu", "dtype": "float32", "max_model_len": 128}
    return LLM(subject.folder, plugins=[Acme()], backend=backend, **sizes, **options)


@pytest.mark.parametrize("backend", ["torch", "transformers"])
def test_both_backends_say_the_same_through_the_plugin(subject: oracle.Subject, backend: str) -> None:
    llm = load(subject, backend, max_num_batched_tokens=64)
    assert llm.backend.name == backend
    oracle.check_parity(llm, subject.prompts, subject.expected)


def test_logits_are_equal_on_both_backends(subject: oracle.Subject) -> None:
    logits = []
    for backend in ("torch", "transformers"):
        llm = load(subject, backend)
        logits.append(last_logits(llm, subject.prompts[-1]))
    difference = (logits[0].log_softmax(-1) - logits[1].log_softmax(-1)).abs().max()
    assert difference < TOLERANCE


def last_logits(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Return what the backend says after a prompt, caught on its way to the sampler."""
    caught: list[torch.Tensor] = []
    forward = llm.backend.forward
    llm.backend.forward = lambda batch: caught.append(forward(batch)) or caught[-1]  # type: ignore[method-assign]
    llm.generate([{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return caught[-1][-1]


def test_every_parameter_knows_the_plugins_it_came_through(subject: oracle.Subject) -> None:
    llm = load(subject, "transformers")
    assert all(parameter.weight.trail[0] == "acme" for parameter in llm.plan.parameters)
    assert llm.plan.dropped == {}
    stored = {name for parameter in llm.plan.parameters for name in parameter.weight.stored_names()}
    assert stored == set(llm.checkpoint.value.tensors)


def test_export_is_a_checkpoint_of_the_family(subject: oracle.Subject, tmp_path: Path) -> None:
    llm = load(subject, "transformers")
    llm.export(tmp_path / "standard")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "standard").eval()
    for prompt in subject.prompts:
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).logits[0, -1]
        difference = (last_logits(llm, prompt).log_softmax(-1) - wanted.log_softmax(-1)).abs().max()
        assert difference < TOLERANCE


def test_export_of_the_original_layout_is_bit_for_bit(subject: oracle.Subject, tmp_path: Path) -> None:
    llm = load(subject, "transformers")
    llm.export(tmp_path / "original", original=True)
    written = load_file(tmp_path / "original" / "model.safetensors")
    stored = load_file(subject.folder / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
