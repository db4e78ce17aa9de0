"""A GGUF file as a checkpoint: plain types where they lie, quantized ones through `gguf`'s dequantizer, by blocks."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infinilm.checkpoints import DerivedFiles, OpenFiles, contiguous_runs
from infinilm_gguf_format.header import MAGIC, TensorInfo, read_header
from infinilm_hookspecs import CheckpointError, Config, Quantization, StoredTensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from torch import Tensor

_PLAIN = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
}
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", ".metadata")
_BLOCKS_AT_ONCE = 1 << 16
_MAX_FREQUENCIES = 4096  # of rope_freqs.weight: half a head


def find_file(source: str) -> Path | None:
    """Return the GGUF file that `source` is, or the one that lies in the folder `source`.

    Raises `CheckpointError` for a folder with several and with no other weights.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1 and not any(any(path.glob(pattern)) for pattern in _OTHER_WEIGHTS):
            raise CheckpointError(f"{source!r} holds {', '.join(file.name for file in found[:6])}; give one of them")
        return found[0] if len(found) == 1 else None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(len(MAGIC)) == MAGIC else None


class GgufCheckpoint:
    """One GGUF file. Opening reads its header, and the frequency factors of its rotary embedding if it has some."""

    quantization: Quantization | None = None  # blocks are dequantized as they are read
    trust: Literal["data", "restricted"] = "data"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = OpenFiles()
        self._derived = DerivedFiles()
        try:
            header = read_header(self._files, path)
            self._infos = header.tensors
            self.tensors: Mapping[str, StoredTensor] = {
                name: _stored(path, name, info) for name, info in self._infos.items()
            }
            self._tokenizer = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.")}
            self.config: Config = self._describe(header.metadata)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"GgufCheckpoint({str(self.path)!r})"

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with `region` of the tensor `name`; see `infinilm_hookspecs.Checkpoint.read`."""
        if self.tensors[name].extent is not None:
            self._files.read_region(self.tensors[name], region, out, name)
        else:
            self._read_blocks(name, self._infos[name], region, out)

    def file(self, name: str) -> Path | None:
        """Return the path of a file that the metadata amounts to, or `None` when it has nothing of the kind."""
        if name == "tokenizer.json" and ("tokenizer.ggml.model" in self._tokenizer or _has_json(self._tokenizer)):
            return self._derived.path(name, lambda: _convert("tokenizer_json", self._tokenizer, self.path))
        if name == "tokenizer_config.json" and self._tokenizer:
            return self._derived.path(name, lambda: _convert("tokenizer_config_json", self._tokenizer, self.path))
        return None

    def close(self) -> None:
        """Close the file, and remove those that were made."""
        self._files.close()
        self._derived.close()

    def _describe(self, metadata: Mapping[str, Any]) -> Config:
        """Return the metadata without the tokenizer, and what the tensors alone can tell."""
        if metadata.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{str(self.path)!r} is one of {metadata['split.count']} parts; make one file of them: "
                "llama-gguf-split --merge FIRST OUT"
            )
        described: dict[str, Any] = {k: v for k, v in metadata.items() if not isinstance(v, list) or len(v) < 1024}
        described = {key: value for key, value in described.items() if not key.startswith("tokenizer.chat_template")}
        if "token_embd.weight" in self._infos:
            described["vocab_size"] = self._infos["token_embd.weight"].shape[0]
        described["tensors"] = {
            "output": "output.weight" in self._infos,
            "biases": "blk.0.attn_output.bias" in self._infos,
            "rope_freqs": self._frequency_factors(),
        }
        return {**described, "model_type": "gguf"}

    def _frequency_factors(self) -> tuple[float, ...] | None:
        info = self._infos.get("rope_freqs.weight")
        if info is None:
            return None
        count = info.num_bytes // 4
        if info.kind.name != "F32" or count > _MAX_FREQUENCIES:
            raise CheckpointError(f"{str(self.path)!r}: rope_freqs.weight is {list(info.shape)} {info.kind.name}")
        data = self._files.read(self.path, info.start, 4 * count, "tensor 'rope_freqs.weight'")
        return struct.unpack(f"<{count}f", data)

    def _read_blocks(self, name: str, info: TensorInfo, region: tuple[slice, ...], out: Tensor) -> None:
        """Read the blocks that `region` lies in, some rows at a time, and keep what it has of them."""
        import numpy
        from gguf import GGML_QUANT_SIZES, dequantize

        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        columns = region[-1]
        blocks = slice(columns.start // block, -(-columns.stop // block))
        width = blocks.stop - blocks.start  # blocks of a row
        wanted = slice(columns.start - blocks.start * block, columns.stop - blocks.start * block)
        in_blocks = (*info.shape[:-1], info.shape[-1] // block)
        values = out.view(-1).numpy()
        done = 0
        for first, count in contiguous_runs(in_blocks, (*region[:-1], blocks)):
            step = max(1, _BLOCKS_AT_ONCE // width) * width
            for at in range(first, first + count, step):
                length = min(step, first + count - at)
                data = self._files.read(
                    self.path, info.start + at * block_bytes, length * block_bytes, f"tensor {name!r}"
                )
                packed = numpy.frombuffer(data, dtype=numpy.uint8).reshape(-1, width * block_bytes)
                rows = dequantize(packed, info.kind)[:, wanted]
                values[done : done + rows.size] = rows.reshape(-1)
                done += rows.size


def _stored(path: Path, name: str, info: TensorInfo) -> StoredTensor:
    if info.kind.name in _PLAIN:
        return StoredTensor(info.shape, _PLAIN[info.kind.name], (path, info.start, info.num_bytes))
    if not _has_dequantizer(info.kind):
        raise CheckpointError(f"{str(path)!r}: gguf cannot dequantize {name!r:.80}, which is {info.kind.name}")
    return StoredTensor(info.shape, "float32", None)


def _has_dequantizer(kind: GGMLQuantizationType) -> bool:
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize

    with suppress(NotImplementedError):
        dequantize(numpy.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=numpy.uint8), kind)
        return True
    return False


def _has_json(metadata: Mapping[str, Any]) -> bool:
    return "tokenizer.huggingface.json" in metadata


def _convert(what: str, metadata: Mapping[str, Any], path: Path) -> str:
    from infinilm_gguf_format import tokenizer  # kept, with `tokenizers`, out of a load without text

    try:
        text: str = getattr(tokenizer, what)(metadata)
    except CheckpointError as err:
        raise CheckpointError(f"{str(path)!r}: {err}; take another tokenizer with --tokenizer") from err
    return text
