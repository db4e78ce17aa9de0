"""Checkpoints in several files: what an index says lies where, held against what does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from infinilm.checkpoints._folder import file_inside
from infinilm_hookspecs import CheckpointError

T = TypeVar("T")

_MAX_SHOWN = 5


def read_shards(
    folder: Path, index: str, weight_map: Mapping[str, str], open_file: Callable[[Path], Mapping[str, T]]
) -> dict[str, T]:
    """Return the tensors of all files that `weight_map`, from the file `index`, names.

    Raises `CheckpointError` for a file that is missing or leads out of the folder, for a tensor in two files, and for
    every tensor that the index and the files disagree on.
    """
    named_in: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        named_in.setdefault(file, set()).add(name)
    tensors: dict[str, T] = {}
    files: dict[str, Mapping[str, T]] = {}
    odd: set[str] = set()  # tensors that lie where the index does not say
    for file in sorted(named_in):
        path = file_inside(folder, file)
        if not path.is_file():
            what = "is no file" if path.exists() else "is missing"
            raise CheckpointError(f"{str(path)!r} {what}, and {index} names it; is the download complete?")
        files[file] = open_file(path)
        odd |= files[file].keys() - named_in[file]
        tensors |= files[file]
    problems = [problem for name in sorted(odd) for problem in _misplacements(name, files, weight_map)]
    problems += [
        f"{name!r} is not in {file}, where the index says it is"
        for name, file in weight_map.items()
        if name not in tensors
    ]
    if problems:
        shown = "; ".join(problems[:_MAX_SHOWN])
        more = f"; and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        raise CheckpointError(f"{index} and the shards of {str(folder)!r} disagree: {shown}{more}")
    return tensors


def _misplacements(name: str, files: Mapping[str, Mapping[str, T]], weight_map: Mapping[str, str]) -> list[str]:
    """Say where a tensor lies that does not lie where the index says, or not only there."""
    first, *others = (file for file, tensors in files.items() if name in tensors)
    problems = [f"{name!r} lies in {file} and in {first}" for file in others]
    if name not in weight_map:
        problems.append(f"{name!r} lies in {first}, and the index does not name it")
    elif not others:
        problems.append(f"{name!r} lies in {first}, and the index says {weight_map[name]}")
    return problems
