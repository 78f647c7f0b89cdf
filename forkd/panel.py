"""What `forkd status` shows: a head of three lines, and a table of the master and its workers.

It is made to be read in 80 columns and without colour; with more of either it gains air, not facts. With fewer columns
it loses facts, whole columns of them, rather than the ends of its numbers.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forkd.overview import Status, WorkerStatus
from forkd.settings import COMMON

_ROOMY_COLUMNS: Final = 90
_WHOLE_COLUMNS: Final = 80
_ALL: Final = ("", "pid", "gen", "state", "streams", "new/s", "cpu", "memory", "restarts", "oldest")
_FEW: Final = ("", "pid", "state", "streams", "cpu", "memory")
"""What a narrow terminal, a telephone's, has room for."""
_NOTES_MAX: Final = 3
_BAR_COLUMNS: Final = 12
_NAME_COLUMNS: Final = 11
"""For a worker's number and its pool where there is not much room."""
_LINES_BESIDE_ROWS: Final = 7
"""Of a live panel: the head, the table's header, what is below, and the blank lines between."""
_STYLES: Final = {
    "running": "green",
    "ready": "green",
    "starting": "cyan",
    "standby": "cyan",
    "draining": "yellow",
    "stopping": "yellow",
    "late": "bold red",
}


class Panel:
    """Knows the last status, and what takes two of them to know."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.master_cpu_percent: float | None = None
        self._taken_at = time.monotonic()
        self._lost = ""

    def update(self, status: Status) -> None:
        """A newer status has come."""
        now = time.monotonic()
        before, elapsed = self.status, now - self._taken_at
        self.master_cpu_percent = None
        if before.pid == status.pid and before.cpu_ms is not None and status.cpu_ms is not None and elapsed > 0:
            self.master_cpu_percent = max(0, status.cpu_ms - before.cpu_ms) / elapsed / 10
        self.status = status
        self._taken_at = now
        self._lost = ""

    def lost(self, why: str) -> None:
        """There is no newer one."""
        self._lost = why

    def render(self, console: Console, *, live: bool = False) -> RenderableType:
        """All of it, in the console's width; if it is `live` in its height too, which leaves workers out if it must."""
        workers = sorted(self.status.workers, key=lambda worker: (-worker.generation, worker.index))
        notes = [Text(f"worker {one.index}: {one.note}", "bold red") for one in workers if one.note][:_NOTES_MAX]
        # A note is longer than most terminals are wide.
        wrapped = 2 if console.width < _WHOLE_COLUMNS else 0  # of the head
        beside = _LINES_BESIDE_ROWS + wrapped + len(self._remarks()) + (2 * len(notes) + 1 if notes else 0)
        most = max(2, console.height - beside) if live else None
        shown = workers if most is None or len(workers) < most else workers[: most - 2]
        parts: list[RenderableType] = [*self._head(console), "", self._table(console, shown)]
        if len(shown) < len(workers):
            parts.append(Text(f"and {len(workers) - len(shown)} more", "dim"))
        if notes:
            parts += ["", *notes]
        if live:
            parts += ["", Text("Ctrl-C to leave", "dim")]
        return Group(*parts)

    def _head(self, console: Console) -> list[RenderableType]:
        status = self.status
        dot = "●" if console.encoding.startswith("utf") else "*"
        rate = sum(worker.streams_per_sec for worker in status.workers)
        state = Text.assemble(
            (f"forkd {status.version}", "bold"),
            "   ",
            (f"{dot} {status.stage}", "yellow" if status.obstacle else _STYLES.get(status.stage, "")),
            f"   up {span(status.uptime_secs)}   generation {status.generation}   ",
            self._workers(),
        )
        streams = Text.assemble((f"{status.streams:,}", "bold"), f" of {status.capacity:,} streams")
        bar = _bar(status.streams, max(1, status.capacity))
        queued = Text(f"{status.queued:,} queued", "yellow" if status.queued else "")
        rest = (Text(f"peak {status.peak:,}"), queued, Text(f"{rate:,.1f} new/s"))
        if console.width < _WHOLE_COLUMNS:
            return [state, Text("   ").join((streams, *rest)), *self._remarks()]
        load = Table.grid(padding=(0, 3, 0, 0))
        load.add_row(streams, bar, *rest)
        return [state, load, *self._remarks()]

    def _remarks(self) -> list[Text]:
        """What is said only when there is reason to, a line each."""
        trouble, running = self._trouble(), self.status.programs
        remarks = [Text(f"{running:,} program{'s' if running > 1 else ''} running (exec)")] if running else []
        return [*remarks, Text(trouble, "bold red")] if trouble else remarks

    def _workers(self) -> Text:
        status = self.status
        if status.wanted_workers is None:
            return Text(f"{status.ready_workers} workers ready")
        short = status.ready_workers < status.wanted_workers
        return Text(f"{status.ready_workers} of {status.wanted_workers} workers ready", "yellow" if short else "")

    def _trouble(self) -> str:
        if self._lost:
            return f"{self._lost} What you see is {span(time.monotonic() - self._taken_at)} old."
        return f"takes no handoffs: {self.status.obstacle}" if self.status.obstacle else ""

    def _table(self, console: Console, workers: Iterable[WorkerStatus]) -> Table:
        roomy = console.width >= _ROOMY_COLUMNS
        table = Table(box=None, padding=(0, 2 if roomy else 1, 0, 0), pad_edge=False, header_style="dim")
        columns = _ALL if console.width >= _WHOLE_COLUMNS else _FEW
        for name in columns:
            if not name:
                table.add_column("", no_wrap=True, max_width=None if roomy else _NAME_COLUMNS, overflow="crop")
            elif name == "state":
                table.add_column(name, no_wrap=True, min_width=8)
            else:
                table.add_column(name, justify="right", no_wrap=True, min_width=None if name in ("pid", "gen") else 6)
        for row in (self._master(), *(_worker(worker, roomy=roomy) for worker in workers)):
            table.add_row(*(cell for name, cell in zip(_ALL, row, strict=False) if name in columns))
        return table

    def _master(self) -> Sequence[RenderableType]:
        status, cpu = self.status, self.master_cpu_percent
        return (
            Text("master", "bold"),
            str(status.pid),
            str(status.generation),
            Text(status.stage, _STYLES.get(status.stage, "")),
            f"{status.streams:,}",
            "",
            "" if cpu is None else f"{cpu:.1f}%",
            "" if status.rss_bytes is None else size(status.rss_bytes),
        )


