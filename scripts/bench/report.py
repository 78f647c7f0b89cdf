"""The table on the terminal and the JSON file."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGTERM

from limits import Check, check
from results import Comparison, Spread, figure
from shape import DEFAULT

# label, name in results.FIGURES, decimals
_ROWS = (
    ("CPU per stream, µs", "cpu_us", 1),
    ("memory per live stream, KB", "memory_kb", 2),
    ("  without pages of files", "memory_unfiled_kb", 2),
    ("time to first byte p50, ms", "ttfb_p50_ms", 2),
    ("time to first byte p99, ms", "ttfb_p99_ms", 2),
    ("longest gap between chunks p50, ms", "gap_p50_ms", 1),
    ("longest gap between chunks p99, ms", "gap_p99_ms", 1),
    ("last byte to EOF p99, ms", "eof_p99_ms", 2),
    ("streams lost, per run", "lost", 0),
    ("idle CPU, ms per s (not subtracted)", "idle_cpu_ms", 2),
    ("generator CPU, % of one CPU", "generator_cpu_percent", 1),
    ("generator behind schedule p99, ms", "generator_late_p99_ms", 2),
    ("everything else on the machine, %", "other_cpu_percent", 1),
)
_LOAD_NOTE = f"the limits are set for {DEFAULT}"
_LABEL_WIDTH, _CELL_WIDTH = 42, 28


def table(comparison: Comparison) -> str:
    """Medians over the runs, with smallest and largest: floor, forkd, and the limits."""
    title = comparison.subject.name if comparison.forkd_runs else "floor"
    count = len(comparison.pairs)
    both = comparison.floor_runs and comparison.forkd_runs
    runs = f"{count} {'pair' if both else 'run'}{'' if count == 1 else 's'}"
    lines = [
        f"{title}: {comparison.shape}, {runs}",
        f"{'':<{_LABEL_WIDTH}}{'floor':<{_CELL_WIDTH}}{'forkd':<{_CELL_WIDTH}}".rstrip(),
    ]
    for label, name, decimals in _ROWS:
        floor = _cell(figure(comparison.floor_runs, name), decimals)
        forkd = _cell(figure(comparison.forkd_runs, name), decimals)
        lines.append(f"{label:<{_LABEL_WIDTH}}{floor:<{_CELL_WIDTH}}{forkd:<{_CELL_WIDTH}}".rstrip())
        if name == "cpu_us":
            ratio = _cell(comparison.cpu_ratio, 2)
            lines.append(f"{'  floor = 1, pair by pair':<{_LABEL_WIDTH}}{'1':<{_CELL_WIDTH}}{ratio}".rstrip())
    if comparison.forkd_runs:
        lines += [str(one) for one in check(comparison)]
    lines += [f"note: {note}" for note in notes(comparison)]
    return "\n".join(lines)


def notes(comparison: Comparison) -> list[str]:
    """What makes the figures doubtful, and what went wrong first when streams were lost."""
    found = [_LOAD_NOTE] if comparison.shape != DEFAULT and not comparison.all_at_once else []
    for side, runs in (("floor", comparison.floor_runs), ("forkd", comparison.forkd_runs)):
        for number, run in enumerate(runs, 1):
            if run.lost:
                fates = ", ".join(f"{count} {fate}" for fate, count in run.fates.items())
                found.append(f"{side}, run {number}: {fates}; {run.explanation}")
            if run.exit_status not in ((0, -SIGTERM) if side == "floor" else (0,)):
                found.append(f"{side}, run {number}: the daemon ended with status {run.exit_status}")
            if run.live < comparison.shape.streams:
                found.append(f"{side}, run {number}: {run.live} streams were live when the memory was read")
        late = max((run.generator_late_p99_ms or 0 for run in runs), default=0)
        if late > 10 or any(run.generator_cpu_percent > 80 for run in runs):
            found.append(
                f"{side}: the generator could hardly keep up (up to {late:.0f} ms late): its times are not sound"
            )
        others = [run.other_cpu_percent for run in runs if run.other_cpu_percent > 20]
        if others:
            busy = f"in {len(others)} of {len(runs)} runs, up to {max(others):.0f} % of one CPU"
            found.append(f"{side}: the machine was busy with other things {busy}")
    return found


def write_json(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Everything that was measured, with where and how."""
    first = comparisons[0].shape
    document = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "machine": {
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "load_average": os.getloadavg(),
        },
        "load": {
            "streams": first.streams,
            "over_secs": first.over_secs,
            "events": first.events,
            "delay_ms": first.delay_ms,
            "clients": "tcp" if first.tcp else "unix",
        },
        "configurations": [
            comparison.as_json()
            | {"checks": [_check_json(one) for one in check(comparison)], "notes": notes(comparison)}
            for comparison in comparisons
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _cell(spread: Spread | None, decimals: int) -> str:
    if spread is None:
        return "-"
    median = f"{spread.median:.{decimals}f}"
    if len(spread.values) == 1:
        return median
    return f"{median} ({spread.low:.{decimals}f} to {spread.high:.{decimals}f})"


def _check_json(one: Check) -> dict[str, object]:
    return {"what": one.what, "value": one.value, "limit": one.limit, "ok": one.ok}
