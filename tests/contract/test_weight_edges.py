"""Odd arguments to a weight's methods: what torch does, or a `WeightError` where torch raises. Never another tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from infinilm.loading.values import evaluate
from infinilm_hookspecs import Weight, WeightError

STORED = torch.arange(48.0).reshape(8, 6)


def read(name: str, region: tuple[slice, ...]) -> Tensor:
    return STORED[region].contiguous()


def as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.split(3),
        lambda x: x.split(20),
        lambda x: x.split([0, 8]),
        lambda x: x[:0].split(2),
        lambda x: x[:0].split([0, 0]),
        lambda x: x.chunk(3),
        lambda x: x.chunk(5),
        lambda x: x.chunk(50),
        lambda x: x[:0].chunk(2),
        lambda x: x.unsqueeze(-3),
        lambda x: x.unsqueeze(2),
        lambda x: x.reshape(-1),
        lambda x: x.reshape((6, 8)),
        lambda x: x[:0].view(-1),
        lambda x: x[:0].reshape(6, 0),
        lambda x: x[0, 0].reshape(()),
        lambda x: x.narrow(0, 8, 0),
        lambda x: x[100:],
        lambda x: x[-3:-1, ::4],
        lambda x: x[..., 1],
        lambda x: x[None, :, None, 1],
        lambda x: list(x),
        lambda x: x.unflatten(0, (-1, 2)),
        lambda x: x.flatten(-2),
    ],
)
def test_what_torch_does(operation: Callable[[Any], Any]) -> None:
    found = as_list(operation(Weight.stored("a", (8, 6), "float32")))
    expected = as_list(operation(STORED))
    assert len(found) == len(expected)
    for weight, tensor in zip(found, expected, strict=True):
        assert torch.equal(evaluate(weight, read), tensor)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.split([-1, 9]),
        lambda x: x.split([4, 3]),
        lambda x: x.split(0),
        lambda x: x.split(-2),
        lambda x: x[:0].split(-2),
        lambda x: x.chunk(0),
        lambda x: x.chunk(-1),
        lambda x: x.unsqueeze(3),
        lambda x: x.unsqueeze(-4),
        lambda x: x.reshape(-8, -6),
        lambda x: x.reshape(-2, 24),
        lambda x: x.reshape(()),
        lambda x: x[:0].view(0, -1),
        lambda x: x.narrow(0, 7, 2),
        lambda x: x.narrow(0, 2, -1),
        lambda x: x.permute(1),
        lambda x: x.unflatten(0, (3, 2)),
        lambda x: x[0, 0, 0],
        lambda x: x[8],
        lambda x: x[-9],
        lambda x: x.to("float33"),
    ],
)
def test_what_torch_refuses(operation: Callable[[Any], Any]) -> None:
    with pytest.raises(WeightError, match=r"^Weight\('a', \["):
        operation(Weight.stored("a", (8, 6), "float32"))
    with pytest.raises((RuntimeError, IndexError, TypeError)):
        operation(STORED)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: x[True], "index True is neither an int nor a slice"),
        (lambda x: x[[0, 1]], r"index \[0, 1\] is neither an int nor a slice"),
        (lambda x: x.apply(torch.neg, dtype="float33"), "unknown dtype 'float33'"),
        (lambda x: x.apply(torch.neg, shape=(-1, 6)), r"apply cannot have the shape \[-1, 6\]"),
    ],
)
def test_what_only_a_weight_refuses(operation: Callable[[Weight], object], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        operation(Weight.stored("a", (8, 6), "float32"))
