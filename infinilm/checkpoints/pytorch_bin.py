"""Hugging Face folders of `pytorch_model.bin`, in one file or sharded, where no safetensors lie.

A `.bin` is a zip archive with a pickle in it, which is read as data: it makes tensors and nothing else. What it says of
them leads to the bytes themselves, which are read in place like those of safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infinilm.checkpoints._files import OpenFiles
from infinilm.checkpoints._folder import file_inside, read_json_object, read_shard_index
from infinilm.checkpoints._quantization import find_quantization
from infinilm.checkpoints._shards import read_shards
from infinilm.checkpoints._torch_archive import ArchivedTensor, read_archive
from infinilm_hookspecs import CheckpointError, Config, Quantization, StoredTensor, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


@hookimpl
def open_checkpoint(source: str) -> PytorchBinCheckpoint | None:
    folder = Path(source)
    if any((folder / name).is_file() for name in _SAFETENSORS):
        return None
    if not any((folder / name).is_file() for name in (_SINGLE, _INDEX)):
        return None
    return PytorchBinCheckpoint(folder)


class PytorchBinCheckpoint:
    """A folder with config.json and files of `torch.save`. Opening reads headers only, and runs nothing they hold."""

    trust: Literal["data", "restricted"] = "restricted"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config = read_json_object(folder / "config.json")
        self._files = OpenFiles()
        try:
            if (folder / _SINGLE).is_file():
                self._archived = self._open_file(folder / _SINGLE)
            else:
                self._archived = read_shards(folder, _INDEX, read_shard_index(folder / _INDEX), self._open_file)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, StoredTensor] = {n: archived.stored() for n, archived in self._archived.items()}
        self.quantization: Quantization | None = find_quantization(self.config, self.tensors)

    def __repr__(self) -> str:
        return f"PytorchBinCheckpoint({str(self.folder)!r})"

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with `region` of the tensor `name`; see `infinilm_hookspecs.Checkpoint.read`."""
        self._archived[name].read(self._files, region, out, name)

    def file(self, name: str) -> Path | None:
        """Return the path of a file of the folder, or `None` when it has none of this name."""
        path = file_inside(self.folder, name)
        return path if path.is_file() else None

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def _open_file(self, path: Path) -> dict[str, ArchivedTensor]:
        saved = read_archive(self._files, path)
        if not isinstance(saved, dict):
            raise CheckpointError(f"{str(path)!r} holds a {type(saved).__name__}, and a state dict is wanted")
        for name, value in saved.items():
            if not isinstance(name, str) or not isinstance(value, ArchivedTensor):
                kind = type(value).__name__
                raise CheckpointError(f"{str(path)!r} has a {kind} for {name!r:.200}, and tensors by name are wanted")
        return dict(saved)
