"""`.metadata`: a pickle of torch/distributed/checkpoint/metadata.py, read as data.

Nothing of torch.distributed is imported for it, and nothing else can be: what the pickle may name is listed here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infinilm.checkpoints import Inert, file_inside, load_restricted
from infinilm.loading.coverage import find_hole_or_overlap
from infinilm_hookspecs import CheckpointError
from infinilm_hookspecs.dtypes import ITEM_SIZES

Sizes = tuple[int, ...]

_MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where the file of `torch.save` that holds it lies."""

    offsets: Sizes
    sizes: Sizes
    path: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor and the chunks that it consists of."""

    shape: Sizes
    dtype: str
    chunks: tuple[Chunk, ...]


def read_metadata(path: Path) -> dict[str, ChunkedTensor]:
    """Return the model's tensors by name.

    Training saves `{"model": ..., "optimizer": ...}` as a rule, and then the model is what lies under "model";
    otherwise it is everything. Raises `CheckpointError` for a pickle that asks for more than these classes, for paths
    that lead out of the folder, and for chunks that leave a hole, overlap or are nowhere.
    """
    where = repr(str(path))
    metadata = load_restricted(
        path.read_bytes(),
        NAMES,
        where=where,
        way_out="it may run code. Get the checkpoint from somebody you trust, or as safetensors",
    )
    try:
        return dict(_tensors(metadata, path.parent))
    except CheckpointError as err:
        raise CheckpointError(f"{where}: {err}") from err
    except (ValueError, LookupError, TypeError, AttributeError) as err:  # what nonsense leads to
        raise CheckpointError(f"{where} is no metadata of a checkpoint: {type(err).__name__}: {err}") from err


def _tensors(metadata: Any, folder: Path) -> Iterator[tuple[str, ChunkedTensor]]:
    stored: Mapping[str, Any] = metadata.field("state_dict_metadata")
    lies_at = {_key(index): info for index, info in metadata.field("storage_data").items()}
    for name, entry in _names(stored, metadata.field("planner_data", None)).items():
        tensor = stored[entry]
        if not isinstance(tensor, TensorStorage):
            continue  # a number, or what a module keeps beside its weights: `_extra_state`
        shape, dtype = _sizes(tensor.field("size")), tensor.field("properties").dtype
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise CheckpointError(f"{name} has the dtype {reprlib.repr(dtype)}; known: {', '.join(ITEM_SIZES)}")
        chunks = tuple(_chunk(name, entry, chunk, lies_at, folder) for chunk in tensor.field("chunks"))
        _check_chunks(name, shape, chunks)
        yield name, ChunkedTensor(shape, dtype, chunks)


def _names(stored: Mapping[str, Any], paths: Any) -> dict[str, str]:
    """Return the entry of every name. `paths` says how a nested state dict was made flat."""
    nested: dict[str, str] = {}
    for entry, path in (paths or {}).items():
        if not isinstance(path, tuple) or not all(isinstance(step, str | int) for step in path):
            raise CheckpointError(f"the path of {entry} is {reprlib.repr(path)}")
        if len(path) > 1 and path[0] == "model" and entry in stored:
            name = ".".join(map(str, path[1:]))
            if name in nested:
                raise CheckpointError(f"{entry} and {nested[name]} are both called {name}")
            nested[name] = entry
    return nested or {entry: entry for entry in stored}


def _key(index: Any) -> tuple[str, Sizes | None]:
    """Return what a chunk is looked up by. Numbers (`BytesStorageMetadata`) have no offset."""
    name, offset = index.field("fqn"), index.field("offset", None)
    if not isinstance(name, str):
        raise CheckpointError(f"a tensor is called {reprlib.repr(name)}")
    return name, None if offset is None else _sizes(offset)


def _chunk(name: str, entry: str, chunk: Any, lies_at: Mapping[tuple[str, Sizes | None], Any], folder: Path) -> Chunk:
    offsets = _sizes(chunk.field("offsets"))
    info = lies_at.get((entry, offsets))
    if info is None:
        raise CheckpointError(f"the chunk of {name} at {list(offsets)} lies nowhere")
    if info.field("transform_descriptors", None):
        raise CheckpointError(f"{name} was compressed or encrypted as it was saved; save it without extensions")
    path = file_inside(folder, info.field("relative_path"))
    start, length = _sizes((info.field("offset"), info.field("length")))
    return Chunk(offsets, _sizes(chunk.field("sizes")), path, start, length)


def _check_chunks(name: str, shape: Sizes, chunks: tuple[Chunk, ...]) -> None:
    """Raise `CheckpointError` unless the chunks make up the tensor, every element once."""
    for chunk in chunks:
        spans = zip(chunk.offsets, chunk.sizes, shape, strict=False)
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) or any(a + n > m for a, n, m in spans):
            raise CheckpointError(f"a chunk of {name} is {list(chunk.sizes)} at {list(chunk.offsets)} of {list(shape)}")
    boxes = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in chunks]
    problem = find_hole_or_overlap(boxes, shape)
    if problem is not None:
        raise CheckpointError(f"{name} {problem}; was a rank's part left behind?")


def _sizes(value: Any) -> Sizes:
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise CheckpointError(f"a size is {reprlib.repr(value)}")
    if not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise CheckpointError(f"a size is {reprlib.repr(value)}")
    return tuple(value)


# ---------------------------------------------------------------- what the pickle may name


class TensorStorage(Inert):
    """`TensorStorageMetadata`."""


class TensorProperties(Inert):
    """`TensorProperties`, whose state is a tuple that begins with the dtype."""

    @property
    def dtype(self) -> Any:
        """The name of the dtype."""
        return self.state[0] if isinstance(self.state, tuple) else self.field("dtype")


_METADATA = "torch.distributed.checkpoint.metadata"
NAMES = {
    **{
        (_METADATA, name): type(name, (Inert,), {})
        for name in ("Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta")
    },
    (_METADATA, "TensorStorageMetadata"): TensorStorage,
    (_METADATA, "TensorProperties"): TensorProperties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): Inert,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): type("_StorageInfo", (Inert,), {}),
    ("torch.serialization", "_get_layout"): Inert,
    ("torch", "Size"): _sizes,
    **{("torch", dtype): dtype for dtype in ITEM_SIZES},
    # where it was saved to
    **{(module, name): Inert for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
    ("builtins", "getattr"): Inert,  # how Python 3.11.0 to 3.11.3 pickled an enum
}
