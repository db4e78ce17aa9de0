import pytest
import torch
from engine_fakes import EOS, FakeBackend, FakeProcessor, check_accounts, make_engine, run

from infinilm.engine.request import Failure
from infinilm.outputs import merge_deltas
from infinilm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
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


@pytest.mark.parametrize("is_sharing", [True, False])
def test_a_tiny_cache_preempts_and_changes_nothing(is_sharing):
    prompts = {str(at): [1 + at] * (4 + at) for at in range(5)}
    outputs = {}
    for num_blocks in (4, 64):
        engine = make_engine(FakeBackend(), num_blocks=num_blocks, max_num_batched_tokens=12, is_sharing=is_sharing)
        for request_id, prompt in prompts.items():
            engine.add_request(request_id, prompt, GREEDY)
        outputs[num_blocks] = {request_id: tokens_of(output) for request_id, output in run(engine).items()}
        assert (engine.stats().num_preemptions > 0) == (num_blocks == 4)
        assert engine.stats().num_free_blocks == num_blocks
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
    assert engine.stats().num_preemptions > 0
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
@pytest.mark.parametrize("n", [1, 3])
def test_abort_frees_everything(when, n):
    engine = make_engine(FakeBackend(), max_num_batched_tokens=4)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=n)
    engine.add_request("a", [1] * 6, params)
    for _ in range({"prefilling": 1, "decoding": 3}.get(when, 0)):
        engine.step()
    outputs = engine.abort(["b"] if when == "unknown" else ["a", "a", "b"])
    check_accounts(engine)
    assert engine.has_unfinished() == (when == "unknown")
    assert [its.finish_reason for output in outputs for its in output.outputs] == ["abort"] * n * (when != "unknown")
    assert all(output.finished and output.metrics.finished_time is not None for output in outputs)
    assert set(run(engine)) == ({"a"} if when == "unknown" else set())
    stats = engine.stats()
    assert stats.num_free_blocks == 64
    assert stats.num_finished == {"stop": 0, "length": n * (when == "unknown"), "abort": n * (when != "unknown")}


def test_a_backend_that_fails_fails_the_requests_of_the_step():
    backend = FakeBackend()
    engine = make_engine(backend, FakeProcessor(), max_num_seqs=2)
    for request_id in "abc":
        engine.add_request(request_id, [1, 2, 3], SamplingParams())
    backend.fails = True
    failures = engine.step()
    assert [type(its) for its in failures] == [Failure, Failure]
    assert [(its.request_id, str(its.error)) for its in failures] == [(x, "the device is on fire") for x in "ab"]
    check_accounts(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks, engine.num_failed_steps) == (0, 1, 64, 1)
    backend.fails = False
    assert set(run(engine)) == {"c"}
    assert engine.num_failed_steps == 0


def test_what_was_computed_by_a_step_that_failed_is_not_shared():
    backend = FakeBackend()
    engine = make_engine(backend)
    backend.fails = True
    engine.add_request("a", [1] * 9, GREEDY)
    engine.step()
    backend.fails = False
    backend.cache[:] = -1
    engine.add_request("a", [1] * 9, GREEDY)
    run(engine)
    assert engine.stats().prefix_cache_hits == 0


class PickyProcessor(FakeProcessor):
    """Its streams do not know token 3."""

    def stream(self):
        stream = super().stream()
        put = stream.put

        def picky(token_id):
            if token_id == 3:
                raise LookupError("no such token")
            return put(token_id)

        stream.put = picky
        return stream


def raising(value):
    def process(prompt_token_ids, token_ids, logits):
        if len(token_ids) == value:
            raise ZeroDivisionError("a plugin's mistake")
        return logits

    return process


def forbidding(value):
    return lambda prompt_token_ids, token_ids, logits: torch.full_like(logits, -torch.inf)


def test_what_fails_for_one_request_fails_it_alone():
    engine = make_engine(
        FakeBackend(), PickyProcessor(), logits_processors={"raising": raising, "forbidding": forbidding}
    )
    params = {"temperature": 0, "ignore_eos": True, "max_tokens": 4}
    engine.add_request("text", [1, 2], SamplingParams(logit_bias={3: 99.0}, **params))
    engine.add_request("plugin", [1, 2], SamplingParams(extra_args={"raising": 2}, n=2, **params))
    engine.add_request("all", [1, 2], SamplingParams(extra_args={"forbidding": None}, **params))
    engine.add_request("fine", [1, 2], SamplingParams(logit_bias={3: -99.0}, **params))
    ends = {}
    while engine.has_unfinished():
        for its in engine.step():
            ends[its.request_id] = str(its.error) if isinstance(its, Failure) else its.outputs[0].finish_reason
        check_accounts(engine)
    assert ends.pop("all").startswith("every token is forbidden")
    assert ends == {"text": "no such token", "plugin": "a plugin's mistake", "fine": "length"}


