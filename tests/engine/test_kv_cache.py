import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.engine.kv_cache import BlockPool, BlockTable


def computed(pool, token_ids):
    """Return the table of a sequence that has computed all of `token_ids`."""
    table = BlockTable()
    pool.reuse(table, token_ids, len(token_ids))
    assert pool.grow(table, len(token_ids))
    pool.store(table, token_ids, len(token_ids))
    return table


def test_a_table_grows_by_the_blocks_it_lacks():
    pool, table = BlockPool(4, block_size=3), BlockTable()
    assert pool.grow(table, 3)
    assert len(table.blocks) == 1
    assert pool.grow(table, 3)
    assert len(table.blocks) == 1
    assert pool.grow(table, 4)
    assert (len(set(table.blocks)), pool.num_free) == (2, 2)


def test_where_blocks_lack_nothing_is_taken():
    pool, table = BlockPool(2, block_size=1), BlockTable()
    assert not pool.grow(table, 3)
    assert (len(table.blocks), pool.num_free) == (0, 2)


def test_a_block_freed_twice_is_our_own_mistake():
    pool, table, copy = BlockPool(2, block_size=1), BlockTable(), BlockTable()
    pool.grow(table, 2)
    copy.blocks.extend(table.blocks)
    pool.release(table)
    assert (len(table.blocks), pool.num_free) == (0, 2)
    with pytest.raises(AssertionError, match="is freed twice"):
        pool.release(copy)


def test_a_block_in_two_tables_is_found():
    pool, table = BlockPool(2, block_size=1), BlockTable()
    pool.grow(table, 1)
    with pytest.raises(AssertionError):
        pool.check([table, table])
    with pytest.raises(AssertionError):
        pool.check([])


def test_a_prefix_is_computed_once_and_only_whole_blocks_are_shared():
    pool = BlockPool(8, block_size=2, is_sharing=True)
    first, second = computed(pool, [1, 2, 3, 4, 5]), BlockTable()
    assert pool.reuse(second, [1, 2, 3, 4, 5, 6], 5) == 4
    assert list(second.blocks) == list(first.blocks[:2])
    assert pool.grow(second, 6)
    pool.check([first, second])
    assert pool.num_free == 4
    pool.release(first)
    pool.check([second])


@pytest.mark.parametrize(("token_ids", "num_found"), [([1, 2, 9, 4], 2), ([9, 2, 3, 4], 0), ([3, 4], 0), ([1], 0)])
def test_a_block_is_found_after_the_same_tokens_only(token_ids, num_found):
    pool = BlockPool(8, block_size=2, is_sharing=True)
    computed(pool, [1, 2, 3, 4])
    assert pool.reuse(BlockTable(), token_ids, len(token_ids)) == num_found


def test_without_sharing_nothing_is_found():
    pool = BlockPool(8, block_size=2)
    pool.release(computed(pool, [1, 2, 3, 4]))
    assert computed(pool, [1, 2, 3, 4]).num_stored == 0
    assert not pool._block_of


@pytest.mark.parametrize(("num_blocks", "found"), [(1, [2, 1]), (2, [2, 0]), (3, [1, 0]), (4, [0, 0])])
def test_the_least_recently_used_goes_first_and_of_one_prompt_the_end(num_blocks, found):
    pool, other = BlockPool(4, block_size=1, is_sharing=True), BlockTable()
    for token_ids in ([1, 2], [3, 4], [1, 2]):
        pool.release(computed(pool, token_ids))
    assert pool.num_free == 4
    assert pool.grow(other, num_blocks)
    pool.check([other])
    assert [pool.reuse(BlockTable(), token_ids, 2) for token_ids in ([1, 2], [3, 4])] == found


def test_other_weights_find_nothing_and_what_runs_over_the_change_is_not_shared():
    pool = BlockPool(8, block_size=2, is_sharing=True)
    running, idle = computed(pool, [1, 2, 3, 4]), computed(pool, [5, 6])
    pool.release(idle)
    pool.forget_all("1")
    pool.check([running])
    assert pool.num_free == 6
    assert pool.grow(running, 6)
    pool.store(running, [1, 2, 3, 4, 5, 6], 6)
    assert not pool._key_of
    for token_ids in ([1, 2, 3, 4, 5, 6], [5, 6]):
        assert pool.reuse(BlockTable(), token_ids, len(token_ids)) == 0
    pool.release(running)
    assert pool.reuse(running, [1, 2, 3, 4], 4) == 0
    pool.forget_all("0")  # a name used before stands for other weights
    assert pool.reuse(BlockTable(), [1, 2], 2) == 0
    pool.check([])
    assert pool.num_free == 8


prompts = st.lists(st.integers(0, 1), max_size=14)


@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just([]), st.just([]), prompts)), max_size=40),
    block_size=st.integers(1, 5),
    is_sharing=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_every_block_is_accounted_for(steps, block_size, is_sharing):
    pool = BlockPool(12, block_size, is_sharing=is_sharing)
    tables, contents = [BlockTable() for _ in range(4)], {}
    for which, token_ids in steps:
        table = tables[which]
        pool.release(table)
        num_cached = pool.reuse(table := BlockTable(), token_ids, len(token_ids))
        tables[which] = table
        # What is found holds what was written for the same tokens before it.
        for at in range(num_cached // block_size):
            assert contents[table.blocks[at]] == token_ids[: (at + 1) * block_size]
        if not pool.grow(table, len(token_ids)):
            pool.release(table)
        for at in range(num_cached // block_size, len(table.blocks)):
            assert sum(table.blocks[at] in its.blocks for its in tables) == 1, "a shared block is written"
            contents[table.blocks[at]] = token_ids[: (at + 1) * block_size]
        pool.store(table, token_ids, len(token_ids) if table.blocks else 0)
        pool.check(tables)
