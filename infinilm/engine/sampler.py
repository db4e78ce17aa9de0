"""From logits to tokens. Knows sampling parameters and random generators, no requests and no text.

A row's token depends on its own logits, parameters and generator alone. What top-k and top-p keep is decided by value,
never by the order a sort leaves ties in, and each token id has its own random number, whether it is kept or not: a
rounding error in the logits, as another batch makes, hardly ever moves a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infinilm.sampling_params import SamplingParams

TokenLogprob = tuple[int, float, int]
"""Token id, natural log-probability, rank."""

_FIRST_NUM_CANDIDATES = 64
_MAX_LOGPROB_ROWS = 256


def make_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return the generator of one request."""
    return torch.Generator(device).manual_seed(seed)


def sample(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]) -> list[int]:
    """Choose one token per row of `logits`, float32 (num_rows, vocab_size). Greedy rows need no generator."""
    token_ids = logits.argmax(-1)  # (num_rows,)
    free = [row for row, its in enumerate(params) if not its.is_greedy and its.top_k <= 0 and its.top_p == 1]
    cut = [row for row, its in enumerate(params) if not its.is_greedy and (its.top_k > 0 or its.top_p < 1)]
    for rows, choose in ((free, _sample_all), (cut, _sample_top)):
        if rows:
            index = torch.tensor(rows, device=logits.device)
            scaled = _scale(logits[index], [params[row] for row in rows])
            token_ids[index] = choose(scaled, [params[row] for row in rows], [generators[row] for row in rows])
    return token_ids.tolist()


def score(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[list[TokenLogprob]]:
    """Return, per row, the log-probability of its token and then those of its `num_top` likeliest tokens.

    Log-probabilities are of the raw `logits`, float32 (num_rows, vocab_size). The rank of the token is one more than
    the number of tokens that are likelier.
    """
    if not token_ids:
        return []
    chosen = torch.tensor(token_ids, device=logits.device).unsqueeze(-1)  # (num_rows, 1)
    width = min(max(num_top), logits.shape[-1])
    result: list[list[TokenLogprob]] = []
    # In parts: the logits of a long prompt are large enough once.
    for start in range(0, len(token_ids), _MAX_LOGPROB_ROWS):
        part_chosen = chosen[start : start + _MAX_LOGPROB_ROWS]
        logprobs = logits[start : start + _MAX_LOGPROB_ROWS].log_softmax(-1)
        chosen_logprobs = logprobs.gather(-1, part_chosen)  # (num_rows, 1)
        ranks = (logprobs > chosen_logprobs).sum(-1) + 1  # (num_rows,)
        top_logprobs, top_ids = logprobs.topk(width)  # (num_rows, width)
        firsts = zip(part_chosen[:, 0].tolist(), chosen_logprobs[:, 0].tolist(), ranks.tolist(), strict=True)
        for first, values, ids in zip(firsts, top_logprobs.tolist(), top_ids.tolist(), strict=True):
            ranked = zip(ids[: num_top[len(result)]], values, range(1, width + 1), strict=False)
            result.append([first, *ranked])
    return result


def _scale(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Divide by the temperatures. The largest logit of each row becomes 0 first, so that no temperature overflows."""
    temperatures = torch.tensor([its.temperature for its in params], device=logits.device).unsqueeze(-1)
    return (logits - logits.amax(-1, keepdim=True)) / temperatures


def _sample_all(
    scaled: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Sample from all tokens. `scaled` and the noise are (num_rows, vocab_size)."""
    noise = torch.empty_like(scaled)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return _race(scaled, noise)


def _sample_top(
    scaled: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Sample from what top-k, then top-p, leave of `scaled`, (num_rows, vocab_size)."""
    values, token_ids = _top_candidates(scaled, params)  # (num_rows, num_candidates)
    uniform = torch.empty_like(scaled)
    for row, generator in zip(uniform, generators, strict=True):
        row.uniform_(generator=generator)  # several times faster than exponential_, and few are looked at
    noise = -uniform.gather(-1, token_ids).log()
    return token_ids.gather(-1, _race(values, noise).unsqueeze(-1)).squeeze(-1)


def _race(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Return per row an index, drawn with probability proportional to its weight, given Exponential(1) noise.

    Of exponential clocks with the weights for rates, the first to ring (the Gumbel-max trick, in probabilities).
    """
    return (log_weights.exp() / noise).argmax(-1)


def _top_candidates(scaled: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row and their token ids, -inf where top-k or top-p drops them.

    Ties with the last one kept are kept. Sorting stops at as many candidates as that takes.
    """
    vocab_size = scaled.shape[-1]
    top_k = [min(its.top_k, vocab_size) if its.top_k > 0 else vocab_size for its in params]
    top_k_column = torch.tensor(top_k, device=scaled.device).unsqueeze(-1)  # (num_rows, 1)
    # At 1 nothing is dropped, however little its weight adds to the sum.
    top_p = torch.tensor([its.top_p if its.top_p < 1 else torch.inf for its in params], device=scaled.device)
    total = scaled.exp().sum(-1, keepdim=True)  # (num_rows, 1)
    width = min(max([_FIRST_NUM_CANDIDATES, *(2 * k for k in top_k if k < vocab_size)]), vocab_size)
    while True:
        values, token_ids = scaled.topk(width)  # (num_rows, width), largest first
        top = _drop_below(values, values.gather(-1, top_k_column.clamp(max=width) - 1))
        cumulative = top.exp().cumsum(-1)
        mass = torch.where(top_k_column < vocab_size, cumulative[:, -1:], total)
        # A token stays while those before it fall short of top_p: the first always does.
        last = (cumulative[:, :-1] < top_p.unsqueeze(-1) * mass).sum(-1, keepdim=True)  # (num_rows, 1)
        nucleus = _drop_below(top, top.gather(-1, last))
        # Where the smallest candidate is still in, more may be: for top-k, which comes first, its own already decides.
        smallest = torch.where(top_k_column < vocab_size, top[:, -1:], nucleus[:, -1:])
        if width == vocab_size or bool((smallest == -torch.inf).all()):
            return nucleus, token_ids
        width = min(8 * width, vocab_size)


def _drop_below(values: Tensor, threshold: Tensor) -> Tensor:
    return values.masked_fill(values < threshold, -torch.inf)