def test_what_is_no_error_propagates_and_leaks_nothing():
    class Interrupted(FakeBackend):
        def forward(self, batch):
            raise KeyboardInterrupt

    engine = make_engine(Interrupted(), max_num_seqs=2)
    for request_id in "abc":
        engine.add_request(request_id, [1, 2, 3], GREEDY)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    check_accounts(engine)
    assert (engine.stats().num_waiting, engine.stats().num_free_blocks) == (1, 64)


def test_numbers_for_a_metrics_endpoint():
    engine = make_engine(FakeBackend(), max_num_seqs=2)
    for request_id in "abc":
        engine.add_request(request_id, [1] * 5, GREEDY)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks, stats.num_free_blocks) == (0, 3, 64, 64)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (2, 1, 60)
    outputs = run(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 64)
    assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (15, 24)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (15, 4)
    assert stats.num_finished == {"stop": 0, "length": 3, "abort": 0}
    assert [outputs[request_id].metrics.num_cached_tokens for request_id in "abc"] == [0, 0, 4]
    metrics = outputs["c"].metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time


def test_prompts_that_begin_alike_are_computed_once():
    backend = FakeBackend()
    engine = make_engine(backend)
    computed = []
    for prompt in ([1] * 9, [1] * 9, [1] * 8, [1] * 8 + [2] * 4, [2] * 9):
        engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=1))
        engine.step()
        computed.append(backend.num_batched_tokens)
    assert computed == [9, 1, 4, 4, 9]
    assert engine.stats().num_free_blocks == 64


def test_other_weights_answer_for_themselves():
    backend = FakeBackend()
    engine = make_engine(backend)
    versions = []
    for version in ("0", "step 1", "0"):
        engine.change_weight_version(version)
        engine.add_request("a", [1] * 9, SamplingParams(temperature=0, max_tokens=1))
        versions.append(run(engine)["a"].weight_version)
        assert backend.num_batched_tokens == 9
    assert versions == ["0", "step 1", "0"]


@pytest.mark.parametrize("is_sharing", [True, False])
def test_n_answers_compute_the_prompt_once_where_the_cache_is_shared(is_sharing):
    backend = FakeBackend()
    engine = make_engine(backend, is_sharing=is_sharing)
    engine.add_request("a", [1] * 9, SamplingParams(n=3, seed=5, max_tokens=4, ignore_eos=True))
    engine.step()
    assert backend.num_batched_tokens == (9 if is_sharing else 27)
    output = run(engine)["a"]
    assert [its.index for its in output.outputs] == [0, 1, 2]
    assert len({tuple(its.token_ids) for its in output.outputs}) == 3
    for index, completion in enumerate(output.outputs):  # each is that of its own seed
        engine.add_request("alone", [1] * 9, SamplingParams(seed=5 + index, max_tokens=4, ignore_eos=True))
        assert tokens_of(run(engine)["alone"]) == completion.token_ids


def test_answers_of_one_request_may_end_at_different_times():
    engine = make_engine(FakeBackend(), FakeProcessor())
    engine.add_request("a", [1, 2], SamplingParams(n=6, seed=0, max_tokens=12))
    seen = []
    while engine.has_unfinished():
        seen += engine.step()
        check_accounts(engine)
    assert len({len(its.token_ids) for its in seen[-1].outputs}) > 1
    assert [its.finished for its in seen] == [False] * (len(seen) - 1) + [True]


@pytest.mark.parametrize("n", [1, 3])
def test_deltas_add_up_to_what_is_cumulative_and_final(n):
    results = {}
    for kind in RequestOutputKind:
        engine = make_engine(FakeBackend(), FakeProcessor())
        params = SamplingParams(n=n, seed=1, max_tokens=12, logprobs=1, stop=["abca", "€€"], output_kind=kind)
        engine.add_request("a", [1, 2], params)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        results[kind] = outputs
    (final,) = results[RequestOutputKind.FINAL_ONLY]
    assert results[RequestOutputKind.CUMULATIVE][-1].outputs == final.outputs
    deltas = results[RequestOutputKind.DELTA]
    assert [len(its.outputs[0].token_ids) for its in deltas] == [1] * len(deltas)
    merged = deltas[0]
    for delta in deltas[1:]:
        merged = merge_deltas(merged, delta)
    assert merged.outputs == final.outputs


