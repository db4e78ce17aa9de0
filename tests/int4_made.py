"""Matrices of four-bit numbers, packed as GPTQ and AWQ publish it: a reference that puts each number where it belongs.

GPTQ as in arXiv:2210.17323's code and GPTQModel, AWQ as AutoAWQ's GEMM layout. `tests/loading/test_int4_made.py` holds
both against words that those packages wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: Mapping[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def pack_columns(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Return (rows, columns / 8) int32: from the lowest bits on, the columns of eight in `order`."""
    eights = numbers.to(torch.int64).unflatten(1, (-1, 8))  # (rows, words, 8)
    words = sum(eights[..., column] * 16**place for place, column in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


@dataclass(frozen=True)
class Int4:
    """A matrix of four-bit numbers with the zero and the scale of every group, and what it stands for."""

    numbers: Tensor  # (inputs, outputs)
    zeros: Tensor  # (groups, outputs)
    scales: Tensor  # (groups, outputs)
    group: Tensor  # (inputs,)

    @property
    def value(self) -> Tensor:
        """(outputs, inputs), as the model has it"""
        value = (self.numbers - self.zeros[self.group]).to(self.scales.dtype) * self.scales[self.group]
        return value.t().contiguous()

    def gptq(self, name: str = "", *, version: int = 1, with_groups: bool = True) -> Tensors:
        """Return GPTQ's tensors. The first version subtracts one from each zero; one that is 0 borrows."""
        less = 0x11111111 if version == 1 else 0
        stored = {
            "qweight": pack_columns(self.numbers.t()).t().contiguous(),
            "qzeros": pack_columns(self.zeros) - less,
            "scales": self.scales,
        }
        stored |= {"g_idx": self.group.to(torch.int32)} if with_groups else {}
        return {name + role: tensor for role, tensor in stored.items()}

    def awq(self, name: str = "") -> Tensors:
        """Return AWQ's tensors."""
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        stored = {"qweight": pack_columns(self.numbers, order), "qzeros": pack_columns(self.zeros, order)}
        return {name + role: tensor for role, tensor in (stored | {"scales": self.scales}).items()}


def int4(num_inputs: int, num_outputs: int, group_size: int, *, shuffled: bool = False, seed: int = 0) -> Int4:
    """Return random numbers, zeros and scales. `shuffled` gives every input a group of its own choice, as act-order."""
    generator = torch.Generator().manual_seed(seed)
    size = num_inputs if group_size < 0 else group_size
    num_groups = -(-num_inputs // size)
    group = torch.arange(num_inputs) // size
    if shuffled:
        group = group[torch.randperm(num_inputs, generator=generator)]
    numbers = torch.randint(0, 16, (num_inputs, num_outputs), generator=generator)
    zeros = torch.randint(1, 16, (num_groups, num_outputs), generator=generator)
    scales = (torch.rand(num_groups, num_outputs, generator=generator) * 0.1 + 0.01).to(torch.float16)
    return Int4(numbers, zeros, scales, group)


def rounded(weight: Tensor, group_size: int, *, symmetric: bool = False, order: Tensor | None = None) -> Int4:
    """Return `weight`, (outputs, inputs), rounded to the nearest of 16 levels of each group of inputs.

    `order` says which inputs make a group: so many of it in a row.
    """
    values = weight.t().to(torch.float32)  # (inputs, outputs)
    num_inputs = len(values)
    size = num_inputs if group_size < 0 else group_size
    order = torch.arange(num_inputs) if order is None else order
    group = torch.empty(num_inputs, dtype=torch.int64)
    group[order] = torch.arange(num_inputs) // size
    blocks = values[order].split(size)
    low = torch.stack([block.amin(0).clamp(max=0) for block in blocks])
    high = torch.stack([block.amax(0).clamp(min=0) for block in blocks])
    spread = 2 * torch.maximum(-low, high) if symmetric else high - low
    scales = (spread / 15).clamp(min=1e-4).to(torch.float16)
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.float()).round()
    zeros = zeros.clamp(0, 15).to(torch.int64)
    numbers = (values / scales.float()[group]).round() + zeros[group]
    return Int4(numbers.clamp(0, 15).to(torch.int64), zeros, scales, group)
