import pytest
from engine_fakes import EOS, FakeBackend, FakeProcessor, check_accounts, make_engine, run

from infinilm.sampling_params import SamplingParams
from infinilm_hookspecs import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens_of(output):
    return output.outputs[0].token_ids


class ScriptedBackend(FakeBackend):
    """Says the tokens of `script` after the prompt, whatever the prompt."""

    def __init__(self, script, **options):
        super().__init__(**options)
        self.script = script

    def logits_of(self, token_ids, prompt_length):
        logits = super().logits_of(token_ids, prompt_length)
        logits[self.script[len(token_ids) - prompt_length]] = 99
        return logits


def generate(script, params, processor=None, prompt=(1, 2, 3), **options):
    engine = make_engine(ScriptedBackend(script), processor or FakeProcessor(), **options)
    engine.add_request("a", prompt, params, prompt="the prompt")
    return run(engine)["a"]


def test_an_output_has_vllms_shape():
    output = generate([1, 2, EOS], SamplingParams(temperature=0))
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("a", "the prompt", [1, 2, 3])
    assert (output.prompt_logprobs, output.finished) == (None, True)
    (completion,) = output.outputs
    assert (completion.index, completion.text, completion.token_ids) == (0, "ab", [1, 2, EOS])
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_logprobs_have_the_chosen_token_first_and_the_likeliest_after():
    output = generate([1, 2, EOS], SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1))
    completion = output.outputs[0]
    assert [next(iter(entries)) for entries in completion.logprobs] == completion.token_ids
    assert all(2 <= len(entries) <= 3 for entries in completion.logprobs)
    assert completion.logprobs[0][1].decoded_token == "a"
    assert completion.cumulative_logprob == sum(
        entries[token].logprob for entries, token in zip(completion.logprobs, completion.token_ids, strict=True)
    )
    assert output.prompt_logprobs[0] is None
    assert [next(iter(entries)) for entries in output.prompt_logprobs[1:]] == [2, 3]


def test_the_end_of_sequence_can_be_ignored():
    output = generate([1, EOS, 2, EOS], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert (tokens_of(output), output.outputs[0].text) == ([1, EOS, 2, EOS], "a!b!")
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("params", "num_tokens"),
    [({"max_tokens": 1}, 1), ({"max_tokens": 5}, 5), ({"max_tokens": 50}, 7), ({"max_tokens": None}, 7)],
)
def test_length_limits(params, num_tokens):
    output = generate([1] * 50, SamplingParams(temperature=0, **params), max_model_len=10)
    assert (len(tokens_of(output)), output.outputs[0].finish_reason) == (num_tokens, "length")


def test_a_stop_string_ends_the_request():
    output = generate([3, 1, 2, 3, 3], SamplingParams(temperature=0, stop=["bc"]))
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids) == ("ca", [3, 1, 2, 3])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "bc")


def test_a_stop_string_at_the_last_token_is_a_stop():
    completion = generate([1, 2], SamplingParams(temperature=0, stop="b", max_tokens=2)).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("a", "stop", "b")


@pytest.mark.parametrize("script", [[1, 6, 7], [1, 6, 7, EOS]])
def test_half_a_character_at_the_end_is_not_lost(script):
    completion = generate(script, SamplingParams(temperature=0, max_tokens=len(script))).outputs[0]
    assert completion.text == "a\ufffd"


def test_a_model_without_a_processor_gives_token_ids():
    backend = ScriptedBackend([1, 2, EOS])
    engine = make_engine(backend)
    engine.add_request("a", [5], SamplingParams(temperature=0, logprobs=0))
    completion = run(engine)["a"].outputs[0]
    assert (completion.token_ids, completion.text) == ([1, 2, EOS], "")
    assert completion.logprobs[0][1].decoded_token is None


def test_a_tiny_cache_preempts_and_changes_nothing():
    prompts = {str(at): [1 + at] * (4 + at) for at in range(5)}
    outputs = {}
    for num_blocks in (4, 64):
        engine = make_engine(FakeBackend(), num_blocks=num_blocks, max_num_batched_tokens=12)
        for request_id, prompt in prompts.items():
            engine.add_request(request_id, prompt, GREEDY)
        outputs[num_blocks] = {request_id: tokens_of(output) for request_id, output in run(engine).items()}
        assert (engine.num_preemptions > 0) == (num_blocks == 4)
        assert engine.num_free_blocks == num_blocks
    assert outputs[4] == outputs[64]


