"""Which block of the paged cache belongs to whom. Integers only; the cache itself is the backend's."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class BlockPool:
    """Hands out the blocks of a cache. Every block is either free or in exactly one block table."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: array[int], num_tokens: int) -> bool:
        """Append to `block_table` until it holds `num_tokens`. Where blocks lack, return `False` and append none."""
        num_new = self.blocks_for(num_tokens) - len(block_table)
        if num_new > self.num_free:
            return False
        for _ in range(num_new):
            block = self._free.pop()
            self._used.add(block)
            block_table.append(block)
        return True

    def release(self, block_table: array[int]) -> None:
        """Take back every block of `block_table`, and empty it."""
        for block in reversed(block_table):
            assert block in self._used, f"block {block} is freed twice"
            self._used.remove(block)
            self._free.append(block)
        del block_table[:]

    def check(self, block_tables: Iterable[array[int]]) -> None:
        """Assert that every block is free or in exactly one of `block_tables`, which are all there are."""
        held = [block for table in block_tables for block in table]
        assert sorted(held) == sorted(self._used), f"tables hold {sorted(held)}, the pool gave {sorted(self._used)}"
        assert sorted(self._free + held) == list(range(self.num_blocks)), f"free: {sorted(self._free)}, held: {held}"
