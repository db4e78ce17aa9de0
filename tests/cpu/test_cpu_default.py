"""The cpu backend as what nobody asked for: who runs a model on a CPU when `--backend` is not given."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cpu_library import isas
from safetensors.torch import load_file
from tiny_checkpoint import write_model

from infinilm import LLM
from infinilm_hookspecs import PlanError


def inspect(folder, *options, isa=None):
    environment = {**os.environ, "INFINILM_CPU_ISA": isa or ""}
    program = "import sys; from infinilm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "inspect", str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_it_is_taken_before_torch_where_there_are_vectors(tmp_path):
    with LLM(write_model(tmp_path)) as llm:
        assert llm.choice.plugin == ("cpu" if len(isas()) > 1 else "torch")
        assert [it.name for it in llm.choice.declined] == ([] if len(isas()) > 1 else ["cpu"])


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_torch_has_what_it_does_not_run(tmp_path, dtype):
    with LLM(write_model(tmp_path), dtype=dtype) as llm:
        assert llm.choice.plugin == "torch"
        assert [(it.name, dtype in it.reason) for it in llm.choice.declined] == [("cpu", True)]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_float16_model_is_quantized_without_another_word(tmp_path, quantization):
    with LLM(write_model(tmp_path), backend="cpu", dtype="float16", quantization=quantization) as llm:
        assert {parameter.spec.dtype for parameter in llm.plan.parameters} == {"float32"}
        assert llm.generate([{"prompt_token_ids": [3, 1, 4]}])[0].outputs[0].token_ids


def test_torch_is_taken_where_there_are_no_vectors(tmp_path):
    shown = inspect(write_model(tmp_path), isa="scalar")
    assert "torch" in shown
    assert "cpu declined: this processor lacks AVX2, and without it torch is faster; --backend cpu" in shown


def test_who_names_it_gets_it_without_vectors(tmp_path):
    shown = inspect(write_model(tmp_path), "--backend", "cpu", isa="scalar")
    assert "lacks AVX2" not in shown
    assert "torch" not in shown


def test_export_reads_again_what_was_packed(tmp_path):
    """Through torch, and with the values of the checkpoint, not the levels that they were rounded to."""
    folder = write_model(tmp_path / "model")
    with LLM(folder, backend="cpu", quantization="int8") as llm:
        assert llm.choice.plugin == "cpu"
        llm.export(tmp_path / "out", original=True)
    ours, theirs = (load_file(it / "model.safetensors") for it in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_export_says_when_nobody_can_read_it_again(tmp_path):
    with LLM(write_model(tmp_path / "model"), backend="cpu", plugins=["no:torch", "no:transformers"]) as llm:
        with pytest.raises(
            PlanError, match=r"'cpu' packs its parameters .* no other can be loaded to: no backend runs"
        ):
            llm.export(tmp_path / "out")
        assert not (tmp_path / "out").exists()
