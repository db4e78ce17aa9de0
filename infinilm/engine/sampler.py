"""From logits to tokens. Knows sampling parameters and random generators, no requests and no text.

A row's token depends on its own logits, parameters and generator alone. What min-p, top-k and top-p keep is decided by
value, never by the order a sort leaves ties in, and each token id has its own random numbers, whether it is kept or
not: a rounding error in the logits, as another batch makes, hardly ever moves a sample. Random numbers are made on the
CPU, so a seed means the same on every device.

A token is drawn in two races, among buckets of neighbouring ids and then within one: a vocabulary of V tokens takes
about V / 256 + 256 random numbers and not V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from infinilm.sampling_params import SamplingParams

TokenLogprob = tuple[int, float, int]
"""Token id, natural log-probability, rank."""

_BUCKET_SIZE = 256
_NUM_PARTS = 16
_MANY_LOGITS = 1 << 20
_FIRST_NUM_CANDIDATES = 64
_MAX_LOGPROB_ROWS = 256
# Logarithm of a weight that is never drawn, next to a largest weight of 1, with noise of no less than _LEAST_NOISE.
# Below it exponentials become subnormal numbers, which take a CPU a hundred times as long.
_NEVER = -86.0
_LEAST_NOISE = np.float32(1e-8)


def make_generator(seed: int) -> np.random.Generator:
    """Return the generator of one sequence. Seeds are integers of 64 bits."""
    return np.random.Generator(np.random.PCG64(seed % 2**64))


class Scratch:
    """Memory to work in, kept from one step to the next: on a CPU, fresh pages cost more than the work."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def room(self, like: Tensor, size: int) -> Tensor:
        """Return `size` elements, of the dtype and device of `like`, until the next call."""
        if self._memory is None or len(self._memory) < size or self._memory.device != like.device:
            self._memory = like.new_empty(size)
        return self._memory[:size]


