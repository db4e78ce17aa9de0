from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.engine.kv_cache import BlockPool


def test_a_table_grows_by_the_blocks_it_lacks():
    pool, table = BlockPool(4, block_size=3), array("i")
    assert pool.grow(table, 3)
    assert len(table) == 1
    assert pool.grow(table, 3)
    assert len(table) == 1
    assert pool.grow(table, 4)
    assert (len(set(table)), pool.num_free) == (2, 2)


def test_where_blocks_lack_nothing_is_taken():
    pool, table = BlockPool(2, block_size=1), array("i")
    assert not pool.grow(table, 3)
    assert (len(table), pool.num_free) == (0, 2)


def test_a_block_freed_twice_is_our_own_mistake():
    pool, table = BlockPool(2, block_size=1), array("i")
    pool.grow(table, 2)
    copy = array("i", table)
    pool.release(table)
    assert (len(table), pool.num_free) == (0, 2)
    with pytest.raises(AssertionError, match="is freed twice"):
        pool.release(copy)


def test_a_block_in_two_tables_is_found():
    pool, table = BlockPool(2, block_size=1), array("i")
    pool.grow(table, 1)
    with pytest.raises(AssertionError):
        pool.check([table, table])
    with pytest.raises(AssertionError):
        pool.check([])


@given(steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=40), block_size=st.integers(1, 5))
@settings(deadline=None, derandomize=True)
def test_every_block_is_accounted_for(steps, block_size):
    pool, tables = BlockPool(12, block_size), [array("i") for _ in range(4)]
    for which, num_tokens in steps:
        if num_tokens == 0:
            pool.release(tables[which])
        elif pool.grow(tables[which], num_tokens):
            assert len(tables[which]) * block_size >= num_tokens
        pool.check(tables)
