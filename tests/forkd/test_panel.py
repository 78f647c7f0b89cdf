"""What `forkd status` shows."""

from io import StringIO
from typing import Any

import msgspec
import pytest
from rich.console import Console

from forkd import panel
from forkd.overview import Status, WorkerStatus
from forkd.panel import Panel, size, span


def worker(index: int, **more: Any) -> WorkerStatus:
    return WorkerStatus(**{"index": index, "pid": 4711 + index, "generation": 1, "state": "ready", **more})


def status(*workers: WorkerStatus, **more: Any) -> Status:
    base: dict[str, Any] = {
        "pid": 4711,
        "version": "1.2.3",
        "uptime_secs": 93_784.0,
        "silent_secs": 0.1,
        "generation": 1,
        "stage": "running",
        "ready_workers": 2,
        "wanted_workers": 2,
        "streams": 812,
        "capacity": 100_000,
        "peak": 1204,
        "rss_bytes": 31 << 20,
        "cpu_ms": 5000,
        "workers": workers,
    }
    return Status(**{**base, **more})


def shown(view: Panel, *, width: int = 80, height: int = 25, live: bool = False, **how: Any) -> list[str]:
    """The lines, as on a terminal of this size; in colour, unless told otherwise."""
    out = StringIO()
    terminal: dict[str, Any] = {"force_terminal": True, "color_system": None, **how}
    console = Console(file=out, width=width, height=height, highlight=False, _environ={}, **terminal)
    console.print(view.render(console, live=live))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_everything_the_operator_asks_for() -> None:
    view = Panel(
        status(
            worker(1, streams=406, streams_per_sec=12.0, cpu_percent=3.4, rss_bytes=40 << 20, oldest_stream_secs=61.5),
            worker(2, streams=406, streams_per_sec=13.5, cpu_percent=101.0, rss_bytes=3 << 30, restarts=7),
            queued=4,
        )
    )
    head, load, blank, header, master, first, second = shown(view)
    assert head.split("   ") == ["forkd 1.2.3", "● running", "up 1 d 2 h", "generation 1", "2 of 2 workers ready"]
    assert load.startswith("812 of 100,000 streams")
    assert load.endswith("peak 1,204   4 queued   25.5 new/s")
    assert blank == ""
    assert header.split() == ["pid", "gen", "state", "streams", "new/s", "cpu", "memory", "restarts", "oldest"]
    assert master.split() == ["master", "4711", "1", "running", "812", "31", "MB"]
    assert " ".join(first.split()) == "worker 1 4712 1 ready 406 12.0 3.4% 40 MB 0 1 m 1 s"
    assert " ".join(second.split()) == "worker 2 4713 1 ready 406 13.5 101.0% 3.0 GB 7"


def test_80_columns_hold_the_largest_of_figures() -> None:
    most = worker(
        1024,
        pid=4_194_304,
        generation=99,
        state="draining",
        streams=15_000,
        streams_per_sec=9999.9,
        cpu_percent=100.0,
        rss_bytes=999 << 20,
        restarts=1000,
        oldest_stream_secs=299.0,
    )
    lines = shown(Panel(status(most, uptime_secs=9e7, streams=100_000, peak=100_000, queued=1024)))
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    assert lines[-1].endswith("999 MB     1000 4 m 59 s")


def test_less_room_takes_whole_columns() -> None:
    most = worker(1024, pid=4_194_304, generation=99, state="draining", streams=15_000, cpu_percent=100.0, restarts=7)
    lines = shown(Panel(status(most, rss_bytes=999 << 20)), width=50)
    assert all(len(line) <= 50 for line in lines)
    assert not any("…" in line for line in lines)
    assert lines[-3].split() == ["pid", "state", "streams", "cpu", "memory"]
    assert lines[-2].split() == ["master", "4711", "running", "812", "999", "MB"]
    assert lines[-1].split()[:6] == ["worker", "1024", "4194304", "draining", "15,000", "100.0%"]
    assert "peak 1,204" in " ".join(" ".join(lines).split())


def test_more_room_gives_more_air() -> None:
    view = Panel(status(worker(1)))
    assert len(shown(view, width=120)[-1]) > len(shown(view, width=80)[-1])


def test_a_worker_whose_heart_is_not_heard_is_late() -> None:
    assert " late " in shown(Panel(status(worker(1, late=True))))[-1]


def test_workers_with_something_to_say_say_it() -> None:
    view = Panel(status(*(worker(index, note="stuck" if index % 2 else "") for index in range(1, 20))))
    lines = shown(view, height=22, live=True)
    assert len(lines) <= 21
    assert [line for line in lines if "stuck" in line] == [f"worker {index}: stuck" for index in (1, 3, 5)]


