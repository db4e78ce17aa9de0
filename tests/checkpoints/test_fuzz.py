"""Damaged files, by the hundred: opened and read as safetensors' own reader would, or refused. Never anything else."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from infinilm.pipeline import open_checkpoint
from infinilm.plugins import PluginManager
from infinilm_hookspecs import Checkpoint, InfinilmError

SECONDS = 6.0
TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5).to(torch.int8), "c": torch.zeros(0, 2)}
INTERESTING = [b"\x00", b"\xff", b'"', b"{", b"}", b"[", b"]", b"9", b"-", b"/", b"..", b"\\u0000", b"1e9", b"null"]


def damage(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with a few bytes changed, taken out, put in or repeated."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = (
            chance.randrange(len(changed) + 1)
            if chance.random() < 0.5
            else chance.randrange(min(len(changed), 200) + 1)
        )
        kind = chance.random()
        if kind < 0.4:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind < 0.6:
            changed[at:at] = chance.choice(INTERESTING)
        elif kind < 0.8:
            del changed[at : at + chance.randint(1, 30)]
        else:
            changed[at:at] = changed[at : at + chance.randint(1, 30)]
    return bytes(changed)


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    found = {}
    for name, stored in checkpoint.tensors.items():
        found[name] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        checkpoint.read(name, tuple(slice(0, size) for size in stored.shape), found[name])
    return found


def check_opened_or_refused(pm: PluginManager, folder: Path) -> bool:
    """Open and read a folder, and hold what is read against safetensors' reader. Return whether it was opened."""
    started = time.perf_counter()
    try:
        checkpoint = open_checkpoint(pm, str(folder)).value
    except InfinilmError:
        return False
    else:
        found = read_all(checkpoint)
        checkpoint.close()
    finally:
        assert time.perf_counter() - started < 2, "a damaged file must not take its reader's time"
    expected: dict[str, torch.Tensor] = {}
    for file in {stored.extent[0] for stored in checkpoint.tensors.values() if stored.extent}:
        try:
            expected |= load_file(file)
        except SafetensorError as err:
            pytest.fail(f"opened what safetensors refuses: {err}")
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))
    return True


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_damaged_file_is_read_right_or_refused(pm: PluginManager, tmp_path: Path, file: str) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 8, "nested": {"x": [1, 2]}})
    )
    if file.endswith("index.json"):
        (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
        weight_map = dict.fromkeys(TENSORS, "part.safetensors")
        (tmp_path / file).write_text(json.dumps({"metadata": {"total_size": 53}, "weight_map": weight_map}))
    sound = (tmp_path / file).read_bytes()
    assert check_opened_or_refused(pm, tmp_path)
    chance = random.Random(20261122)
    stop = time.perf_counter() + SECONDS / 3
    num_opened = num_tried = 0
    while time.perf_counter() < stop and num_tried < 3000:
        (tmp_path / file).write_bytes(damage(sound, chance))
        num_opened += check_opened_or_refused(pm, tmp_path)
        num_tried += 1
    assert 0 < num_opened < num_tried
