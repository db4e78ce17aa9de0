"""Loading into a model of transformers: tables as rules, ties, what is computed, what stays float32, completeness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from overrides import OVERRIDES
from safetensors.torch import load_file
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from infinilm import LLM
from infinilm.backends.transformers.model import LoadedModel
from infinilm.backends.transformers.rules import _Conversion
from infinilm_hookspecs import PlanError

OPTIONS: dict[str, Any] = {"platform": "cpu", "max_model_len": 32, "backend": "transformers", "plugins": []}


def write(folder: Path, model_type: str, **options: Any) -> Path:
    oracle.write_checkpoint(folder, tiny_config(model_type, OVERRIDES.get(model_type, {})), **options)
    return folder


def held(llm: LLM) -> dict[str, torch.Tensor]:
    """Return every parameter of the backend, tied ones too."""
    specs = llm.backend.parameters()
    return {name: llm.backend.destination(spec.tied_to or name) for name, spec in specs.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_mamba", "deepseek_v3", "gpt_oss"])
def test_low_precision_is_that_of_from_pretrained(tmp_path: Path, model_type: str, dtype: str) -> None:
    """Also of what transformers keeps in float32."""
    write(tmp_path, model_type)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).state_dict()
    parameters = held(LLM(tmp_path, dtype=dtype, **OPTIONS))
    assert {name: value.dtype for name, value in parameters.items()} == {k: v.dtype for k, v in loaded.items()}
    assert all(torch.equal(value, loaded[name]) for name, value in parameters.items())


@pytest.mark.parametrize("save_original_format", [True, False])
def test_experts_are_stacked_from_either_layout(tmp_path: Path, save_original_format: bool) -> None:
    write(tmp_path, "olmoe", save_original_format=save_original_format)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("model.layers.0.mlp.experts.0.up_proj.weight" in stored) == save_original_format
    llm = LLM(tmp_path, dtype="float32", **OPTIONS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in held(llm).items())


def test_experts_are_parts_that_no_step_holds_back(tmp_path: Path) -> None:
    llm = LLM(write(tmp_path, "olmoe"), dtype="float32", **OPTIONS)
    stacked = next(one for one in llm.plan.parameters if one.name.endswith("layers.0.mlp.experts.gate_up_proj"))
    assert len(stacked.weight.pieces) == 8  # four experts, a gate and an up projection each
    assert all(piece.source.deferred is None for piece in stacked.weight.pieces)
    assert stacked.losses() == ()


def test_export_writes_what_was_stored(tmp_path: Path) -> None:
    folder = write(tmp_path / "stored", "olmoe")
    LLM(folder, dtype="float32", **OPTIONS).export(tmp_path / "out")
    stored, written = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "out"))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda stored: {k: v for k, v in stored.items() if ".experts.2." not in k}, r"gate_up_proj is \[3, 96, 64\]"),
        (lambda stored: {k: v for k, v in stored.items() if "q_norm" not in k}, "q_norm.weight is missing"),
        (lambda stored: {**stored, "model.extra.weight": torch.ones(2)}, "model.extra.weight .* no parameter"),
        (lambda stored: {**stored, "lm_head.weight": stored["lm_head.weight"][:9]}, r"lm_head.weight is \[9, 64\]"),
        (
            lambda stored: {**stored, "model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 96, 64)},
            "both become model.layers.0.mlp.experts.gate_up_proj in transformers' tables",
        ),
    ],
    ids=["expert", "norm", "extra", "shape", "twice"],
)
def test_checkpoint_that_does_not_fit_is_told_before_the_load(tmp_path: Path, mistake: Any, message: str) -> None:
    oracle.edit_tensors(write(tmp_path, "olmoe"), mistake)
    with pytest.raises(PlanError, match=message):
        LLM(tmp_path, dtype="float32", **OPTIONS)


def test_stored_frequencies_of_old_checkpoints_are_dropped_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    oracle.edit_tensors(write(tmp_path, "olmo2"), lambda stored: {**stored, name: torch.ones(8)})
    assert LLM(tmp_path, dtype="float32", **OPTIONS).plan.dropped == {name: "transformers"}


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    write(tmp_path, "olmo2")
    wanted = held(LLM(tmp_path, dtype="float32", **OPTIONS))
    oracle.edit_tensors(tmp_path, lambda stored: {k.removeprefix("model."): v for k, v in stored.items()})
    found = held(LLM(tmp_path, dtype="float32", **OPTIONS))
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


# ---------------------------------------------------------------- what no checkpoint holds


def test_buffers_are_computed_as_transformers_computes_them(tmp_path: Path) -> None:
    write(tmp_path, "gemma3_text")
    llm = LLM(tmp_path, dtype="float32", **OPTIONS)
    wanted = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    found = dict(llm.backend._model.module.named_buffers())  # type: ignore[attr-defined]
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


class Forgetful(nn.Module):
    """A model with a buffer that its initialization leaves alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.device("meta"):
            self.register_buffer("table", torch.zeros(3, dtype=dtype), persistent=False)

    all_tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  # as transformers has it

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {}

    def initialize_weights(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_buffer_that_nobody_computes_is_named(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("infinilm.backends.transformers.model._build", lambda family, _: Forgetful(dtype))
    model = LoadedModel(None, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="leaves 1 tensors without values that no checkpoint holds: table"):
        model.finish()


def test_parameters_on_no_device_before_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[LoadedModel] = []
    monkeypatch.setattr("infinilm.backends.transformers.backend.try_out", lambda *arguments: pytest.fail("loaded"))
    start = LoadedModel.__init__

    def remember(self: LoadedModel, *arguments: Any) -> None:
        start(self, *arguments)
        built.append(self)

    monkeypatch.setattr(LoadedModel, "__init__", remember)
    oracle.edit_tensors(write(tmp_path, "olmo2"), lambda stored: {})
    with pytest.raises(PlanError):
        LLM(tmp_path, dtype="float32", **OPTIONS)
    assert all(parameter.is_meta for parameter in built[0].module.parameters())


# ---------------------------------------------------------------- quantized checkpoints


def as_fp8(stored: oracle.Stored) -> oracle.Stored:
    """Return the projections as one block of float8 each, with its scale."""
    made: oracle.Stored = {}
    for name, value in stored.items():
        if not name.endswith("_proj.weight"):
            made[name] = value
            continue
        scale = value.abs().max() / 448
        made |= {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
    return made


def test_weights_that_a_plugin_dequantizes(tmp_path: Path) -> None:
    """Experts among them are stacked from what the dequantizer makes of each."""
    write(tmp_path, "olmoe")
    plain = load_file(tmp_path / "model.safetensors")
    oracle.edit_tensors(tmp_path, as_fp8)
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    oracle.edit_config(tmp_path, lambda config: {**config, "quantization_config": quantized})
    parameters = held(LLM(tmp_path, dtype="float32", **OPTIONS))
    for expert in range(4):
        gate, up = parameters["model.layers.1.mlp.experts.gate_up_proj"][expert].chunk(2)
        for part, found in (("gate", gate), ("up", up)):
            wanted = plain[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
            assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


class Drawing(nn.Module):
    """A model that lets two parameters be missing: it computes one and draws the other."""

    base_model_prefix = "model"
    all_tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  # as transformers has it
    _keys_to_ignore_on_load_unexpected = None
    _keys_to_ignore_on_load_missing = ("weight",)

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.computed, self.drawn = nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)

    def _init_weights(self, module: nn.Linear) -> None:
        module.weight.copy_(torch.eye(2) if module.out_features == 2 else torch.randn(3, 2))


def test_what_would_be_drawn_at_random_stays_missing() -> None:
    assert _Conversion(Drawing(), []).run({}).keys() == {"computed.weight"}
