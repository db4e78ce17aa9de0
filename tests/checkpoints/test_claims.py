"""Folders that more than one plugin could open: one claims, or the error says what settles it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints_made import llama_tensors, write_llama
from safetensors.torch import save_file

from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm.pipeline import open_checkpoint
from infinilm.plugins import PluginManager, create_plugin_manager
from infinilm_hookspecs import PluginError, hookimpl

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said of every save by one process


class Other:
    """A plugin that claims every folder."""

    plugin_name = "other"

    @hookimpl
    def open_checkpoint(self, source: str) -> SafetensorsCheckpoint:
        return SafetensorsCheckpoint(Path(source))


def claimed_by(pm: PluginManager, folder: Path) -> str:
    answer = open_checkpoint(pm, str(folder))
    answer.value.close()
    return answer.plugin


@pytest.fixture
def both_layouts(tmp_path: Path) -> Path:
    """A folder in Hugging Face's layout and in Mistral's."""
    write_llama(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    save_file({"norm.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    return tmp_path


@pytest.fixture
def dcp_and_safetensors(tmp_path: Path) -> Iterator[Path]:
    """A folder that a training run left its own checkpoint in, beside the model in safetensors."""
    dcp.save(llama_tensors(), checkpoint_id=tmp_path, no_dist=True)
    return write_llama(tmp_path)


def test_safetensors_before_bin(tmp_path: Path, pm: PluginManager) -> None:
    torch.save(llama_tensors(), write_llama(tmp_path) / "pytorch_model.bin")
    assert claimed_by(pm, tmp_path) == "safetensors"
    (tmp_path / "model.safetensors").unlink()
    assert claimed_by(pm, tmp_path) == "pytorch_bin"


def test_two_that_claim_one_folder_are_named_with_what_settles_it(dcp_and_safetensors: Path) -> None:
    pm = create_plugin_manager()
    with pytest.raises(PluginError) as caught:
        open_checkpoint(pm, str(dcp_and_safetensors))
    message = str(caught.value)
    assert message.startswith(f"open_checkpoint('{dcp_and_safetensors}') is claimed by plugins ")
    assert "'dcp_format'" in message
    assert "'safetensors'" in message
    assert message.endswith("settle it with -p no:dcp_format or -p no:safetensors")


@pytest.mark.parametrize(("blocked", "claims"), [("dcp_format", "safetensors"), ("safetensors", "dcp_format")])
def test_what_the_error_says_settles_it(dcp_and_safetensors: Path, blocked: str, claims: str) -> None:
    assert claimed_by(create_plugin_manager(plugins=[f"no:{blocked}"]), dcp_and_safetensors) == claims


def test_plugin_that_overrides_opens_a_folder_with_both_layouts(both_layouts: Path) -> None:
    assert claimed_by(create_plugin_manager(), both_layouts) == "mistral_format"
    assert claimed_by(create_plugin_manager(autoload=False), both_layouts) == "safetensors"
    assert claimed_by(create_plugin_manager(plugins=["no:mistral_format"]), both_layouts) == "safetensors"


def test_what_the_user_named_beats_the_rest(tmp_path: Path) -> None:
    write_llama(tmp_path)
    assert claimed_by(create_plugin_manager(plugins=[Other()]), tmp_path) == "other"
