"""The plot of what wake-up moderation (forkd/moderation.py) costs and saves: one point per pause of the workers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results import Comparison, Spread, figure, spread

PAUSES_MS: Final = (0.0, 1.0, 2.0)
"""Whole ones: epoll_wait(2), which does the waiting, knows no others."""
MODERATED_UPSTREAMS: Final = ("http1", "h2-tls")


def write_moderation_plot(path: Path, comparisons: Sequence[Comparison]) -> None:
    """One PNG with three panels, a line for each protocol and number of workers."""
    mpl.use("Agg")
    page = Figure(figsize=(14, 5.4), layout="constrained")
    cpu, first, gap = page.subplots(1, 3)
    cpu.set_title("CPU per stream, floor = 1")
    first.set_title("time to first byte above floor's, ms")
    gap.set_title("longest gap in a stream above the delay, ms")
    for number, (label, line) in enumerate(_lines(comparisons).items()):
        colour = f"C{number}"
        _draw(cpu, line, [one.cpu_ratio for one in line], label, colour, "o-")
        for percent, style in ((50, "o-"), (99, "^--")):
            name = f"{label}, p{percent}"
            _draw(first, line, [_above_floor(one, f"ttfb_p{percent}_ms") for one in line], name, colour, style)
            _draw(gap, line, [_above_delay(one, f"gap_p{percent}_ms") for one in line], name, colour, style)
    for axes in (cpu, first, gap):
        axes.set_xlabel("a busy worker's pause, ms (0: none)")
        axes.set_xticks(PAUSES_MS)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    runs = max(len(comparison.pairs) for comparison in comparisons)
    page.suptitle(f"{comparisons[0].shape}; median of {runs}, bars from smallest to largest", fontsize=10)
    page.savefig(path, dpi=120)


def _lines(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    lines: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        subject = comparison.subject
        workers = f"{subject.workers} worker{'s' if subject.workers != 1 else ''}"
        lines.setdefault(f"{subject.kind}, {workers}", []).append(comparison)
    return lines


def _draw(
    axes: Axes, line: Sequence[Comparison], values: Sequence[Spread | None], label: str, colour: str, style: str
) -> None:
    points = [(one.subject.pause_ms or 0.0, value) for one, value in zip(line, values, strict=True) if value]
    if points:
        medians = [value.median for _, value in points]
        noise = [
            [value.median - value.low for _, value in points],
            [value.high - value.median for _, value in points],
        ]
        axes.errorbar(
            [pause for pause, _ in points], medians, yerr=noise, fmt=style, color=colour, label=label, capsize=3
        )


def _above_floor(comparison: Comparison, name: str) -> Spread | None:
    floor, forkd = figure(comparison.floor_runs, name), figure(comparison.forkd_runs, name)
    if floor is None or forkd is None:
        return None
    return spread(value - floor.median for value in forkd.values)


def _above_delay(comparison: Comparison, name: str) -> Spread | None:
    forkd = figure(comparison.forkd_runs, name)
    return None if forkd is None else spread(value - comparison.shape.delay_ms for value in forkd.values)