def _worker(worker: WorkerStatus, *, roomy: bool) -> Sequence[RenderableType]:
    name = f"worker {worker.index}"
    if worker.pool != COMMON:
        name = f"{name} ({worker.pool})" if roomy else f"{worker.index} ({worker.pool})"
    state = "late" if worker.late else worker.state
    return (
        Text(name),
        str(worker.pid),
        str(worker.generation),
        Text(state, _STYLES.get(state, "")),
        Text(f"{worker.streams:,}", "" if worker.streams else "dim"),
        Text(f"{worker.streams_per_sec:,.1f}", "" if worker.streams_per_sec else "dim"),
        Text(f"{worker.cpu_percent:.1f}%", "" if worker.cpu_percent else "dim"),
        size(worker.rss_bytes) if worker.rss_bytes else "",
        Text(str(worker.restarts), "yellow" if worker.restarts else "dim"),
        "" if worker.oldest_stream_secs is None else span(worker.oldest_stream_secs),
    )


def _bar(count: int, most: int) -> ProgressBar:
    style = "red" if count > 0.9 * most else "yellow" if count > 0.7 * most else "green"
    return ProgressBar(total=most, completed=count, width=_BAR_COLUMNS, complete_style=style, finished_style=style)


def span(secs: float) -> str:
    """A time in two units at most.

    >>> span(12.7), span(61), span(7300), span(200_000)
    ('12 s', '1 m 1 s', '2 h 1 m', '2 d 7 h')
    """
    whole = int(secs)
    for unit, name, smaller, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {small_name}"
    return f"{whole} s"


def size(count: int) -> str:
    """Bytes as people say them, in powers of 1024.

    >>> size(800_000), size(41_943_040), size(3_221_225_472)
    ('1 MB', '40 MB', '3.0 GB')
    """
    return f"{count / (1 << 30):.1f} GB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MB"
