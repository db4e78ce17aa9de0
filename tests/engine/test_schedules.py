"""Whatever the schedule, a request gets what it would get alone, and nothing leaks."""

from dataclasses import dataclass

import pytest
import torch
from engine_fakes import EOS, TEXT_OF_TOKEN, FakeBackend, FakeProcessor, check_accounts, make_engine
from hypothesis import event, given, settings
from hypothesis import strategies as st

from infinilm.engine.grammar import Grammars, Masks
from infinilm.engine.logits import LogitsEdits, edit_logits
from infinilm.engine.sampler import Sampler, make_generator
from infinilm.outputs import Logprob, merge_deltas
from infinilm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

MAX_MODEL_LEN = 24
PROCESSOR = FakeProcessor()
MASKS = Masks()
GRAMMARS = Grammars(PROCESSOR, len(TEXT_OF_TOKEN))


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    aborted_at: int | None

    @property
    def length(self) -> int:
        return min(len(self.prompt) + (self.params.max_tokens or MAX_MODEL_LEN), MAX_MODEL_LEN)


COMMON = (1, 2, 3, 4, 5, 6, 7) * 3
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.6]),
    max_tokens=st.one_of(st.none(), st.integers(1, 20)),
    seed=st.integers(0, 3),
    stop=st.sampled_from([None, "ab", ["bca", "c a"], "€"]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    n=st.sampled_from([1, 1, 3]),
    stop_token_ids=st.sampled_from([None, [5]]),
    min_tokens=st.sampled_from([0, 0, 1]),
    bad_words=st.sampled_from([None, None, ["a", "bc"]]),
    structured_outputs=st.sampled_from([None, None, StructuredOutputsParams(regex="[abc ]{0,6}(€|bc)*")]),
    output_kind=st.sampled_from(RequestOutputKind),
    logprobs=st.sampled_from([None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, 0, 2]),
    ignore_eos=st.booleans(),
)
arrivals = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt=st.one_of(
        st.lists(st.integers(1, 11), min_size=1, max_size=MAX_MODEL_LEN - 1).map(tuple),
        st.builds(lambda num_common, own: (*COMMON[:num_common], own), st.integers(0, 21), st.integers(1, 2)),
    ),
    params=params,
    aborted_at=st.one_of(st.none(), st.none(), st.integers(1, 20)),
)


def expected_completion(backend: FakeBackend, arrival: Arrival, index: int) -> dict:
    """Generate one answer without engine, cache or batch: straight from the definition."""
    tokens, params, finish_reason = list(arrival.prompt), arrival.params, None
    generator, edits = make_generator(params.seed + index), expected_edits(arrival)
    prompt_length, logprobs = len(tokens), []
    text, stop_reason, sampler = "", None, Sampler()
    while finish_reason is None:
        logits = backend.logits_of(tokens, prompt_length)
        edited = logits.clone()[None]
        assert not edit_logits(edited, [edits], MASKS)
        (token,) = sampler.sample(edited, [params], [generator])
        logprobs.append(expected_logprobs(logits, token, params.logprobs))
        tokens.append(token)
        edits.accept(token)
        is_stop_token = token in params.stop_token_ids
        ends = is_stop_token or (token == EOS and (edits.is_complete or not params.ignore_eos))
        is_complete = ends or edits.is_complete
        finish_reason = "stop" if is_complete else "length" if len(tokens) >= arrival.length else None
        text, stop_string = expected_text(tokens[prompt_length : len(tokens) - ends], params, finish_reason)
        finish_reason = "stop" if stop_string is not None else finish_reason
        stop_reason = token if is_stop_token and stop_string is None else stop_string
    return {
        "token_ids": tokens[prompt_length:],
        "text": text,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
        "logprobs": None if params.logprobs is None else logprobs,
    }


def expected_edits(arrival: Arrival) -> LogitsEdits:
    params = arrival.params
    wanted = params.structured_outputs
    words = [(1,), (5, 1), (2, 3), (5, 2, 3)] if params.bad_words else []
    ends = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
    matcher = None if wanted is None else GRAMMARS.matcher(wanted)
    return LogitsEdits(params, arrival.prompt, matcher=matcher, bad_words=words, end_token_ids=ends)


