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
    ("master's CPU per handoff, µs", "master_cpu_us", 1),
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
    ("fake API's CPU, % of one CPU", "api_cpu_percent", 1),
    ("fake API's chunks late p50, ms", "api_late_p50_ms", 2),
    ("fake API's chunks late p99, ms", "api_late_p99_ms", 2),
    ("fake API's own first chunk p99, ms", "api_first_p99_ms", 2),
    ("connections to the upstream", "api_connections", 0),
    ("  open at once", "api_connections_peak", 0),
)
_LOAD_NOTE = f"the limits are set for {DEFAULT}"
_LABEL_WIDTH, _CELL_WIDTH = 42, 28


def table(comparison: Comparison) -> str:
    """Medians over the runs, with smallest and largest: floor, forkd, and the limits."""
    title = comparison.subject.name if comparison.forkd_runs else "floor"
    count = len(comparison.pairs)
    both = comparison.floor_runs and comparison.forkd_runs
    runs = f"{count} {'pair' if both else 'run'}{'' if count == 1 else 's'}"
    columns = [("floor", comparison.floor_runs), ("forkd", comparison.forkd_runs)]
    columns += [(label(comparison, name), comparison.rival_runs(name)) for name in comparison.rivals]
    ratios = [None, comparison.cpu_ratio, *(comparison.rival_cpu_ratio(name) for name in comparison.rivals)]
    leads = [None, None, *(comparison.rival_over_forkd(name) for name in comparison.rivals)]
    lines = [
        f"{title}: {comparison.shape}, {runs}",
        _line("", [name for name, _ in columns]),
    ]
    for text, name, decimals in _ROWS:
        spreads = [figure(runs, name) for _, runs in columns]
        if any(spreads):
            lines.append(_line(text, [_cell(one, decimals) for one in spreads]))
        if name == "cpu_us":
            lines.append(_line("  floor = 1, pair by pair", ["1", *(_cell(ratio, 2) for ratio in ratios[1:])]))
            if comparison.rivals:
                lines.append(_line("  forkd = 1, pair by pair", ["", "1", *(_cell(lead, 2) for lead in leads[2:])]))
    if comparison.forkd_runs:
        lines += [str(one) for one in check(comparison)]
    lines += [f"note: {note}" for note in notes(comparison)]
    return "\n".join(lines)


def label(comparison: Comparison, rival: str) -> str:
    """A rival's name, with its load where that is another than forkd's."""
    streams = {run.streams for run in comparison.rival_runs(rival)} - {comparison.shape.streams}
    return f"{rival} ({', '.join(map(str, streams))} streams)" if streams else rival


def notes(comparison: Comparison) -> list[str]:
    """What makes the figures doubtful, and what went wrong first when streams were lost."""
    found = [_LOAD_NOTE] if comparison.shape != DEFAULT and not comparison.all_at_once else []
    sides = [("floor", comparison.floor_runs), ("forkd", comparison.forkd_runs)]
    sides += [(name, comparison.rival_runs(name)) for name in comparison.rivals]
    for side, runs in sides:
        for number, run in enumerate(runs, 1):
            if run.lost:
                fates = ", ".join(f"{count} {fate}" for fate, count in run.fates.items())
                found.append(f"{side}, run {number}: {fates}; {run.explanation}")
            if run.exit_status not in ((0,) if side == "forkd" else (0, -SIGTERM)):
                found.append(f"{side}, run {number}: the daemon ended with status {run.exit_status}")
            if run.live < run.streams:
                found.append(f"{side}, run {number}: {run.live} streams were live when the memory was read")
        late = max((run.generator_late_p99_ms or 0 for run in runs), default=0)
        if late > 10 or any(run.generator_cpu_percent > 80 for run in runs):
            found.append(
                f"{side}: the generator could hardly keep up (up to {late:.0f} ms late): its times are not sound"
            )
        slow = max((run.api_late_p99_ms or 0 for run in runs), default=0)
        if slow > 5:
            found.append(f"{side}: the fake API could hardly keep up (chunks up to {slow:.0f} ms late, p99)")
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


def _line(text: str, cells: Sequence[str]) -> str:
    return f"{text:<{_LABEL_WIDTH}}{''.join(f'{cell:<{_CELL_WIDTH}}' for cell in cells)}".rstrip()


def _cell(spread: Spread | None, decimals: int) -> str:
    if spread is None:
        return "-"
    median = f"{spread.median:.{decimals}f}"
    if len(spread.values) == 1:
        return median
    return f"{median} ({spread.low:.{decimals}f} to {spread.high:.{decimals}f})"


def _check_json(one: Check) -> dict[str, object]:
    return {"what": one.what, "value": one.value, "limit": one.limit, "at_least": one.at_least, "ok": one.ok}
