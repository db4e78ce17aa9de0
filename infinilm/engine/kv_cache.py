"""Which block of the paged cache belongs to whom. Integers and hashes only; the cache itself is the backend's.

A block that is full and computed is known by its key: a hash of the key of the block before it and of its own tokens.
The first key of a chain stands for the weights, so blocks of other weights are never found. Whoever starts with tokens
that are cached takes those blocks instead of computing them; only full blocks are shared and nobody writes to one, so
none is ever copied. A cached block that nobody holds stays until its memory is needed, the least recently used first.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256


class BlockTable:
    """The blocks of one sequence, in order, and the keys of those that are full. `num_stored` of them may be shared.

    Keys stay when the blocks are given up: a sequence that starts again looks for its own.
    """

    __slots__ = ("blocks", "keys", "num_stored", "root")

    def __init__(self) -> None:
        self.blocks = array("i")
        self.keys: list[bytes] = []
        self.num_stored = 0
        self.root = b""


class BlockPool:
    """Hands out the blocks of a cache. A block is free, or held by tables, or cached with nobody holding it.

    Without `is_sharing` no block is in two tables and none is found again.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, is_sharing: bool = False, weight_version: str = "0"
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.is_sharing = is_sharing
        self._free = list(reversed(range(num_blocks)))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody; the least recently used first
        self._num_holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._num_versions = 0
        self.forget_all(weight_version)

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def forget_all(self, weight_version: str) -> None:
        """Let no block that is computed be found again: from now on they are computed with other weights.

        Tables keep what they hold; what they go on to compute with it is not shared either.
        """
        self._num_versions += 1
        self._root = sha256(f"{self._num_versions} {weight_version}".encode()).digest()
        self._block_of.clear()
        self._key_of.clear()
        self._free.extend(reversed(self._idle))
        self._idle.clear()

    def reuse(self, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> int:
        """Fill an empty table with the cached blocks of a prefix of `token_ids`; return how many tokens they hold.

        No more than `num_tokens` are looked up.
        """
        assert not table.blocks, "a table is filled twice"
        if not self.is_sharing:
            return 0
        if table.root != self._root:
            table.root = self._root
            table.keys.clear()
        for at in range(num_tokens // self.block_size):
            block = self._block_of.get(self._key(table, token_ids, at))
            if block is None:
                break
            self._idle.pop(block, None)
            self._num_holders[block] += 1
            table.blocks.append(block)
        table.num_stored = len(table.blocks)
        return table.num_stored * self.block_size

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Append to `table` until it holds `num_tokens`. Where blocks lack, return `False` and append none."""
        num_new = self.blocks_for(num_tokens) - len(table.blocks)
        if num_new > self.num_free:
            return False
        for _ in range(num_new):
            block = self._free.pop() if self._free else self._evict()
            self._num_holders[block] = 1
            table.blocks.append(block)
        return True

    def store(self, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """Let others find the full blocks of the first `num_tokens` tokens, which are computed."""
        if not self.is_sharing or table.root != self._root:
            return
        for at in range(table.num_stored, num_tokens // self.block_size):
            key, block = self._key(table, token_ids, at), table.blocks[at]
            if key not in self._block_of:
                self._block_of[key] = block
                self._key_of[block] = key
            table.num_stored = at + 1

    def release(self, table: BlockTable) -> None:
        """Take back every block of `table`, and empty it. Of blocks that stay cached, the last are evicted first."""
        for block in reversed(table.blocks):
            assert self._num_holders[block] > 0, f"block {block} is freed twice"
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        del table.blocks[:]
        table.num_stored = 0

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that every block is accounted for, `tables` being all there are."""
        held = Counter(block for table in tables for block in set(table.blocks))
        assert held.total() == sum(len(table.blocks) for table in tables), "a table holds a block twice"
        holders = {block: count for block, count in enumerate(self._num_holders) if count}
        assert holders == held, f"tables hold {dict(held)}, the pool counts {holders}"
        everywhere = sorted([*self._free, *self._idle, *held])
        assert everywhere == list(range(self.num_blocks)), f"free: {self._free}, cached: {[*self._idle]}, held: {held}"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "a key leads to another's block"
        assert not self._key_of.keys() & set(self._free), "a free block can be found"
        assert self._key_of.keys() >= self._idle.keys(), "a block is kept that nobody can find"
        assert all(
            count == 1 or block in self._key_of or self._is_outdated(block, tables) for block, count in held.items()
        )

    def _is_outdated(self, block: int, tables: Iterable[BlockTable]) -> bool:
        return all(table.root != self._root for table in tables if block in table.blocks)

    def _key(self, table: BlockTable, token_ids: Sequence[int], at: int) -> bytes:
        """Return the key of block number `at`, of `table` or to be, whose tokens are all known."""
        keys = table.keys
        while len(keys) <= at:
            start = len(keys) * self.block_size
            tokens = array("i", token_ids[start : start + self.block_size])
            keys.append(sha256((keys[-1] if keys else table.root) + tokens.tobytes()).digest())
        return keys[at]

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
