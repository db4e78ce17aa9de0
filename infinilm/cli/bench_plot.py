"""A picture of a `bench serve`: how long things took, and what came out second by second."""

from __future__ import annotations

from infinilm.cli.bench_report import PERCENTILES, Report

_COLOR = "#0f766e"


def plot(report: Report, path: str) -> None:
    """Draw every distribution, with its percentiles, and the events of each second, to the PNG `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(report.distributions)
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        found = report.distributions[name]
        shares = [100 * (at + 1) / len(found.values) for at in range(len(found.values))]
        axis.step(found.values, shares, where="post", color=_COLOR)
        for share in PERCENTILES:
            axis.axvline(found.percentiles[f"p{share}"], color="#b8b4a8", linewidth=0.8)
        axis.set(title=name, xlabel="ms", ylabel="% at most", ylim=(0, 100))
    by_second = axes.flat[len(names)]
    by_second.plot(range(len(report.events_by_second)), report.events_by_second, color=_COLOR)
    by_second.set(title="events by second", xlabel="s", ylim=(0, None))
    for axis in axes.flat[len(names) + 1 :]:
        axis.set_visible(False)
    rates = ", ".join(f"{report.figures[name]:.1f} {name}" for name in ("requests/s", "output tokens/s"))
    figure.suptitle(f"{report.settings['base_url']}: {rates}, {report.figures['errors']:.0f} errors")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
