"""Which tensors belong together, as a config and their names say; what is not understood is nothing at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints_made import CONFIG, write_folder

from infinilm.checkpoints._quantization import find_quantization
from infinilm.checkpoints.pytorch_bin import PytorchBinCheckpoint
from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm_hookspecs import Quantization, StoredTensor


def found(quantization_config: Any, **dtypes: str) -> Quantization | None:
    tensors = {name.replace("__", "."): StoredTensor((8, 8), dtype, None) for name, dtype in dtypes.items()}
    return find_quantization({"model_type": "llama", "quantization_config": quantization_config}, tensors)


FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True}


def test_fp8():
    names = {"q__weight": "float8_e4m3fn", "q__weight_scale_inv": "float32", "norm__weight": "bfloat16"}
    groups = {"q.weight": {"weight": "q.weight", "scale": "q.weight_scale_inv"}}
    assert found(FP8, **names) == Quantization("fp8_block", (128, 128), groups)


def test_fp8_with_one_scale_a_tensor():
    names = {"q__weight": "float8_e4m3fn", "q__weight_scale": "float32"}
    groups = {"q.weight": {"weight": "q.weight", "scale": "q.weight_scale"}}
    assert found({"quant_method": "fp8"}, **names) == Quantization("fp8_block", (-1, -1), groups)


def test_fp8_without_its_scale_is_a_group_all_the_same():
    quantization = found(FP8, q__weight="float8_e4m3fn")
    assert quantization is not None
    assert quantization.groups == {"q.weight": {"weight": "q.weight"}}


def test_mxfp4():
    quantization = found({"quant_method": "mxfp4"}, e__down_proj_blocks="uint8", e__down_proj_scales="uint8")
    groups = {"e.down_proj": {"weight": "e.down_proj_blocks", "scale": "e.down_proj_scales"}}
    assert quantization == Quantization("mxfp4", (1, 32, 1), groups)


@pytest.mark.parametrize(
    ("stated", "scheme"),
    [
        ({}, "gptq"),
        ({"checkpoint_format": "gptq"}, "gptq"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"dynamic": {"-:.*gate": {}}}, "gptq"),
    ],
)
def test_gptq(stated, scheme):
    names = {"q__qweight": "int32", "q__qzeros": "int32", "q__scales": "float16", "q__g_idx": "int32"}
    group = {"weight": "q.qweight", "zero": "q.qzeros", "scale": "q.scales", "group": "q.g_idx"}
    assert found({**GPTQ, **stated}, **names) == Quantization(scheme, (1, 128), {"q.weight": group})


def test_awq():
    names = {"q__qweight": "int32", "q__qzeros": "int32", "q__scales": "float16", "q__bias": "float16"}
    group = {"weight": "q.qweight", "zero": "q.qzeros", "scale": "q.scales"}
    assert found(AWQ, **names) == Quantization("awq", (1, 32), {"q.weight": group})


@pytest.mark.parametrize(
    "stated",
    [
        None,
        "fp8",
        [],
        {},
        {"quant_method": None},
        {"quant_method": "hqq", "bits": 4},
        {"quant_method": ["gptq"], "bits": 4},
        {**FP8, "weight_block_size": [128]},
        {**FP8, "weight_block_size": [128, 0]},
        {**FP8, "weight_block_size": [128, True]},
        {**FP8, "weight_block_size": "128x128"},
        {**FP8, "activation_scheme": "static"},
        {**FP8, "expert_dtype": "fp4"},
        {**GPTQ, "bits": 3},
        {**GPTQ, "bits": 8},
        {**GPTQ, "bits": 4.0},
        {**GPTQ, "bits": None},
        {**GPTQ, "group_size": 0},
        {**GPTQ, "group_size": None},
        {**GPTQ, "group_size": "128"},
        {**GPTQ, "checkpoint_format": "marlin"},
        {**GPTQ, "checkpoint_format": ["gptq"]},
        {**GPTQ, "is_marlin_format": True},
        {**GPTQ, "pack_dtype": "int64"},
        {**GPTQ, "dynamic": {".*down_proj": {"bits": 8}}},
        {**GPTQ, "dynamic": 3},
        {**AWQ, "version": "gemv"},
        {**AWQ, "zero_point": False},
        {**AWQ, "bits": 8},
    ],
)
def test_what_is_not_understood_is_no_quantization(stated):
    assert found(stated, q__qweight="int32", q__weight="float8_e4m3fn") is None


def test_checkpoints_have_it(tmp_path):
    config = {**CONFIG, "quantization_config": AWQ}
    tensors = {"q.qweight": torch.zeros(8, 1, dtype=torch.int32)}
    in_safetensors = SafetensorsCheckpoint(write_folder(tmp_path / "a", tensors, config=config))
    folder = write_folder(tmp_path / "b", {}, config=config)
    torch.save(tensors, folder / "pytorch_model.bin")
    in_bin = PytorchBinCheckpoint(folder)
    for checkpoint in (in_safetensors, in_bin):
        assert checkpoint.quantization == Quantization("awq", (1, 32), {"q.weight": {"weight": "q.qweight"}})
        checkpoint.close()


def test_a_checkpoint_that_is_not_quantized_has_none(tmp_path):
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path, {"a": torch.zeros(1)}))
    assert checkpoint.quantization is None
    checkpoint.close()
