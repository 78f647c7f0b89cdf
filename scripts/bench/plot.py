"""The plot: CPU ratio, memory and time to first byte, each with its limit as a dashed line."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from limits import limits_for
from measure import Run
from results import Comparison, figure

_FLOOR_COLOUR, _LIMIT_COLOUR = "0.6", "0.2"


def write_plot(path: Path, comparisons: Sequence[Comparison]) -> None:
    """One PNG with three panels."""
    mpl.use("Agg")
    page = Figure(figsize=(14, 5.4), layout="constrained")
    cpu, memory, ttfb = page.subplots(1, 3)
    colours = [f"C{number}" for number in range(len(comparisons))]
    _draw_cpu(cpu, comparisons, colours)
    _draw_memory(memory, comparisons, colours)
    _draw_ttfb(ttfb, comparisons, colours)
    page.suptitle(str(comparisons[0].shape), fontsize=10)
    page.savefig(path, dpi=120)


def _draw_cpu(axes: Axes, comparisons: Sequence[Comparison], colours: Sequence[str]) -> None:
    axes.set_title("CPU per stream, floor = 1")
    longest = max(len(comparison.pairs) for comparison in comparisons)
    for comparison, colour in zip(comparisons, colours, strict=True):
        ratio, limit = comparison.cpu_ratio, limits_for(comparison.subject).cpu_ratio
        if ratio:
            numbers = range(1, len(ratio.values) + 1)
            label = f"{comparison.subject.name} (median {ratio.median:.2f})"
            axes.plot(numbers, ratio.values, "o-", color=colour, label=label)
        if limit is not None:
            axes.axhline(limit, color=colour, linestyle="--", label=f"limit {limit:g}")
    axes.axhline(1, color=_FLOOR_COLOUR, label="floor")
    axes.set_xlabel("pair")
    axes.set_xticks(range(1, longest + 1))
    axes.set_ylim(bottom=0)
    _legend(axes)


def _draw_memory(axes: Axes, comparisons: Sequence[Comparison], colours: Sequence[str]) -> None:
    axes.set_title("memory per live stream, KB (PSS)")
    bars = [("floor", [run for comparison in comparisons for run in comparison.floor_runs], _FLOOR_COLOUR)]
    bars += [(_short(one), one.forkd_runs, colour) for one, colour in zip(comparisons, colours, strict=True)]
    _draw_bars(axes, bars, "memory_kb")
    for limit in {limits_for(comparison.subject).memory_kb for comparison in comparisons}:
        if limit is not None:
            axes.axhline(limit, color=_LIMIT_COLOUR, linestyle="--", label=f"limit {limit:g}")
    _legend(axes)


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, list[Run], str]], name: str) -> None:
    for position, (_, runs, colour) in enumerate(bars):
        values = figure(runs, name)
        if values:
            noise = [[values.median - values.low], [values.high - values.median]]
            axes.bar(position, values.median, color=colour, yerr=noise, capsize=4)
    axes.set_xticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)


def _draw_ttfb(axes: Axes, comparisons: Sequence[Comparison], colours: Sequence[str]) -> None:
    axes.set_title("time to first byte of each run, ms")
    axes.set_yscale("log")
    labels: list[tuple[float, str]] = []
    for position, (comparison, colour) in enumerate(zip(comparisons, colours, strict=True)):
        for shift, runs, shade in ((-0.2, comparison.floor_runs, _FLOOR_COLOUR), (0.2, comparison.forkd_runs, colour)):
            for name, marker in (("ttfb_p50_ms", "o"), ("ttfb_p99_ms", "^")):
                values = figure(runs, name)
                if values:
                    axes.plot([position + shift] * len(values.values), values.values, marker, color=shade, alpha=0.7)
        floor, limit = figure(comparison.floor_runs, "ttfb_p99_ms"), limits_for(comparison.subject).ttfb_over_floor_ms
        if floor and limit is not None:
            axes.hlines(floor.median + limit, position - 0.4, position + 0.4, color=colour, linestyle="--")
        labels += [(position - 0.2, "floor"), (position + 0.2, _short(comparison))]
    axes.set_xticks([place for place, _ in labels], [label for _, label in labels], fontsize=8)
    axes.set_xlim(-0.6, len(comparisons) - 0.4)
    for marker, meaning in (("o", "p50"), ("^", "p99")):
        axes.plot([], [], marker, color=_LIMIT_COLOUR, label=meaning)
    axes.plot([], [], "--", color=_LIMIT_COLOUR, label="limit for p99: floor's + allowance")
    _legend(axes)


def _legend(axes: Axes) -> None:
    # Below the panel, where no point can hide behind it.
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = 1 if max(map(len, labels)) > 45 else 2
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns)


def _short(comparison: Comparison) -> str:
    return comparison.subject.name.replace(", ", "\n")
