"""The sampler against a plain reference: probabilities worked out one token at a time in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.engine.sampler import Sampler, _largest, candidates, make_generator, score
from infinilm.sampling_params import SamplingParams

sample = Sampler().sample


def numbers(seed):
    """Return a generator of random logits."""
    return torch.Generator().manual_seed(seed)


def reference_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """Min-p, then top-k, then top-p over what is left, ties with the last one kept."""
    weights = [math.exp((logit - max(logits)) / params.temperature) for logit in logits]
    weights = [weight if weight >= params.min_p * (1 - 1e-6) else 0.0 for weight in weights]
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
    generators = [make_generator(seed) for seed in range(num_samples)]
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
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"min_p": 0.1, "top_k": 4, "top_p": 0.8, "temperature": 2.0},
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
    vocab_size=st.integers(2, 600),
    top_k=st.sampled_from([0, 1, 2, 31, 32, 40, 65, 150]),
    top_p=st.sampled_from([1.0, 0.97, 0.7, 0.3]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.4]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_min_p_top_k_and_top_p_leave(seed, vocab_size, top_k, top_p, min_p, temperature):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    # Whole numbers: many ties, also with the last one kept.
    logits = torch.randint(-6, 7, (2, vocab_size), generator=numbers(seed)).float()
    values, token_ids = candidates(Sampler().scale(logits, [params] * 2), [params] * 2)
    for row, its, ids in zip(logits.tolist(), values.tolist(), token_ids.tolist(), strict=True):
        kept = {token_id for token_id, value in zip(ids, its, strict=True) if value > -math.inf}
        expected = reference_probabilities(row, params)
        assert kept == {token_id for token_id, probability in enumerate(expected) if probability}


@pytest.mark.parametrize("width", [1, 64, 100, 149, 150, 1000])
@pytest.mark.parametrize("decimals", [0, 2, 6])
def test_the_largest_of_many_are_those_of_a_sort(width, decimals):
    logits = torch.randn(2, 151_936, generator=numbers(0)).round(decimals=decimals)
    scaled = Sampler().scale(logits, [SamplingParams()] * 2)
    expected = scaled.flatten(1).sort(descending=True).values[:, :width]
    values, token_ids = _largest(scaled, width)
    assert values.equal(expected)
    assert scaled.flatten(1).gather(-1, token_ids).equal(expected)
    assert all(len(set(ids)) == width for ids in token_ids.tolist())


def test_more_ties_with_the_last_of_top_k_than_were_looked_at():
    logits = torch.tensor([[1.0] * 30 + [0.0] * 200 + [-9.0] * 300])
    params = [SamplingParams(top_k=40, top_p=0.5)]
    scaled = Sampler().scale(logits, params)
    assert int((candidates(scaled, params)[0] > -torch.inf).sum()) == 230


def test_a_token_has_its_random_numbers_whether_others_are_kept_or_not():
    logits = torch.linspace(-2, 2, 700)[None]
    generator = make_generator(1234)
    free = [sample(logits, [SamplingParams()], [generator])[0] for _ in range(4)]
    generator = make_generator(1234)
    cut = [sample(logits, [SamplingParams(top_k=600)], [generator])[0] for _ in range(4)]
    assert free == cut


@pytest.mark.parametrize("options", [{}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 0.5}])
def test_a_forbidden_token_is_never_drawn(options):
    logits = torch.full((1, 600), -torch.inf)
    logits[0, [3, 500, 518]] = torch.tensor([1.0, 0.5, -20.0])
    rows = logits.expand(3000, -1)
    tokens = sample(rows, [SamplingParams(**options)] * 3000, [make_generator(seed) for seed in range(3000)])
    assert {3, 500} <= set(tokens) <= {3, 500, 518}


@pytest.mark.parametrize("seed", [-1, 0, 2**64 - 1, -(2**63)])
def test_every_seed_of_64_bits_is_one(seed):
    assert sample(torch.zeros(1, 5), [SamplingParams()], [make_generator(seed)])[0] in range(5)


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_all_tokens_of_a_flat_distribution_are_drawn_alike(vocab_size):
    num_samples = 40 * vocab_size if vocab_size < 100 else 4 * vocab_size
    logits = torch.zeros(1, vocab_size).expand(num_samples, -1)
    tokens = sample(logits, [SamplingParams()] * num_samples, [make_generator(seed) for seed in range(num_samples)])
    counts = torch.tensor(tokens).bincount(minlength=vocab_size).double()
    assert len(counts) == vocab_size
    expected = num_samples / vocab_size
    chi_squared = float(((counts - expected) ** 2 / expected).sum())  # mean vocab_size - 1, variance twice that
    assert abs(chi_squared - (vocab_size - 1)) < 5 * math.sqrt(2 * (vocab_size - 1))


def test_greedy_is_the_first_largest_logit():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]])
    assert sample(logits, [SamplingParams(temperature=0)] * 2, [None, None]) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e30])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_extreme_temperatures_and_logits_do_not_overflow(temperature, options):
    logits = torch.tensor([[1e4, 3e4, -1e4, -torch.inf]])
    params = SamplingParams(temperature=temperature, **options)
    tokens = {sample(logits, [params], [make_generator(seed)])[0] for seed in range(50)}
    assert tokens == {1} if temperature < 1 else 3 not in tokens


batches = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        st.sampled_from([0, 3, 100, 400]),
        st.sampled_from([1.0, 0.95, 0.4]),
        st.sampled_from([0.0, 0.1]),
    ),
    min_size=1,
    max_size=6,
)


@given(batch=batches, seed=st.integers(0, 1000), vocab_size=st.sampled_from([5, 70, 600]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_row_does_not_see_the_rest_of_the_batch(batch, seed, vocab_size):
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in batch]
    # Coarse, as of bfloat16: many ties, which a sort may order in any way.
    steps = torch.randn(3, len(params), vocab_size, generator=numbers(seed)).round(decimals=1)
    together = [make_generator(row) for row in range(len(params))]
    alone = [make_generator(row) for row in range(len(params))]
    for logits in steps:
        expected = [sample(logits[row][None], [params[row]], [alone[row]])[0] for row in range(len(params))]
        assert sample(logits, params, together) == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_rounding_errors_in_the_logits_do_not_move_samples(options):
    params = [SamplingParams(**options)] * 64
    logits = torch.randn(64, 5000, generator=numbers(0))
    noisy = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=numbers(1)))
    first, second = (sample(its, params, [make_generator(row) for row in range(64)]) for its in (logits, noisy))
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
    logits = torch.randn(600, 9, generator=numbers(0))
    tokens, num_top = [row % 9 for row in range(600)], [row % 3 for row in range(600)]
    together = score(logits, tokens, num_top)
    assert together == [score(logits[row][None], [tokens[row]], [num_top[row]])[0] for row in range(600)]
    assert score(logits[:0], [], []) == []


@pytest.mark.parametrize("vocab_size", [1 << 18, (1 << 18) + 1])
def test_greedy_takes_the_first_of_equals_among_many_logits(vocab_size: int) -> None:
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(0))
    expected = [0, vocab_size - 1, 70_000, 16_384, 16_383]
    for row, token_id in enumerate(expected):
        logits[row, token_id] = logits[row, -1] = 9.0
    greedy = [SamplingParams(temperature=0)] * 5
    assert sample(logits, greedy, [None] * 5) == expected
    logits[2, 90_000] = float("inf")
    logits[3, 5] = float("nan")
    assert sample(logits, greedy, [None] * 5)[2:4] == [90_000, 5]
