"""When the transformers backend is chosen and what it says then, and what it declines, by name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny_checkpoint
from overrides import OVERRIDES
from tiny import tiny_config

from infinilm import LLM
from infinilm.plugins import PluginManager
from infinilm_hookspecs import InfinilmError

OPTIONS: dict[str, Any] = {"platform": "cpu", "dtype": "float32", "max_model_len": 32}


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    """Write the config of a tiny model, and tensors that nobody gets to."""
    tiny_checkpoint.write_model(folder)
    config = tiny_config(model_type, OVERRIDES.get(model_type, {})).to_dict() | {"model_type": model_type} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reason(folder: Path, **options: Any) -> str:
    with pytest.raises(InfinilmError) as raised:
        LLM(folder, **OPTIONS, **options)
    return str(raised.value)


# ---------------------------------------------------------------- which backend is asked when


def test_it_is_asked_after_every_other_backend(pm: PluginManager) -> None:
    assert pm.records[0].name == "transformers"


def test_a_family_with_a_plugin_of_its_own_runs_on_cpu_or_else_on_torch(tmp_path: Path) -> None:
    folder = tiny_checkpoint.write_model(tmp_path)
    has_avx2 = "avx2" in Path("/proc/cpuinfo").read_text()  # without, cpu leaves models to torch
    assert LLM(folder, **OPTIONS).choice.plugin == ("cpu" if has_avx2 else "torch")
    half = {**OPTIONS, "dtype": "float16"}  # which cpu does not compute in
    assert LLM(folder, **half).choice.plugin == "torch"
    assert LLM(folder, plugins=["no:torch"], **half).choice.plugin == "transformers"


def test_it_takes_the_raw_config_of_a_family_that_has_a_plugin(tmp_path: Path) -> None:
    llm = LLM(tiny_checkpoint.write_model(tmp_path), backend="transformers", **OPTIONS)
    assert isinstance(llm.choice.backend.config, Mapping)
    assert llm.choice.backend.config is llm.lineage.last_raw()


def test_plugin_module_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, infinilm.backends.transformers; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- what it says


def test_it_warns_that_it_is_slow_where_nobody_asked_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugins = ["no:llama"]
    with caplog.at_level(logging.INFO, "infinilm"):
        llm = LLM(tiny_checkpoint.write_model(tmp_path), plugins=plugins, **OPTIONS)
    assert llm.choice.plugin == "transformers"
    said = [record for record in caplog.records if "slow choice" in record.message]
    assert [record.levelname for record in said] == ["WARNING"]
    assert "adapt_config" in said[0].message
    assert re.search(r"; cpu declined it: .+; torch declined it: ", said[0].message)


def test_it_only_notes_it_where_it_was_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "infinilm"):
        LLM(tiny_checkpoint.write_model(tmp_path), backend="transformers", **OPTIONS)
    assert [record.levelname for record in caplog.records if "slow choice" in record.message] == ["INFO"]
    assert [record.levelname for record in caplog.records if "on the paged cache" in record.message] == ["INFO"]


# ---------------------------------------------------------------- what it declines


def test_unknown_rope_type(tmp_path: Path) -> None:
    rope = {"rope_type": "spiral", "rope_theta": 10000.0}
    assert "does not know the rope type 'spiral'" in reason(write(tmp_path, "cohere", rope_parameters=rope))


def test_unknown_rope_type_as_transformers_4_writes_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "olmo2", rope_parameters=None, rope_scaling={"type": "spiral", "factor": 2.0})
    assert "does not know the rope type 'spiral'" in reason(folder)


def test_unknown_rope_type_of_one_kind_of_layers(tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "spiral"}}
    assert "does not know the rope type 'spiral'" in reason(write(tmp_path, "gemma3_text", rope_parameters=rope))


def test_unknown_activation(tmp_path: Path) -> None:
    said = reason(write(tmp_path, "cohere", hidden_act="swoosh"))
    assert "transformers" in said
    assert "swoosh" in said


@pytest.mark.parametrize("method", ["hqq", "bitsandbytes", "torchao"])
def test_unknown_quantization(tmp_path: Path, method: str) -> None:
    said = reason(write(tmp_path, "cohere", quantization_config={"quant_method": method, "bits": 3}))
    assert f"no plugin knows how to dequantize this layout of {method!r}" in said


def test_encoder_that_is_not_made_a_decoder(tmp_path: Path) -> None:
    assert "is_decoder=False" in reason(write(tmp_path, "bert", is_decoder=False))


def test_several_streams_of_tokens(tmp_path: Path) -> None:
    assert "several streams of tokens" in reason(write(tmp_path, "moshi"))


def test_sizes_that_do_not_fit_each_other(tmp_path: Path) -> None:
    said = reason(write(tmp_path, "mamba2", num_heads=3))
    assert "transformers cannot read the config of model_type 'mamba2'" in said
    assert "num_heads" in said


def test_family_that_transformers_does_not_have(tmp_path: Path) -> None:
    said = reason(tiny_checkpoint.write_model(tmp_path, model_type="qwen9"))
    assert "no plugin adapts model_type 'qwen9'" in said
    assert "none of transformers' causal language models has the model_type 'qwen9'" in said


def test_transformers_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    said = reason(tiny_checkpoint.write_model(tmp_path), backend="transformers")
    assert "transformers is not installed; run 'pip install transformers'" in said


def test_transformers_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    said = reason(tiny_checkpoint.write_model(tmp_path), backend="transformers")
    assert "transformers 5 or newer is wanted, and 4.57.1 is installed" in said


def test_dtype_it_does_not_compute_in(tmp_path: Path) -> None:
    folder = tiny_checkpoint.write_model(tmp_path)
    options = {**OPTIONS, "dtype": "float8_e4m3fn"}
    with pytest.raises(InfinilmError, match="float8_e4m3fn"):
        LLM(folder, backend="transformers", **options)


def test_model_whose_forward_raises(tmp_path: Path) -> None:
    """A model that runs prompts in ways of its own cannot be run, and that is said before there is a request."""
    oracle.write_checkpoint(tmp_path, tiny_config("reformer", OVERRIDES["reformer"]))
    assert "the model does not run: " in reason(tmp_path)