def test_a_stop_token_says_which():
    completion = generate([1, 4, 2], SamplingParams(temperature=0, stop_token_ids=[4, 5])).outputs[0]
    assert (completion.text, completion.token_ids, completion.stop_reason) == ("a", [1, 4], 4)
    shown = SamplingParams(temperature=0, stop_token_ids=[4], include_stop_str_in_output=True)
    assert generate([1, 4, 2], shown).outputs[0].text == "aab"


def test_a_stop_string_may_be_shown():
    params = SamplingParams(temperature=0, stop=["bc"], include_stop_str_in_output=True)
    assert generate([3, 1, 2, 3, 3], params).outputs[0].text == "cabc"


def test_nothing_ends_before_min_tokens():
    script = [1, EOS, 4, 2, EOS, 1, EOS]
    params = {"temperature": 0, "stop_token_ids": [4], "stop": ["b"]}
    early = generate(script, SamplingParams(**params))
    assert tokens_of(early) == [1, EOS]
    late = generate(script, SamplingParams(min_tokens=5, **params))
    assert len(tokens_of(late)) > 5
    assert not {EOS, 4} & set(tokens_of(late)[:5])


def test_logprobs_are_of_the_models_own_logits_whatever_is_forbidden():
    plain = generate([1, 2], SamplingParams(temperature=0, max_tokens=1, logprobs=3)).outputs[0]
    biased = generate([1, 2], SamplingParams(temperature=0, max_tokens=1, logprobs=3, logit_bias={5: 200})).outputs[0]
    assert biased.token_ids == [5]
    assert {t: its.logprob for t, its in plain.logprobs[0].items()}.items() <= {
        t: its.logprob for t, its in biased.logprobs[0].items()
    }.items()


def test_a_grammar_survives_preemption_and_leaves_the_others_alone():
    def answers(num_blocks, others):
        engine = make_engine(FakeBackend(), FakeProcessor(), num_blocks=num_blocks)
        structured = StructuredOutputsParams(regex="(ab|c)(€ ?b){3}c")
        for at in range(3):
            engine.add_request(str(at), [1 + at, 2], SamplingParams(structured_outputs=structured, seed=at, n=2))
        for at in range(others):
            engine.add_request(f"other {at}", [2] * 5, SamplingParams(max_tokens=10, ignore_eos=True, seed=1))
        outputs = run(engine)
        assert (engine.stats().num_preemptions > 0) == (num_blocks < 20)
        return {key: its.outputs for key, its in outputs.items() if not key.startswith("other")}

    alone = answers(64, 0)
    assert answers(8, 4) == alone
    for outputs in alone.values():
        assert {its.finish_reason for its in outputs} == {"stop"}


def test_the_grammar_has_the_last_word_over_what_is_forbidden():
    structured = StructuredOutputsParams(regex="a{3}")
    params = SamplingParams(temperature=0, structured_outputs=structured, bad_words=["a"], min_tokens=9)
    engine = make_engine(FakeBackend(), FakeProcessor())
    engine.add_request("a", [2], params)
    completion = run(engine)["a"].outputs[0]
    assert (completion.text, completion.finish_reason) == ("aaa", "stop")


def test_logits_processors_get_what_they_ask_for_and_one_for_each_answer():
    made = []

    def counting(value):
        calls = []
        made.append(calls)

        def process(prompt_token_ids, token_ids, logits):
            calls.append((list(prompt_token_ids), list(token_ids)))
            return torch.where(torch.arange(len(logits)) == value, 0.0, -torch.inf)

        return process

    engine = make_engine(FakeBackend(), logits_processors={"always": counting})
    engine.add_request("a", [1, 2], SamplingParams(n=2, extra_args={"always": 7}, max_tokens=3))
    engine.add_request("b", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    outputs = run(engine)
    assert [its.token_ids for its in outputs["a"].outputs] == [[7, 7, 7]] * 2
    assert [calls for calls in made if calls] == [[([1, 2], [7] * at) for at in range(3)]] * 2


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
        ([1], SamplingParams(bad_words=["x"]), "bad_words=.* needs text"),
        (
            [1],
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="x")),
            "structured_outputs=.* needs text",
        ),
        ([1], SamplingParams(stop_token_ids=[12]), "token id 12 of stop_token_ids is not in the vocabulary"),
        ([1], SamplingParams(logit_bias={-1: 1.0}), "token id -1 of logit_bias"),
        ([1], SamplingParams(extra_args={"x": 1}), "no plugin provides the logits processor 'x'; known: none"),
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
