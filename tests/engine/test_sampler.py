"""The sampler against a plain reference: probabilities worked out one token at a time in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.engine.sampler import _top_candidates, make_generator, sample, score
from infinilm.sampling_params import SamplingParams

CPU = torch.device("cpu")


def reference_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """Top-k, then top-p over what is left, ties with the last one kept."""
    weights = [math.exp((logit - max(logits)) / params.temperature) for logit in logits]
    if 0 < params.top_k < len(weights):
        threshold = sorted(weights, reverse=True)[params.top_k - 1]
        weights = [weight if weight >= threshold else 0.0 for weight in weights]
    if params.top_p < 1:
        total, mass, threshold = sum(weights), 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            if mass >= params.top_p * total:
                break
            mass, threshold = mass + weight, weight
        weights = [weight if weight >= threshold else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def frequencies(logits: torch.Tensor, params: SamplingParams, num_samples: int) -> list[float]:
    generators = [make_generator(seed, CPU) for seed in range(num_samples)]
    tokens = sample(logits.expand(num_samples, -1), [params] * num_samples, generators)
    return [count / num_samples for count in torch.tensor(tokens).bincount(minlength=len(logits)).tolist()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 8},
        {"top_k": 100},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_k": 4, "top_p": 0.7},
        {"top_k": 5, "top_p": 0.9, "temperature": 1.5},
    ],
)
def test_the_distribution_is_the_references(options):
    params = SamplingParams(**options)
    logits = torch.tensor([1.0, 2.0, -1.0, 2.0, 0.0, 1.5, -3.0, 0.5])  # with a tie
    expected = reference_probabilities(logits.tolist(), params)
    actual = frequencies(logits, params, 4000)
    for probability, frequency in zip(expected, actual, strict=True):
        # Five standard deviations of a binomial; exactly none of what is cut off.
        assert abs(frequency - probability) <= 5 * math.sqrt(probability * (1 - probability) / 4000)


@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(2, 300),
    top_k=st.sampled_from([0, 1, 2, 31, 32, 40, 65, 150]),
    top_p=st.sampled_from([1.0, 0.97, 0.7, 0.3]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_candidates_are_what_top_k_and_top_p_leave(seed, vocab_size, top_k, top_p, temperature):
    params = SamplingParams(top_k=top_k, top_p=top_p, temperature=temperature)
    # Whole numbers: many ties, also with the last one kept.
    logits = torch.randint(-6, 7, (2, vocab_size), generator=make_generator(seed, CPU)).float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    values, token_ids = _top_candidates(scaled, [params] * 2)
    for row, its, ids in zip(logits.tolist(), values.tolist(), token_ids.tolist(), strict=True):
        expected = reference_probabilities(row, params)
        kept = {token_id for token_id, value in zip(ids, its, strict=True) if value > -math.inf}
        assert kept == {token_id for token_id, probability in enumerate(expected) if probability}


def test_more_ties_with_the_last_of_top_k_than_were_looked_at():
    logits = torch.tensor([[1.0] * 30 + [0.0] * 200 + [-9.0] * 300])
    values, _ = _top_candidates(logits - 1, [SamplingParams(top_k=40, top_p=0.5)])
    assert int((values > -torch.inf).sum()) == 230


def test_greedy_is_the_first_largest_logit():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]])
    assert sample(logits, [SamplingParams(temperature=0)] * 2, [None, None]) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e30])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_extreme_temperatures_and_logits_do_not_overflow(temperature, options):
    logits = torch.tensor([[1e4, 3e4, -1e4, -torch.inf]])
    params = SamplingParams(temperature=temperature, **options)
    tokens = {sample(logits, [params], [make_generator(seed, CPU)])[0] for seed in range(50)}
    assert tokens == {1} if temperature < 1 else 3 not in tokens


batches = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0, 3, 100, 400]), st.sampled_from([1.0, 0.95, 0.4])
    ),
    min_size=1,
    max_size=6,
)


@given(batch=batches, seed=st.integers(0, 1000), vocab_size=st.sampled_from([5, 70, 600]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_row_does_not_see_the_rest_of_the_batch(batch, seed, vocab_size):
    params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in batch]
    # Coarse, as of bfloat16: many ties, which a sort may order in any way.
    steps = torch.randn(3, len(params), vocab_size, generator=make_generator(seed, CPU)).round(decimals=1)
    together = [make_generator(row, CPU) for row in range(len(params))]
    alone = [make_generator(row, CPU) for row in range(len(params))]
    for logits in steps:
        expected = [sample(logits[row][None], [params[row]], [alone[row]])[0] for row in range(len(params))]
        assert sample(logits, params, together) == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}])
def test_rounding_errors_in_the_logits_do_not_move_samples(options):
    params = [SamplingParams(**options)] * 64
    logits = torch.randn(64, 5000, generator=make_generator(0, CPU))
    noisy = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=make_generator(1, CPU)))
    first, second = (sample(its, params, [make_generator(row, CPU) for row in range(64)]) for its in (logits, noisy))
    assert first == second


def test_logprobs_are_of_the_raw_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 5.0, 0.0]])
    expected = logits.double().log_softmax(-1)
    first, second = score(logits, [3, 2], [2, 0])
    assert [(token, rank) for token, _, rank in first] == [(3, 4), (1, 1), (2, 2)]
    assert [(token, rank) for token, _, rank in second] == [(2, 1)]
    for row, entries in enumerate((first, second)):
        for token, logprob, _ in entries:
            assert logprob == pytest.approx(expected[row, token].item(), abs=1e-6)


def test_more_logprobs_than_tokens_are_all_tokens():
    (entries,) = score(torch.tensor([[1.0, 3.0]]), [0], [9])
    assert [token for token, _, _ in entries] == [0, 1, 0]


def test_logprobs_of_many_rows_are_those_of_each():
    logits = torch.randn(600, 9, generator=make_generator(0, CPU))
    tokens, num_top = [row % 9 for row in range(600)], [row % 3 for row in range(600)]
    together = score(logits, tokens, num_top)
    assert together == [score(logits[row][None], [tokens[row]], [num_top[row]])[0] for row in range(600)]
    assert score(logits[:0], [], []) == []