def expected_prompt_logprobs(backend: FakeBackend, arrival: Arrival) -> list | None:
    tokens, num_top = arrival.prompt, arrival.params.prompt_logprobs
    rows = [
        expected_logprobs(backend.logits_of(tokens[:at], len(tokens)), tokens[at], num_top)
        for at in range(1, len(tokens))
    ]
    return None if num_top is None else [None, *rows]


def expected_logprobs(logits: torch.Tensor, token: int, num_top: int | None) -> dict[int, Logprob]:
    if num_top is None:
        return {}
    values = logits.log_softmax(-1)
    entries = {token: Logprob(values[token].item(), int((values > values[token]).sum()) + 1, text_of(token))}
    for rank, other in enumerate(values[None].topk(num_top).indices[0].tolist(), start=1):
        entries.setdefault(other, Logprob(values[other].item(), rank, text_of(other)))
    return entries


def text_of(token: int) -> str:
    return PROCESSOR.decode([token])


def expected_text(tokens: list[int], params: SamplingParams, finish_reason: str | None) -> tuple[str, str | None]:
    text, start = streamed(tokens), len(streamed(tokens[: params.min_tokens]))
    if finish_reason is not None:
        text = PROCESSOR.decode(tokens)
    ends = [(text.find(stop, start) + len(stop), -len(stop), stop) for stop in params.stop if stop in text[start:]]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


def streamed(tokens: list[int]) -> str:
    stream = PROCESSOR.stream()
    return "".join(map(stream.put, tokens))


@given(
    arrivals=st.lists(arrivals, min_size=1, max_size=6),
    block_size=st.sampled_from([1, 2, 3, 4, 8]),
    num_spare_blocks=st.integers(0, 3),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 20),
    is_sharing=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_outputs_do_not_depend_on_the_schedule(
    arrivals, block_size, num_spare_blocks, max_num_seqs, max_num_batched_tokens, is_sharing
):
    backend = FakeBackend(block_size=block_size)
    num_blocks = max(-(-(arrival.length - 1) // block_size) for arrival in arrivals) + num_spare_blocks
    engine = make_engine(
        backend,
        PROCESSOR,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        is_sharing=is_sharing,
    )
    outputs, finished, aborted, step = {}, set(), set(), 0
    while engine.has_unfinished() or any(arrival.step >= step for arrival in arrivals):
        for at, arrival in enumerate(arrivals):
            if arrival.step == step:
                engine.add_request(str(at), arrival.prompt, arrival.params)
            elif arrival.aborted_at is not None and arrival.step + arrival.aborted_at == step:
                aborted |= {str(at)} - finished
                engine.abort([str(at)])
        check_accounts(engine)
        for output in engine.step():
            is_delta = arrivals[int(output.request_id)].params.output_kind is RequestOutputKind.DELTA
            earlier = outputs.get(output.request_id) if is_delta else None
            outputs[output.request_id] = output if earlier is None else merge_deltas(earlier, output)
            finished |= {output.request_id} if output.finished else set()
        check_accounts(engine)
        assert backend.num_batched_tokens <= max_num_batched_tokens
        assert backend.num_seqs <= max_num_seqs
        step += 1
        assert step < 5_000, "no progress"
    stats = engine.stats()
    event(f"preempted: {min(stats.num_preemptions, 3)}")
    event(f"found in the cache: {min(stats.prefix_cache_hits, 1)}")
    assert stats.num_free_blocks == num_blocks
    assert finished == {str(at) for at in range(len(arrivals))} - aborted
    for request_id in finished:
        arrival, output = arrivals[int(request_id)], outputs[request_id]
        assert output.finished
        compare_logprobs(output.prompt_logprobs, expected_prompt_logprobs(backend, arrival))
        for index, completion in enumerate(output.outputs):
            compare(completion, expected_completion(backend, arrival, index))


def compare(completion, expected):
    for name in ("token_ids", "text", "finish_reason", "stop_reason"):
        assert getattr(completion, name) == expected[name], name
    compare_logprobs(completion.logprobs, expected["logprobs"])


def compare_logprobs(actual, expected):
    assert (actual is None) == (expected is None)
    for entries, wanted in zip(actual or [], expected or [], strict=True):
        assert list(entries or {}) == list(wanted or {})
        for token_id, entry in (entries or {}).items():
            assert entry.logprob == pytest.approx(wanted[token_id].logprob, abs=1e-5)
            assert (entry.rank, entry.decoded_token) == (wanted[token_id].rank, wanted[token_id].decoded_token)
