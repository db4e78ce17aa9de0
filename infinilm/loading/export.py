"""Export: the executed plan run backwards, from parameters to the tensors of a layout they were made from.

Two layouts can be written. The *standard* one is that of the last raw config of the lineage, which transformers and
others read; the *original* one is that of the checkpoint, bit for bit. Everything goes to a temporary folder that is
renamed at the end: there is no half an export.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infinilm.loading.messages import group_messages
from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm.loading.values import restore, torch_dtype
from infinilm_hookspecs import Checkpoint, PlanError
from infinilm_hookspecs.types import StoredTensor

Values = Callable[[PlannedParameter], Tensor]
"""Gives the value of a parameter, whole and on the CPU."""

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside the weights that go along."""

_MAX_SHARD_BYTES = 5_000_000_000


def check_exact(plan: LoadPlan, tensors: Mapping[str, StoredTensor], *, is_reusing: bool) -> None:
    """Raise `PlanError` with every reason why `plan` cannot be run backwards bit for bit.

    `is_reusing` says that what was dropped is copied from elsewhere.
    """
    dropped = {} if is_reusing else plan.dropped
    reasons = [f"{name} was dropped by plugin {plugin}" for name, plugin in dropped.items()]
    files = {stored.extent[0].name if stored.extent else None for stored in tensors.values()}
    if not all(file is not None and file.endswith(".safetensors") for file in files):
        reasons.append("the checkpoint is not in safetensors, which is all that is written")
    for parameter in plan.parameters:
        reasons += [f"{parameter.name} is not what was stored: {loss}" for loss in parameter.losses()]
    if reasons:
        raise PlanError(
            "the original layout cannot be written bit for bit:\n  "
            + "\n  ".join(group_messages(reasons))
            + ("\n  a checkpoint that has what was dropped may be given to reuse (--reuse)" if dropped else "")
        )


def restore_tensors(
    parameters: Sequence[PlannedParameter],
    values: Values,
    tensors: Mapping[str, StoredTensor],
    reuse: Checkpoint | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that `parameters` were made from, each once it is complete.

    Elements that no parameter holds come from `reuse`, and are zero without it.
    """
    waiting = Counter[str](name for p in parameters for name in p.weight.stored_names())
    buffers: dict[str, Tensor] = {}

    def buffer(name: str) -> Tensor:
        if name not in buffers:
            stored = tensors[name]
            buffers[name] = torch.zeros(stored.shape, dtype=torch_dtype(stored.dtype))
            if reuse is not None and name in reuse.tensors:
                reuse.read(name, tuple(slice(0, size) for size in stored.shape), buffers[name])
        return buffers[name]

    for parameter in parameters:
        value = values(parameter).to(torch_dtype(parameter.weight.dtype_name))
        restore(parameter.weight, value, lambda source: buffer(source.name))
        for name in parameter.weight.stored_names():
            waiting[name] -= 1
            if not waiting[name]:
                yield name, buffers.pop(name)
    for name in reuse.tensors if reuse is not None else ():
        if name not in waiting:
            yield name, buffer(name)
            del buffers[name]


@contextmanager
def folder_when_complete(out: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `out` when the body is done. Raises `PlanError` when `out` exists."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PlanError(f"{str(out)!r} exists and is not empty; export to another folder")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_safetensors(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = _MAX_SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards and their index when there is more than `max_shard_bytes`."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors keeps what it writes to itself
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > max_shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        total += size
    if pending or not shards:
        flush()
    _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: Sequence[Sequence[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer and the other files that lie beside the weights."""
    for name in COMPANIONS:
        path = checkpoint.file(name)
        if path is not None:
            shutil.copyfile(path, folder / name)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON a person can read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
