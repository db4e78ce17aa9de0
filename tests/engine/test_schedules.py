"""Whatever the schedule, a request gets what it would get alone, and nothing leaks."""

from dataclasses import dataclass

import pytest
import torch
from engine_fakes import EOS, FakeBackend, FakeProcessor, check_accounts, make_engine
from hypothesis import event, given, settings
from hypothesis import strategies as st

from infinilm.engine.sampler import make_generator, sample
from infinilm.outputs import Logprob
from infinilm.sampling_params import SamplingParams

MAX_MODEL_LEN = 24
PROCESSOR = FakeProcessor()


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    aborted_at: int | None

    @property
    def length(self) -> int:
        return min(len(self.prompt) + (self.params.max_tokens or MAX_MODEL_LEN), MAX_MODEL_LEN)


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.6]),
    max_tokens=st.one_of(st.none(), st.integers(1, 20)),
    seed=st.integers(0, 3),
    stop=st.sampled_from([None, "ab", ["bca", "c a"], "€"]),
    logprobs=st.sampled_from([None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, 0, 2]),
    ignore_eos=st.booleans(),
)
arrivals = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt=st.lists(st.integers(1, 11), min_size=1, max_size=MAX_MODEL_LEN - 1).map(tuple),
    params=params,
    aborted_at=st.one_of(st.none(), st.none(), st.integers(1, 20)),
)


def expected_output(backend: FakeBackend, arrival: Arrival) -> dict:
    """Generate without engine, cache or batch: straight from the definition."""
    tokens, params, finish_reason = list(arrival.prompt), arrival.params, None
    generator = make_generator(params.seed, torch.device("cpu"))
    prompt_length, logprobs = len(tokens), []
    text, stop_reason = "", None
    while finish_reason is None:
        logits = backend.logits_of(tokens, prompt_length)
        (token,) = sample(logits[None], [params], [generator])
        logprobs.append(expected_logprobs(logits, token, params.logprobs))
        tokens.append(token)
        ends = token == EOS and not params.ignore_eos
        finish_reason = "stop" if ends else "length" if len(tokens) >= arrival.length else None
        text, stop_reason = expected_text(tokens[prompt_length : len(tokens) - ends], params, finish_reason)
        finish_reason = "stop" if stop_reason else finish_reason
    prompt_logprobs = [
        expected_logprobs(backend.logits_of(tokens[:at], prompt_length), tokens[at], params.prompt_logprobs)
        for at in range(1, prompt_length)
    ]
    return {
        "token_ids": tokens[prompt_length:],
        "text": text,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
        "logprobs": None if params.logprobs is None else logprobs,
        "prompt_logprobs": None if params.prompt_logprobs is None else [None, *prompt_logprobs],
    }


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
    text = PROCESSOR.decode(tokens)
    if finish_reason is None:
        stream = PROCESSOR.stream()
        text = "".join(map(stream.put, tokens))
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in params.stop if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(
    arrivals=st.lists(arrivals, min_size=1, max_size=6),
    block_size=st.sampled_from([1, 2, 3, 4, 8]),
    num_spare_blocks=st.integers(0, 6),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 20),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_outputs_do_not_depend_on_the_schedule(
    arrivals, block_size, num_spare_blocks, max_num_seqs, max_num_batched_tokens
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
    )
    outputs, aborted, step = {}, set(), 0
    while engine.has_unfinished() or any(arrival.step >= step for arrival in arrivals):
        for at, arrival in enumerate(arrivals):
            if arrival.step == step:
                engine.add_request(str(at), arrival.prompt, arrival.params)
            elif arrival.aborted_at is not None and arrival.step + arrival.aborted_at == step:
                aborted |= {at} - {int(request_id) for request_id in outputs}
                engine.abort([str(at)])
        check_accounts(engine)
        outputs |= {output.request_id: output for output in engine.step()}
        check_accounts(engine)
        assert backend.num_batched_tokens <= max_num_batched_tokens
        assert backend.num_seqs <= max_num_seqs
        step += 1
        assert step < 5_000, "no progress"
    event(f"preempted: {min(engine.num_preemptions, 3)}")
    assert engine.num_free_blocks == num_blocks
    assert set(outputs) == {str(at) for at in range(len(arrivals)) if at not in aborted}
    for request_id, output in outputs.items():
        compare(output, expected_output(backend, arrivals[int(request_id)]))


def compare(output, expected):
    completion = output.outputs[0]
    assert output.finished
    for name in ("token_ids", "text", "finish_reason", "stop_reason"):
        assert getattr(completion, name) == expected[name], name
    for actual, wanted in (
        (completion.logprobs, expected["logprobs"]),
        (output.prompt_logprobs, expected["prompt_logprobs"]),
    ):
        assert (actual is None) == (wanted is None)
        for entries, wanted_entries in zip(actual or [], wanted or [], strict=True):
            assert list(entries or {}) == list(wanted_entries or {})
            for token_id, entry in (entries or {}).items():
                assert entry.logprob == pytest.approx(wanted_entries[token_id].logprob, abs=1e-5)
                assert (entry.rank, entry.decoded_token) == (
                    wanted_entries[token_id].rank,
                    wanted_entries[token_id].decoded_token,
                )