def test_prompt_logprobs_are_computed_once_per_position():
    class CountingBackend(FakeBackend):
        num_rows = 0

        def _row(self, batch, row):
            self.num_rows += int(batch.positions[row] < 9)
            return super()._row(batch, row)

    backend = CountingBackend()
    engine = make_engine(backend, num_blocks=6, max_num_batched_tokens=4)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=1)
    engine.add_request("a", [1] * 10, GREEDY)
    engine.add_request("b", [2] * 10, params)
    outputs = run(engine)
    assert engine.num_preemptions > 0
    assert backend.num_rows == len(outputs["b"].prompt_logprobs) - 1 == 9


@pytest.mark.parametrize("which", ["explicit", "of the engine"])
def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(which):
    def tokens(seed, others):
        engine = make_engine(FakeBackend(), seed=7, max_num_batched_tokens=9)
        engine.add_request("a", [1, 2], SamplingParams(seed=seed, ignore_eos=True))
        for other in range(others):
            engine.add_request(str(other), [3 + other] * 5, SamplingParams(temperature=2, ignore_eos=True, top_k=5))
        return tokens_of(run(engine)["a"])

    seed = 3 if which == "explicit" else None
    assert tokens(seed, 0) == tokens(seed, 6)
    assert tokens(seed, 0) != tokens(4, 0)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "unknown"])
def test_abort_frees_everything(when):
    engine = make_engine(FakeBackend(), max_num_batched_tokens=4)
    engine.add_request("a", [1] * 6, GREEDY)
    for _ in range({"prefilling": 1, "decoding": 3}.get(when, 0)):
        engine.step()
    engine.abort(["b"] if when == "unknown" else ["a", "a", "b"])
    check_accounts(engine)
    assert engine.has_unfinished() == (when == "unknown")
    assert set(run(engine)) == ({"a"} if when == "unknown" else set())
    assert engine.num_free_blocks == 64


@pytest.mark.parametrize("culprit", ["backend", "processor"])
def test_what_fails_propagates_and_leaks_nothing(culprit):
    class FailingProcessor(FakeProcessor):
        def decode(self, token_ids, *, skip_special_tokens=True):
            if not skip_special_tokens:
                raise RuntimeError("no such token")
            return super().decode(token_ids)

    backend = FakeBackend()
    engine = make_engine(backend, FailingProcessor(), max_num_seqs=2)
    for request_id in "abc":
        engine.add_request(request_id, [1, 2, 3], SamplingParams(logprobs=1 if culprit == "processor" else None))
    backend.fails = culprit == "backend"
    with pytest.raises(RuntimeError):
        engine.step()
    check_accounts(engine)
    assert (engine.num_running, engine.num_waiting, engine.num_free_blocks) == (0, 1, 64)
    backend.fails = False
    if culprit == "backend":
        assert set(run(engine)) == {"c"}


def test_numbers_for_a_metrics_endpoint():
    engine = make_engine(FakeBackend(), max_num_seqs=2)
    for request_id in "abc":
        engine.add_request(request_id, [1] * 5, GREEDY)
    assert (engine.num_running, engine.num_waiting, engine.num_free_blocks) == (0, 3, 64)
    engine.step()
    assert (engine.num_running, engine.num_waiting, engine.num_free_blocks) == (2, 1, 60)
    run(engine)
    assert (engine.num_running, engine.num_waiting, engine.num_free_blocks) == (0, 0, 64)


def test_a_step_with_nothing_to_do_does_nothing():
    backend = FakeBackend()
    assert make_engine(backend).step() == []
    assert backend.num_forwards == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([1, 12], GREEDY, r"token id 12 at position 1 .* from 0 to 11"),
        ([-1], GREEDY, r"token id -1 at position 0"),
        ([1.5], GREEDY, "must be integers"),
        ("ab", GREEDY, "must be integers"),
        ([1] * 30, GREEDY, r"a prompt of 30 tokens leaves no room to generate, max_model_len is 30"),
        ([1], SamplingParams(stop="x"), "stop=.* needs text"),
        (
            [1] * 10,
            SamplingParams(max_tokens=12),
            r"10 prompt tokens and max_tokens=12 can reach 22 tokens, .* 6 blocks of 4, .* has 5 \(20 tokens\)",
        ),
        ([1] * 10, SamplingParams(max_tokens=None), r"max_tokens=None can reach 30 tokens"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_numbers(prompt, params, message):
    engine = make_engine(FakeBackend(), num_blocks=5, max_model_len=30)
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", prompt, params)
    assert not engine.has_unfinished()


def test_what_just_fits_the_cache_is_served():
    engine = make_engine(FakeBackend(), num_blocks=5, max_model_len=30)
    engine.add_request("a", [1] * 10, SamplingParams(temperature=0, max_tokens=11, ignore_eos=True))
    assert len(tokens_of(run(engine)["a"])) == 11


def test_a_request_id_is_used_once_at_a_time():
    engine = make_engine(FakeBackend())
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        engine.add_request("a", [1], GREEDY)
    run(engine)
    engine.add_request("a", [1], GREEDY)
