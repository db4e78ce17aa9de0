"""Rotary position embedding: frequencies of every scaling, cosines and sines of a step, and the rotation.

Frequencies and angles are float32, because models are trained with frequencies rounded to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infinilm_hookspecs import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeConfig,
    YarnRopeScaling,
)

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of a step's tokens, each (num_tokens, 1, head_dim // 2), in the dtype of the model."""


class Rotary:
    """Makes the rotations of one `RopeConfig`. Frequencies that depend on no sequence are computed once."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._config = config
        self._head_dim = head_dim
        self._frequencies = fixed_frequencies(config, head_dim).to(device)  # (head_dim // 2,)

    def rotation(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the rotation of tokens at `positions` of sequences that count as `lengths` long.

        Both are (num_tokens,); only dynamic scaling looks at `lengths`.
        """
        scaling = self._config.scaling
        frequencies = self._frequencies
        if isinstance(scaling, DynamicRopeScaling):
            frequencies = dynamic_frequencies(self._config.theta, scaling, self._head_dim, lengths)
        angles = positions[:, None].float() * frequencies  # (num_tokens, head_dim // 2)
        magnitude = scaling.attention_factor if isinstance(scaling, YarnRopeScaling) else 1.0
        cosine, sine = angles.cos() * magnitude, angles.sin() * magnitude
        return cosine[:, None].to(dtype), sine[:, None].to(dtype)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first half of every head against its second half. `heads` is (num_tokens, num_heads, head_dim)."""
    cosine, sine = rotation
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.empty_like(heads)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cosine, out=rotated_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=rotated_second).addcmul_(first, sine)
    return rotated


def fixed_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the frequencies (head_dim // 2,) of `config`; with dynamic scaling, those of a short sequence."""
    frequencies = _frequencies(config.theta, head_dim)
    match config.scaling:
        case LinearRopeScaling(factor=factor):
            return frequencies / factor
        case Llama3RopeScaling() as scaling:
            return _llama3(frequencies, scaling)
        case YarnRopeScaling() as scaling:
            return _yarn(frequencies, scaling, config.theta)
        case _:
            return frequencies


def dynamic_frequencies(theta: float, scaling: DynamicRopeScaling, head_dim: int, lengths: Tensor) -> Tensor:
    """Return the frequencies (num_lengths, head_dim // 2) for sequences of `lengths` tokens."""
    original = scaling.original_max_position_embeddings
    growth = scaling.factor * lengths.clamp(min=original) / original - (scaling.factor - 1)
    bases = theta * growth ** (head_dim / (head_dim - 2))  # (num_lengths,)
    return _frequencies(bases[:, None], head_dim)


def _frequencies(base: float | Tensor, head_dim: int) -> Tensor:
    """Return `base ** (-2 i / head_dim)` for every pair i (arXiv:2104.09864, section 3.2.2)."""
    device = base.device if isinstance(base, Tensor) else None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / base**exponents


def _llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    # How often a pair turns within the original length; the blend is linear between the two limits.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: Tensor, scaling: YarnRopeScaling, theta: float) -> Tensor:
    # Pairs that turn more than `beta_fast` times are kept, those below `beta_slow` interpolated: section 3.2 there.
    first, last = _yarn_range(scaling, theta, 2 * len(frequencies))
    pairs = torch.arange(len(frequencies), dtype=torch.float32)
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_range(scaling: YarnRopeScaling, theta: float, head_dim: int) -> tuple[float, float]:
    """Return between which two pairs the blend runs."""

    def pair(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return (first, last) if first != last else (first, last + 0.001)
