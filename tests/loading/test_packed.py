"""Quantized weights for a backend that runs them as they are stored: the parts go to it untouched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm.loading import dequantize
from infinilm.loading.execute import load
from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.stages import Stage
from infinilm_hookspecs import ParameterSpec, PlanError, Quantization, StoredTensor, Weight, WeightRule

STORED = {
    "h.0.up.qweight": torch.arange(8 * 16, dtype=torch.int32).reshape(8, 16),
    "h.0.up.qzeros": torch.arange(2 * 2, dtype=torch.int32).reshape(2, 2),
    "h.0.up.scales": torch.arange(2 * 16, dtype=torch.float16).reshape(2, 16),
    "h.0.norm": torch.ones(64),
}
GROUP = {"weight": "h.0.up.qweight", "zero": "h.0.up.qzeros", "scale": "h.0.up.scales"}
GPTQ = Quantization("gptq", (1, 32), {"h.0.up": GROUP})
NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
PACKED = {
    f"{NAME}:weight": ParameterSpec((8, 16), "int32"),
    f"{NAME}:zero": ParameterSpec((2, 2), "int32"),
    f"{NAME}:scale": ParameterSpec((2, 16), "float16"),
    NORM: ParameterSpec((64,), "float32"),
}


def rename(weight: Weight) -> Weight:
    return weight.rename(NAME if weight.name == "h.0.up" else NORM)


def plan(parameters: dict[str, ParameterSpec], rule: WeightRule = rename) -> LoadPlan:
    tensors = {
        name: StoredTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), None)
        for name, value in STORED.items()
    }
    return plan_load(tensors, [Stage(rule, "acme")], parameters, GPTQ)


def test_parts_are_loaded_as_they_are_stored_and_nothing_is_dequantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*values: Tensor, **options: object) -> Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(dequantize, "gptq", never)
    save_file(STORED, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "acme"}')
    buffers = {name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in PACKED.items()}
    backend = SimpleNamespace(destination=buffers.__getitem__, loaded=lambda name: None, finish_loading=lambda: None)
    made = plan(PACKED)
    assert made.errors == ()
    assert [parameter.losses() for parameter in made.parameters] == [()] * 4
    load(made, SafetensorsCheckpoint(tmp_path), backend)
    for role, stored in GROUP.items():
        assert torch.equal(buffers[f"{NAME}:{role}"], STORED[stored]), role


def test_backend_that_asks_for_the_weight_gets_it_dequantized() -> None:
    made = plan({NAME: ParameterSpec((16, 64), "float16"), NORM: PACKED[NORM]})
    assert made.errors == ()
    assert "dequantized from gptq" in made.parameters[0].losses()


def test_part_that_is_not_asked_for_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"up_proj.weight:zero \[2, 2\] from h.0.up.qzeros is no parameter"):
        plan({name: spec for name, spec in PACKED.items() if "zero" not in name}).check()


def test_weight_that_a_rule_changed_is_not_what_its_parts_make() -> None:
    def halve(weight: Weight) -> Weight:
        renamed = rename(weight)
        return renamed[:8] if renamed.name == NAME else renamed

    with pytest.raises(
        PlanError, match=r"up_proj.weight is asked for as it is packed, and .* a weight rule changed it"
    ):
        plan(PACKED, halve).check()


def test_weight_that_is_stored_plainly_has_no_parts() -> None:
    with pytest.raises(PlanError, match=r"norm.weight is asked for as it is packed"):
        plan({**PACKED, f"{NORM}:weight": PACKED[NORM]}).check()