def test_a_worker_of_a_pool_is_told_from_the_others_even_in_80_columns() -> None:
    figures = {"rss_bytes": 40 << 20, "oldest_stream_secs": 299.0, "streams": 15_000, "pid": 4_194_304}
    view = Panel(status(worker(1, **figures), worker(3, pool="heavy", **figures), worker(4, pool="x" * 32, **figures)))
    lines = shown(view)[-3:]
    assert [line[:12] for line in lines] == ["worker 1    ", "3 (heavy)   ", "4 (xxxxxxxx "]
    assert {line[12:] for line in lines} == {lines[0][12:]}
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].endswith("4 m 59 s")
    assert [line.partition(" ready")[0].split("  ")[0] for line in shown(view, width=130)[-3:]] == [
        "worker 1",
        "worker 3 (heavy)",
        f"worker 4 ({'x' * 32})",
    ]


def test_newer_generations_come_first() -> None:
    lines = shown(Panel(status(worker(1, state="draining"), worker(2, state="draining"), worker(3, generation=2))))
    assert [line.split()[1] for line in lines[-3:]] == ["3", "1", "2"]


def test_what_is_wrong_is_said() -> None:
    line = shown(Panel(status(obstacle="no worker is ready", ready_workers=0)))[2]
    assert line == "takes no handoffs: no worker is ready"


def test_a_daemon_that_went_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(panel.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    view = Panel(status())
    view.lost("Nothing answers.")
    now = 1012.0
    assert shown(view)[2] == "Nothing answers. What you see is 12 s old."
    view.update(status())
    assert shown(view)[2] == ""


def test_the_masters_cpu_is_of_the_time_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(panel.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    view = Panel(status(cpu_ms=5000))
    assert view.master_cpu_percent is None
    now = 1002.0
    view.update(status(cpu_ms=5500))
    assert view.master_cpu_percent == 25.0
    assert " 25.0% " in shown(view)[4]
    for other in (status(pid=1, cpu_ms=6000), status(cpu_ms=None), status(cpu_ms=5000)):
        view.update(other)
        assert view.master_cpu_percent is None


def test_a_live_table_fits_the_screen() -> None:
    view = Panel(status(*(worker(index) for index in range(1, 65))))
    lines = shown(view, height=20, live=True)
    assert len(lines) == 19  # the cursor is on the last
    assert lines[-1] == "Ctrl-C to leave"
    listed = sum(line.startswith("worker ") for line in lines)
    assert lines[-3] == f"and {64 - listed} more"
    view.update(msgspec.structs.replace(view.status, obstacle="no worker is ready"))
    assert len(shown(view, height=20, live=True)) == 19
    assert sum(line.startswith("worker ") for line in shown(view)) == 64
    assert len(shown(view, height=1, live=True)) > 5


@pytest.mark.parametrize("workers", range(14))
def test_workers_that_fit_are_all_shown(workers: int) -> None:
    lines = shown(Panel(status(*(worker(index) for index in range(1, workers + 1)))), height=20, live=True)
    assert len(lines) <= 19
    assert sum(line.startswith("worker ") for line in lines) + ("more" in lines[-3]) >= min(workers, 11)


def test_it_can_do_without_unicode_and_colour() -> None:
    class Ascii(StringIO):
        encoding = "ascii"  # type: ignore[assignment]

    out = Ascii()
    console = Console(file=out, width=80, no_color=True, force_terminal=True, highlight=False)
    console.print(Panel(status(worker(1), queued=1, streams=90_000)).render(console))
    assert out.getvalue().isascii()
    assert "\x1b[3" not in out.getvalue()


def test_nothing_that_a_daemon_says_is_markup() -> None:
    assert "forkd [red]1[/]" in shown(Panel(status(version="[red]1[/]")))[0]


@pytest.mark.parametrize(
    ("secs", "said"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 m 0 s"), (3599, "59 m 59 s"), (3600, "1 h 0 m"), (90_000, "1 d 1 h")],
)
def test_spans(secs: float, said: str) -> None:
    assert span(secs) == said


@pytest.mark.parametrize(("count", "said"), [(0, "0 MB"), (25 << 20, "25 MB"), (1 << 30, "1.0 GB")])
def test_sizes(count: int, said: str) -> None:
    assert size(count) == said


def test_programs_are_told_where_there_are_some() -> None:
    assert "program" not in "".join(shown(Panel(status(worker(1)))))
    assert shown(Panel(status(worker(1), programs=1)))[2] == "1 program running (exec)"
    lines = shown(Panel(status(*[worker(index) for index in range(1, 30)], programs=1200)), live=True, height=20)
    assert lines[2] == "1,200 programs running (exec)"
    assert len(lines) <= 20
