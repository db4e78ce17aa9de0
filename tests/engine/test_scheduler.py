import pytest

from infinilm.engine.kv_cache import BlockPool, BlockTable
from infinilm.engine.scheduler import Scheduler


class Sequence:
    def __init__(self, sequence_id, token_ids):
        self.sequence_id, self.token_ids = sequence_id, token_ids
        self.num_computed_tokens, self.block_table, self.slot = 0, BlockTable(), None

    @property
    def num_tokens(self):
        return len(self.token_ids)

    @property
    def num_pending_tokens(self):
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_reusable_tokens(self):
        return len(self.token_ids) - 1


class Run:
    """A scheduler whose sequences compute what they are given, and get one token when all is computed."""

    def __init__(self, num_blocks=100, block_size=1, max_num_seqs=4, max_num_batched_tokens=8, is_sharing=False):
        self.pool = BlockPool(num_blocks, block_size, is_sharing=is_sharing)
        self.scheduler = Scheduler(self.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        self.requests = {}

    def add(self, request_id, num_tokens, token=0):
        request = self.requests[request_id] = Sequence(request_id, [token] * num_tokens)
        self.scheduler.add(request)
        return request

    def step(self):
        output = self.scheduler.schedule()
        for request_id, num_tokens in output.num_tokens.items():
            request = self.requests[request_id]
            request.num_computed_tokens += num_tokens
            self.pool.store(request.block_table, request.token_ids, request.num_computed_tokens)
            if not request.num_pending_tokens:
                request.token_ids.append(0)
        return dict(output.num_tokens)

    def ids(self):
        running, waiting = self.scheduler.running, self.scheduler.waiting
        return "".join(its.sequence_id for its in running), "".join(its.sequence_id for its in waiting)


def test_a_long_prompt_is_cut_into_chunks_and_shares_steps_with_decoding():
    run = Run(max_num_batched_tokens=8)
    run.add("a", 3)
    assert run.step() == {"a": 3}
    run.add("b", 17)
    run.add("c", 2)
    assert [run.step() for _ in range(3)] == [{"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 1, "b": 3, "c": 2}]
    assert run.step() == {"a": 1, "b": 1, "c": 1}


def test_first_come_first_served():
    run = Run(num_blocks=10, max_num_batched_tokens=100)
    run.add("a", 6)
    run.add("b", 6)
    run.add("c", 1)
    assert run.step() == {"a": 6}
    assert run.ids() == ("a", "bc")


def test_at_most_max_num_seqs_run():
    run = Run(max_num_seqs=2, max_num_batched_tokens=100)
    requests = [run.add(request_id, 1) for request_id in "abc"]
    assert run.step() == {"a": 1, "b": 1}
    assert sorted(its.slot for its in requests[:2]) == [0, 1]
    assert run.scheduler.remove(requests[0]) is not None
    assert run.step() == {"b": 1, "c": 1}


def test_the_most_recently_started_is_preempted_and_goes_to_the_front():
    run = Run(num_blocks=9, max_num_batched_tokens=100)
    a, b, c = (run.add(request_id, 2) for request_id in "abc")
    run.add("d", 5)
    assert run.step() == {"a": 2, "b": 2, "c": 2}
    slot = c.slot
    assert run.step() == {"a": 1, "b": 1, "c": 1}
    output = run.scheduler.schedule()
    assert (dict(output.num_tokens), output.released_slots) == ({"a": 1, "b": 1}, (slot,))
    assert run.ids() == ("ab", "cd")
    assert (c.num_computed_tokens, c.slot, len(c.block_table.blocks), c.num_tokens) == (0, None, 0, 4)
    assert run.scheduler.num_preemptions == 1
    run.pool.check([a.block_table, b.block_table])


def test_one_that_needs_its_own_blocks_preempts_itself():
    run = Run(num_blocks=5, max_num_batched_tokens=100)
    run.add("a", 2)
    run.add("b", 2)
    assert run.step() == {"a": 2, "b": 2}
    assert run.step() == {"a": 1}
    assert run.ids() == ("a", "b")


def test_several_are_preempted_in_the_order_they_started():
    run = Run(num_blocks=8, block_size=2, max_num_batched_tokens=100)
    run.add("a", 8)
    run.add("b", 4)
    run.add("c", 4)
    assert run.step() == {"a": 8, "b": 4, "c": 4}
    assert run.step() == {"a": 1, "b": 1}
    assert run.ids() == ("ab", "c")
    run.add("e", 1)
    for _ in range(5):
        run.step()
    assert run.ids()[1][-1] == "e"


def test_a_preempted_request_computes_everything_again():
    run = Run(num_blocks=5, max_num_batched_tokens=100)
    a, b = run.add("a", 2), run.add("b", 2)
    run.step()
    run.step()
    assert b.num_pending_tokens == 3
    run.scheduler.remove(a)
    assert run.step() == {"b": 3}


@pytest.mark.parametrize("is_started", [True, False])
def test_a_removed_request_holds_nothing(is_started):
    run = Run(max_num_seqs=1)
    request = run.add("a", 3)
    if is_started:
        run.step()
    assert (run.scheduler.remove(request) is None) is not is_started
    assert run.ids() == ("", "")
    assert run.pool.num_free == 100


def test_who_starts_computes_what_is_not_cached_and_at_least_the_last_token():
    run = Run(block_size=2, is_sharing=True, max_num_batched_tokens=100)
    run.add("a", 6)
    assert run.step() == {"a": 6}
    run.add("b", 6)
    run.add("c", 7)
    assert run.step() == {"a": 1, "b": 2, "c": 1}
    assert (run.scheduler.num_queried_tokens, run.scheduler.num_cached_tokens) == (6 + 6 + 7, 4 + 6)
    run.pool.check([its.block_table for its in run.requests.values()])


def test_cached_blocks_are_room_for_others():
    run = Run(num_blocks=6, is_sharing=True, max_num_batched_tokens=100)
    first = run.add("a", 4)
    run.step()
    run.scheduler.remove(first)
    run.add("b", 6, token=1)
    assert run.step() == {"b": 6}


def test_a_preempted_request_finds_its_own_blocks():
    run = Run(num_blocks=6, is_sharing=True, max_num_batched_tokens=100)
    a, b = run.add("a", 2), run.add("b", 3, token=1)
    run.step()
    assert run.step() == {"a": 1}
    assert (b.num_computed_tokens, b.block_table.blocks.tolist()) == (0, [])
    run.scheduler.remove(a)
    assert run.step() == {"b": 1}
    run.pool.check([b.block_table])


def test_nobody_starts_in_a_step_that_preempts():
    run = Run(num_blocks=5, block_size=1, is_sharing=True, max_num_batched_tokens=100)
    run.add("a", 3)
    run.add("b", 2, token=1)
    run.add("c", 1)
    assert run.step() == {"a": 3, "b": 2}
    assert run.step() == {"a": 1}
    assert run.ids() == ("a", "bc")


def test_those_that_belong_to_one_that_runs_come_first():
    run = Run(max_num_seqs=3)
    for name in "abc":
        run.add(name, 1)
    run.step()
    run.add("d", 1)
    run.scheduler.add_first([Sequence("x", [0]), Sequence("y", [0])])
    assert run.ids() == ("abc", "xyd")