class Sampler:
    """Chooses tokens. Nothing but memory is kept from one call to the next."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[np.random.Generator | None]
    ) -> list[int]:
        """Choose one token per row of `logits`, float32 (num_rows, vocab_size). Greedy rows need no generator."""
        drawn = [row for row, its in enumerate(params) if not its.is_greedy]
        if not drawn:
            return _likeliest(logits)
        rows = logits if len(drawn) == len(params) else logits[drawn]
        token_ids = self._draw(rows, [params[row] for row in drawn], [generators[row] for row in drawn])
        if len(drawn) == len(params):
            return token_ids
        chosen = _likeliest(logits)
        for row, token_id in zip(drawn, token_ids, strict=True):
            chosen[row] = token_id
        return chosen

    def _draw(
        self, logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[np.random.Generator | None]
    ) -> list[int]:
        """Draw a token for each row from what its parameters leave of it."""
        scaled = self.scale(logits, params)  # (num_rows, num_buckets, _BUCKET_SIZE)
        noise = _exponential_noise(generators, scaled.shape[1]).to(scaled.device)
        cut = [row for row, its in enumerate(params) if its.top_k > 0 or its.top_p < 1 or its.min_p > 0]
        if len(cut) == len(params):
            return _race_of_some(*candidates(scaled, params), noise).tolist()
        if not cut:
            return _race_of_all(scaled, noise).tolist()
        some = _race_of_some(*candidates(scaled[cut], [params[row] for row in cut]), noise[cut])
        return _race_of_all(scaled, noise).index_copy_(0, torch.tensor(cut, device=scaled.device), some).tolist()

    def scale(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """Divide by the temperatures; return (num_rows, num_buckets, _BUCKET_SIZE), the last bucket filled up.

        The largest logit of each row becomes 0 first, so that no temperature overflows; none is below _NEVER. The next
        call overwrites the result.
        """
        num_rows, vocab_size = logits.shape
        num_buckets = -(-vocab_size // _BUCKET_SIZE)
        padded = self._scratch.room(logits, num_rows * num_buckets * _BUCKET_SIZE).view(num_rows, -1)
        padded[:, vocab_size:] = _NEVER
        scaled = torch.sub(logits, logits.amax(-1, keepdim=True), out=padded[:, :vocab_size])
        if any(its.temperature != 1 for its in params):
            scaled *= _column([1 / its.temperature for its in params], scaled)
        return padded.clamp_(min=_NEVER).view(num_rows, num_buckets, _BUCKET_SIZE)


@torch.inference_mode()
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
        num_likelier = _count(logprobs > chosen_logprobs)
        top_logprobs, top_ids = logprobs.topk(width)  # (num_rows, width)
        firsts = zip(part_chosen[:, 0].tolist(), chosen_logprobs[:, 0].tolist(), num_likelier, strict=True)
        for first, values, ids in zip(firsts, top_logprobs.tolist(), top_ids.tolist(), strict=True):
            ranked = zip(ids[: num_top[len(result)]], values, range(1, width + 1), strict=False)
            token_id, logprob, num_before = first
            result.append([(token_id, logprob, num_before + 1), *ranked])
    return result


def _count(flags: Tensor) -> list[int]:
    """Return how many of each row are true."""
    if flags.device.type == "cpu":  # NumPy's is five times faster there
        counts: list[int] = np.count_nonzero(flags.numpy(), axis=-1).tolist()
        return counts
    return flags.sum(-1).tolist()


def _likeliest(logits: Tensor) -> list[int]:
    """Return the id of the largest logit of each row, the first of equals."""
    if logits.device.type != "cpu":
        return logits.argmax(-1).tolist()
    likeliest: list[int]
    num_rows, vocab_size = logits.shape
    if logits.numel() < _MANY_LOGITS or vocab_size % _NUM_PARTS:
        likeliest = logits.numpy().argmax(-1).tolist()  # ten times as fast as torch's
        return likeliest
    # The time goes into reading the logits, once: torch does that with all its threads.
    parts = logits.reshape(num_rows, _NUM_PARTS, -1)
    best = parts.amax(-1).numpy().argmax(-1)  # (num_rows,): which part
    inside = parts.numpy()[np.arange(num_rows), best].argmax(-1)  # (num_rows,)
    likeliest = (best * parts.shape[-1] + inside).tolist()
    return likeliest


def _exponential_noise(generators: Sequence[np.random.Generator | None], num_buckets: int) -> Tensor:
    """Return Exponential(1) numbers (num_rows, num_buckets + _BUCKET_SIZE)."""
    noise = np.empty((len(generators), num_buckets + _BUCKET_SIZE), np.float32)
    for row, generator in zip(noise, generators, strict=True):
        assert generator is not None, "a row that is drawn has no generator"
        generator.standard_exponential(dtype=np.float32, out=row)
    return torch.from_numpy(np.maximum(noise, _LEAST_NOISE, out=noise))


def _race_of_all(scaled: Tensor, noise: Tensor) -> Tensor:
    """Return a token id for each row, drawn from all. `scaled` is overwritten."""
    weights = scaled.exp_()
    masses = weights.sum(-1)  # (num_rows, num_buckets)
    buckets = _race(masses, noise[:, : masses.shape[1]])  # (num_rows,)
    inside = weights[torch.arange(len(weights), device=weights.device), buckets]  # (num_rows, _BUCKET_SIZE)
    return buckets * _BUCKET_SIZE + _race(inside, noise[:, masses.shape[1] :])


def _race_of_some(values: Tensor, token_ids: Tensor, noise: Tensor) -> Tensor:
    """Return a token id for each row, drawn as from all where all but `token_ids`, with `values`, weigh nothing."""
    weights = values.exp()  # (num_rows, num_candidates)
    num_buckets = noise.shape[1] - _BUCKET_SIZE
    masses = weights.new_zeros(len(weights), num_buckets).scatter_add_(1, token_ids // _BUCKET_SIZE, weights)
    buckets = _race(masses, noise[:, :num_buckets]).unsqueeze(-1)  # (num_rows, 1)
    weights = weights * (token_ids // _BUCKET_SIZE == buckets)
    inside = weights.new_zeros(len(weights), _BUCKET_SIZE).scatter_add_(1, token_ids % _BUCKET_SIZE, weights)
    return buckets.squeeze(-1) * _BUCKET_SIZE + _race(inside, noise[:, num_buckets:])


def _race(weights: Tensor, noise: Tensor) -> Tensor:
    """Return per row an index, drawn with probability proportional to its weight, given Exponential(1) noise.

    Of exponential clocks with the weights for rates, the first to ring (the Gumbel-max trick, in probabilities).
    """
    return (weights / noise).argmax(-1)


def candidates(scaled: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row and their token ids, -inf where min-p, top-k or top-p drops them.

    `scaled` is (num_rows, num_buckets, _BUCKET_SIZE), its largest 0. Ties with the last one kept are kept. Sorting
    stops at as many candidates as that takes.
    """
    size = scaled[0].numel()
    top_k = [min(its.top_k, size) if its.top_k > 0 else size for its in params]
    top_k_column = _column(top_k, scaled)  # (num_rows, 1), as the next ones
    floor = _column([math.log(its.min_p) if its.min_p > 0 else _NEVER * 0.99 for its in params], scaled)
    # At 1 nothing is dropped, however little its weight adds to the sum.
    top_p = _column([its.top_p if its.top_p < 1 else torch.inf for its in params], scaled)
    is_cut = [k < size or its.min_p > 0 for k, its in zip(top_k, params, strict=True)]  # before top-p
    total = torch.zeros_like(floor) if all(is_cut) else scaled.exp().sum((1, 2)).unsqueeze(-1)
    is_cut_column = _column(is_cut, scaled)
    width = min(max([_FIRST_NUM_CANDIDATES, *(2 * k for k in top_k if k < size)]), size)
    while True:
        values, token_ids = _largest(scaled, width)  # (num_rows, width), largest first
        kth = values.gather(-1, top_k_column.clamp(max=width) - 1)
        top = _drop_below(values, torch.where(top_k_column < size, torch.maximum(kth, floor), floor))
        cumulative = top.exp().cumsum(-1)
        mass = torch.where(is_cut_column, cumulative[:, -1:], total)
        # A token stays while those before it fall short of top_p: the first always does.
        last = (cumulative[:, :-1] < top_p * mass).sum(-1, keepdim=True)  # (num_rows, 1)
        nucleus = torch.where(top_p == torch.inf, top, _drop_below(top, top.gather(-1, last)))
        # Where the smallest candidate is still in, more may be: before top-p, which comes last, that is decided first.
        smallest = torch.where(is_cut_column, top[:, -1:], nucleus[:, -1:])
        if width == size or bool((smallest == -torch.inf).all()):
            return nucleus, token_ids
        width = min(8 * width, size)


def _largest(scaled: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the largest `width` values of each row, in order, and their token ids.

    They lie in the `width` buckets with the largest maxima: where there are many more buckets, the rest is not sorted.
    """
    num_rows, num_buckets, _ = scaled.shape
    if num_buckets < 4 * width:
        values, token_ids = scaled.view(num_rows, -1).topk(width)
        return values, token_ids
    buckets = scaled.amax(-1).topk(width, sorted=False).indices  # (num_rows, width)
    rows = torch.arange(num_rows, device=scaled.device).unsqueeze(-1)
    values, places = scaled[rows, buckets].view(num_rows, -1).topk(width)
    return values, buckets.gather(-1, places // _BUCKET_SIZE) * _BUCKET_SIZE + places % _BUCKET_SIZE


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).unsqueeze(-1)  # (num_rows, 1)


def _drop_below(values: Tensor, threshold: Tensor) -> Tensor:
    return values.masked_fill(values < threshold, -torch.inf)
