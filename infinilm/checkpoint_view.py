"""A checkpoint as plugins see it: its config without keys that name code, and if the user says so another tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infinilm_hookspecs import Checkpoint, CheckpointError, Config, Quantization, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_OF_THE_MODEL = ("config.json", "generation_config.json")


class CheckpointView:
    """Another checkpoint with a config, and with `tokenizer` the files of that folder instead of its own.

    What configures the model stays the checkpoint's: a tokenizer has no say in what ends a sequence.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, tokenizer: Path | None = None) -> None:
        self.config: Config = config
        self.tensors: Mapping[str, StoredTensor] = checkpoint.tensors
        self.quantization: Quantization | None = checkpoint.quantization
        self.trust: Literal["data", "restricted"] = checkpoint.trust
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"CheckpointView({self._checkpoint!r}, tokenizer={self._tokenizer and str(self._tokenizer)!r})"

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        """Read from the checkpoint; see `infinilm_hookspecs.Checkpoint.read`."""
        self._checkpoint.read(name, region, out)

    def file(self, name: str) -> Path | None:
        """Return the path of a file beside the weights, or beside the tokenizer."""
        if self._tokenizer is None or name in _OF_THE_MODEL:
            return self._checkpoint.file(name)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{str(self._tokenizer)!r}: the file name {name!r} leads out of the folder")
        path = self._tokenizer / name
        return path if path.is_file() else None

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()
