"""Folders in Mistral's layout: one `consolidated.safetensors`, or shards of it with or without an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infinilm.checkpoints import DerivedFiles, OpenFiles, file_inside, read_json_object, read_shard_index, read_shards
from infinilm.checkpoints.safetensors import read_header
from infinilm_hookspecs import CheckpointError, Config, Quantization, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "consolidated.safetensors", "consolidated.safetensors.index.json"
SHARD = re.compile(r"consolidated-(\d+)-of-(\d+)\.safetensors")
SENTENCEPIECE = re.compile(r"tokenizer\.model(\.v\d+(m\d+)?)?")


def is_mistral(source: str) -> bool:
    """Return whether a transformer in this layout lies in the folder `source`."""
    folder = Path(source)
    if not (folder / "params.json").is_file():
        return False
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)) and not shards_in(folder):
        return False
    kind: object = read_json_object(folder / "params.json").get("model_type", "transformer")
    return kind == "transformer"


def shards_in(folder: Path) -> list[str]:
    """Return the names of the shards, sorted."""
    return sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name))


class MistralCheckpoint:
    """A folder with params.json and consolidated safetensors. Opening reads headers only."""

    quantization: Quantization | None = None
    trust: Literal["data", "restricted"] = "data"

    def __init__(self, source: str) -> None:
        self.folder = folder = Path(source)
        self.config: Config = {**read_json_object(folder / "params.json"), "model_type": "mistral_native"}
        self.tensors: Mapping[str, StoredTensor] = {}
        self._files = OpenFiles()
        self._derived = DerivedFiles()
        try:
            if (folder / SINGLE).is_file():
                self.tensors = self._open_file(folder / SINGLE)
            elif (folder / INDEX).is_file():
                self.tensors = read_shards(folder, INDEX, read_shard_index(folder / INDEX), self._open_file)
            else:
                self.tensors = self._open_shards(shards_in(folder))
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"MistralCheckpoint({str(self.folder)!r})"

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with `region` of the tensor `name`; see `infinilm_hookspecs.Checkpoint.read`."""
        self._files.read_region(self.tensors[name], region, out, name)

    def file(self, name: str) -> Path | None:
        """Return the path of a file of the folder, or `None` when it has none of this name.

        The tokenizer is this layout's own, whatever lies beside it: a `tekken.json` is shown as the `tokenizer.json`
        that it amounts to, and the newest sentencepiece model as `tokenizer.model`.
        """
        path = file_inside(self.folder, name)
        tekken, pieces = self.folder / "tekken.json", self._sentencepiece_model()
        if name == "tokenizer.json" and tekken.is_file():
            return self._derived.path(name, lambda: _convert(tekken))
        if name == "tokenizer_config.json" and tekken.is_file() and not path.is_file():
            return self._derived.path(name, lambda: json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        if name == "tokenizer.model":
            return pieces
        if name == "tokenizer.json" and pieces is not None:
            return None
        return path if path.is_file() else None

    def close(self) -> None:
        """Close every file, and remove those that were made."""
        self._files.close()
        self._derived.close()

    def _sentencepiece_model(self) -> Path | None:
        found = [path for path in self.folder.iterdir() if SENTENCEPIECE.fullmatch(path.name)]
        return max(found, key=lambda path: path.name, default=None)

    def _open_file(self, path: Path) -> dict[str, StoredTensor]:
        self._files.open(path)
        return read_header(path, self._files.descriptor(path))

    def _open_shards(self, names: list[str]) -> dict[str, StoredTensor]:
        """Open shards that no index names: there must be as many as each of them says."""
        totals = {int(match[2]) for name in names if (match := SHARD.fullmatch(name))}
        numbers = [int(match[1]) for name in names if (match := SHARD.fullmatch(name))]
        if len(totals) != 1 or numbers != list(range(1, max(totals) + 1)):
            raise CheckpointError(
                f"{str(self.folder)!r} has {len(names)} of the shards {names[0]}, ...; is the download complete?"
            )
        opened = {name: self._open_file(self.folder / name) for name in names}
        weight_map = {tensor: file for file, tensors in opened.items() for tensor in tensors}
        return read_shards(self.folder, "the headers", weight_map, lambda path: opened[path.name])


def _convert(tekken: Path) -> str:
    from infinilm_mistral_format.tekken import to_tokenizer_json  # kept, with `tokenizers`, out of a load without text

    return to_tokenizer_json(tekken)
