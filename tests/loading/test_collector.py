"""The cyclic collector is paused while planning, and left as it was found."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from infinilm.loading.collector import collector_paused


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


@collector_paused()
def fail_inside() -> None:
    assert not gc.isenabled()
    raise RuntimeError("inside")


def test_pauses_and_goes_on_after_errors_too() -> None:
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert gc.isenabled()


def test_nested_pauses_end_with_the_outer_one() -> None:
    with collector_paused():
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_leaves_a_disabled_collector_disabled() -> None:
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_what_was_made_meanwhile_is_old_and_still_collected() -> None:
    class Node:
        pass

    gc.collect()
    before = gc.get_count()[0]
    with collector_paused():
        nodes = [Node() for _ in range(10_000)]
        for node in nodes:
            node.itself = node  # type: ignore[attr-defined]
    assert gc.get_count()[0] < before + 1000
    assert any(one is nodes[0] for one in gc.get_objects(generation=2))
    del nodes, node
    assert gc.collect() >= 10_000


def test_what_the_program_froze_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collector_paused():
        kept = [[] for _ in range(100)]  # type: ignore[var-annotated]
    assert gc.get_freeze_count() > frozen // 2  # some of what is frozen may have died meanwhile
    assert len(kept) == 100
