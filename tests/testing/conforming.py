"""Backends that conform: torch's behind a hook that reads every key, and one that keeps its state in slots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

import infinilm_hookspecs
from infinilm.backends.torch import provide_backend as provide_torch
from infinilm.testing import Context, make_batch
from infinilm_hookspecs import Backend, BackendRequest, CacheSpec, ForwardBatch, ParameterSpec, UnavailableError

PARTS = [part for name, part in vars(infinilm_hookspecs).items() if name.endswith(("Config", "Norms", "Scaling"))]
KNOWN_KEYS = {"kind", "name", "options", "size"} | {
    field.name for part in PARTS if isinstance(part, type) for field in fields(part)
}


class Wrapped:
    """A backend that passes everything on to another one."""

    name = "wrapped"
    weight_rule = None
    keeps_parameters = True

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.config = inner.config

    def parameters(self) -> Mapping[str, ParameterSpec]:
        return self.inner.parameters()

    def destination(self, name: str) -> torch.Tensor:
        return self.inner.destination(name)

    def loaded(self, name: str) -> None:
        self.inner.loaded(name)

    def finish_loading(self) -> None:
        self.inner.finish_loading()

    def cache_spec(self) -> CacheSpec:
        return self.inner.cache_spec()

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        self.inner.allocate_cache(num_blocks, num_slots)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.inner.copy_blocks(pairs)

    def release(self, slots: Sequence[int]) -> None:
        self.inner.release(slots)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self.inner.forward(batch)

    def close(self) -> None:
        self.inner.close()


def provider(wrapper: Callable[[Backend], Backend]) -> Callable[[BackendRequest], Backend | None]:
    """Return a `provide_backend` that reads every key, takes what the torch backend takes, and wraps it."""

    def provide(request: BackendRequest) -> Backend | None:
        config = request.lineage[-1]
        unknown = set(_keys(json.loads(config.to_json()))) - KNOWN_KEYS
        if unknown:
            return request.decline(f"cannot read {', '.join(sorted(unknown))}")
        inner = provide_torch(request)
        return None if inner is None else wrapper(inner)

    return provide


def _keys(plain: Any) -> Iterator[str]:
    if isinstance(plain, dict):
        yield from plain
        for value in plain.values():
            yield from _keys(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _keys(value)


class SlotBackend(Wrapped):
    """Keeps the tokens of every slot and computes them all in every step: what transformers would do, only slower."""

    max_length = 1024
    bytes_per_slot = 4 * max_length

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.tokens: dict[int, list[int]] = {}

    def cache_spec(self) -> CacheSpec:
        return CacheSpec(block_size=32, bytes_per_block=0, bytes_per_slot=self.bytes_per_slot, shareable=False)

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        if num_slots * self.bytes_per_slot > 1 << 30:
            raise UnavailableError(f"{num_slots} slots of {self.bytes_per_slot} bytes do not fit into {1 << 30}")
        self.tokens.clear()
        self.inner.allocate_cache(self._num_blocks(self.max_length), 1)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        raise NotImplementedError("there is nothing in blocks")

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.tokens.pop(slot, None)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        pieces = []
        for index, slot in enumerate(batch.slots.tolist()):
            start, stop = batch.query_starts[index : index + 2].tolist()
            tokens = self.tokens.setdefault(slot, [])
            tokens += batch.token_ids[start:stop].tolist()
            length = None if batch.prompt_lengths is None else int(batch.prompt_lengths[index])
            context = Context(tokens, list(range(self._num_blocks(len(tokens)))), length)
            whole = make_batch([(context, len(tokens))], self.inner.cache_spec().block_size)
            pieces.append(self.inner.forward(whole)[start - stop :])
        return torch.cat(pieces)[batch.logits_indices.tolist()]

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.inner.cache_spec().block_size)
