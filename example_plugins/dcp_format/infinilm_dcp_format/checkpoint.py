"""A folder of torch.distributed.checkpoint: tensors in chunks, put together as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infinilm.checkpoints import ArchivedTensor, OpenFiles, file_inside, read_archive, read_json_object
from infinilm_dcp_format.metadata import Chunk, ChunkedTensor, read_metadata
from infinilm_hookspecs import CheckpointError, Config, Quantization, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor


class DcpCheckpoint:
    """A folder with `.metadata`, `*.distcp` and the model's config.json. Opening reads `.metadata` only."""

    quantization: Quantization | None = None
    trust: Literal["data", "restricted"] = "restricted"

    def __init__(self, source: str) -> None:
        self.folder = folder = Path(source)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{source!r} has no config.json: torch.distributed.checkpoint stores tensors alone. Put the model's "
                "config.json beside .metadata, and its tokenizer.json"
            )
        self.config: Config = read_json_object(folder / "config.json")
        self._chunked = read_metadata(folder / ".metadata")
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(tensor.shape, tensor.dtype, None) for name, tensor in self._chunked.items()
        }
        self._archived: dict[Chunk, ArchivedTensor] = {}
        self._files = OpenFiles()
        try:
            self._open_files()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"DcpCheckpoint({str(self.folder)!r})"

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with `region` of the tensor `name`, from as many chunks as it takes."""
        tensor = self._chunked[name]
        for chunk in tensor.chunks:
            inside, target = _overlap(chunk, region)
            if not all(s.start < s.stop for s in inside):
                continue
            archived = self._open_chunk(name, tensor, chunk)
            part = out[target]
            if part.is_contiguous():
                archived.read(self._files, inside, part, name)
            else:
                copy = part.new_empty(part.shape)
                archived.read(self._files, inside, copy, name)
                part.copy_(copy)

    def file(self, name: str) -> Path | None:
        """Return the path of a file of the folder, or `None` when it has none of this name."""
        path = file_inside(self.folder, name)
        return path if path.is_file() else None

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def _open_files(self) -> None:
        """Open every file that has chunks. Raises `CheckpointError` for one that is missing, or too short for them."""
        sizes: dict[Path, int] = {}
        for name, tensor in self._chunked.items():
            for chunk in tensor.chunks:
                if chunk.path not in sizes:
                    sizes[chunk.path] = self._files.open(chunk.path)
                if chunk.start + chunk.length > sizes[chunk.path] and 0 not in chunk.sizes:
                    raise CheckpointError(
                        f"{str(chunk.path)!r} has {sizes[chunk.path]} bytes, and {name} has a chunk at byte "
                        f"{chunk.start} of {chunk.length}; is it truncated?"
                    )

    def _open_chunk(self, name: str, tensor: ChunkedTensor, chunk: Chunk) -> ArchivedTensor:
        if chunk not in self._archived:
            saved = read_archive(self._files, chunk.path, chunk.start, chunk.length)
            found = f"{list(saved.shape)} {saved.dtype}" if isinstance(saved, ArchivedTensor) else type(saved).__name__
            wanted = f"{list(chunk.sizes)} {tensor.dtype}"
            if found != wanted:
                raise CheckpointError(
                    f"{str(chunk.path)!r} holds {found} at byte {chunk.start}, and .metadata says {wanted}, of {name}"
                )
            self._archived[chunk] = saved
        return self._archived[chunk]


def _overlap(chunk: Chunk, region: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return what a chunk has of `region`: the box inside the chunk, and inside the region."""
    inside, target = [], []
    for offset, size, wanted in zip(chunk.offsets, chunk.sizes, region, strict=True):
        start, stop = max(offset, wanted.start), min(offset + size, wanted.stop)
        inside.append(slice(start - offset, stop - offset))
        target.append(slice(start - wanted.start, stop - wanted.start))
    return tuple(inside), tuple(target)
