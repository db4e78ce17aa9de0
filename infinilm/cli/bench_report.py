"""What a measurement found: figures, distributions, and a table of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Many measurements of one thing, in milliseconds. `values` are sorted."""

    mean: float
    minimum: float
    maximum: float
    percentiles: Mapping[str, float]
    values: Sequence[float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Report:
    """One measurement: how it was made, its figures by name, its distributions, and the errors by their message."""

    command: str
    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    events_by_second: Sequence[int] = ()


def distribution(seconds: Sequence[float]) -> Distribution:
    """Return the distribution of measurements that are in seconds; there must be one."""
    values = sorted(1000 * value for value in seconds)
    percentiles = {f"p{share}": percentile(values, share) for share in PERCENTILES}
    return Distribution(math.fsum(values) / len(values), values[0], values[-1], percentiles, values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` percent of sorted `values` lie, between two of them in proportion."""
    position = (len(values) - 1) * share / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def render(report: Report) -> str:
    """Return a report for a terminal."""
    lines = [report.command, *(f"  {name:<28}{value:>12,.2f}" for name, value in report.figures.items())]
    if report.distributions:
        names = ("mean", *(f"p{share}" for share in PERCENTILES), "max")
        lines += ["", f"{'  milliseconds':<30}" + "".join(f"{name:>10}" for name in names)]
    for name, found in report.distributions.items():
        values = (found.mean, *found.percentiles.values(), found.maximum)
        lines.append(f"  {name:<28}" + "".join(f"{value:>10.1f}" for value in values))
    if report.errors:
        lines += ["", "errors", *(f"  {count} x {message}" for message, count in report.errors.items())]
    return "\n".join(lines)
