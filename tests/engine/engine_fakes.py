"""A backend and a processor that are small enough to check by hand."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from infinilm.engine.engine import Engine
from infinilm.engine.request import Failure
from infinilm_hookspecs import CacheSpec, ForwardBatch
from infinilm_hookspecs.types import LogitsProcessorFactory

TEXT_OF_TOKEN = [b"!", b"a", b"b", b"c", b"ab", b" ", b"\xe2", b"\x82", b"\xac", b"abc", b"\xe2\x82\xac", b"bc"]
EOS = 0


class FakeBackend:
    """A "model" whose logits depend on every token of the sequence, read back from a paged cache.

    It sees a wrong block, slot, position or prompt length, and holds the batch to what `ForwardBatch` promises.
    """

    def __init__(self, vocab_size: int = len(TEXT_OF_TOKEN), block_size: int = 4, *, shareable: bool = True) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.num_forwards = 0
        self.num_batched_tokens = 0
        self.num_seqs = 0
        self.shareable = shareable
        self.fails = False

    def cache_spec(self) -> CacheSpec:
        return CacheSpec(block_size=self.block_size, bytes_per_block=8 * self.block_size, shareable=self.shareable)

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        self.cache = np.full(num_blocks * self.block_size, -1)  # token * 10_000 + position
        self.slot_lengths = np.zeros(num_slots, int)

    def release(self, slots: Sequence[int]) -> None:
        assert len(set(slots)) == len(slots)
        self.slot_lengths[list(slots)] = 0

    def logits_of(self, token_ids: Sequence[int], prompt_length: int) -> torch.Tensor:
        """Return (vocab_size,) logits after `token_ids`, with ties here and there."""
        seed = zlib.crc32(np.array([prompt_length, *token_ids]).tobytes())
        logits = np.random.default_rng(seed).normal(0, 2, self.vocab_size).round(1)
        return torch.tensor(logits, dtype=torch.float32)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self._check(batch)
        self.num_forwards += 1
        self.num_batched_tokens, self.num_seqs = len(batch.token_ids), len(batch.slots)
        self.cache[batch.slot_mapping] = batch.token_ids * 10_000 + batch.positions
        if self.fails:
            raise RuntimeError("the device is on fire")
        rows = [self._row(batch, int(row)) for row in batch.logits_indices]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def _check(self, batch: ForwardBatch) -> None:
        for name in ("token_ids", "positions", "query_starts", "context_lengths", "block_tables", "slot_mapping"):
            assert getattr(batch, name).dtype == np.int32, name
        assert batch.slots.dtype == batch.logits_indices.dtype == batch.prompt_lengths.dtype == np.int32
        assert (np.diff(batch.query_starts) > 0).all()
        assert batch.query_starts[-1] == len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping)
        assert (np.diff(batch.logits_indices) > 0).all()
        assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping)
        assert len(set(batch.slots.tolist())) == len(batch.slots) == len(batch.extras)
        for row, slot in enumerate(batch.slots):
            start, stop = batch.query_starts[row], batch.query_starts[row + 1]
            first = batch.positions[start]
            is_cached = self.shareable and not self.slot_lengths[slot] and not first % self.block_size
            assert first == self.slot_lengths[slot] or is_cached, "the state in the slot is another's"
            self.slot_lengths[slot] = first + stop - start
            assert batch.context_lengths[row] == self.slot_lengths[slot] == batch.positions[stop - 1] + 1

    def _row(self, batch: ForwardBatch, row: int) -> torch.Tensor:
        sequence = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
        positions = np.arange(batch.positions[row] + 1)
        blocks = batch.block_tables[sequence, positions // self.block_size]
        assert (blocks >= 0).all()
        cached = self.cache[blocks * self.block_size + positions % self.block_size]
        assert (cached % 10_000 == positions).all()
        return self.logits_of((cached // 10_000).tolist(), int(batch.prompt_lengths[sequence]))


class FakeProcessor:
    """Tokens are bytes. Token 0 ends a sequence, and has a text that must not be seen where it does."""

    eos_token_ids = frozenset([EOS])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [TEXT_OF_TOKEN.index(char.encode()) for char in text]

    def token_bytes(self) -> list[bytes | None]:
        return [None, *TEXT_OF_TOKEN[1:]]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(TEXT_OF_TOKEN[token_id] for token_id in token_ids).decode("utf-8", "replace")

    def stream(self) -> FakeStream:
        return FakeStream()


class FakeStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        return self._decoder.decode(TEXT_OF_TOKEN[token_id])


def make_engine(
    backend: FakeBackend,
    processor: FakeProcessor | None = None,
    *,
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 100,
    seed: int | None = 0,
    is_sharing: bool = True,
    logits_processors: Mapping[str, LogitsProcessorFactory] | None = None,
) -> Engine:
    backend.allocate_cache(num_blocks, max_num_seqs)
    return Engine(
        backend,
        processor,
        num_blocks=num_blocks,
        block_size=backend.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        vocab_size=backend.vocab_size,
        eos_token_ids=frozenset([EOS]),
        seed=seed,
        is_sharing=is_sharing and backend.shareable,
        logits_processors=logits_processors,
    )


def check_accounts(engine: Engine) -> None:
    """Assert that every block is free, cached or counted, and every slot free or held by one sequence that is known."""
    scheduler = engine._scheduler
    queued = [*scheduler.running, *scheduler.waiting]
    known = [its for request in engine._requests.values() for its in request.sequences if not its.is_finished]
    assert sorted(its.sequence_id for its in known) == sorted(engine._sequences)
    assert sorted(map(id, queued)) == sorted(id(its) for its in known if its.index < its.request.num_queued)
    engine._pool.check([its.block_table for its in known])
    assert engine._pool.num_free == engine._pool.num_blocks or scheduler.running
    slots = [its.slot for its in scheduler.running]
    assert sorted(slots + scheduler._free_slots) == list(range(len(engine._backend.slot_lengths)))
    assert all(its.slot is None and not its.block_table.blocks for its in known if its not in scheduler.running)
    assert all(engine._backend.slot_lengths[slot] == 0 for slot in scheduler._free_slots)
    for sequence in scheduler.running:
        assert len(sequence.block_table.blocks) >= engine._pool.blocks_for(sequence.num_computed_tokens)
        assert engine._backend.slot_lengths[sequence.slot] == sequence.num_computed_tokens


def run(engine: Engine, max_steps: int = 10_000) -> dict:
    """Step until nothing is left, and return the outputs by request id."""
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_unfinished():
            return outputs
        for output in engine.step():
            if isinstance(output, Failure):
                raise output.error
            if output.finished:
                outputs[output.request_id] = output
        check_accounts(engine)
    raise AssertionError("the engine does not finish")
