"""The board in words."""

import os
import subprocess
import sys
import time

import msgspec
import psutil
import pytest

from forkd.board import Board, Figures
from forkd.metrics import SPECS
from forkd.overview import HEALTHY_SECS, Overview, PoolStatus, Status, WorkerStatus


def overview(board: Board, pid: int = 0) -> Overview:
    return Overview(board, pid or os.getpid(), time.monotonic() - 60)


def beat(
    board: Board, *, ago: float = 0.0, stage: str = "running", ready: int = 1, room: int = 5, heavy: int = 2
) -> None:
    """`heavy`: workers of that pool that are ready."""
    board.pool_row(0).store("common", ready=ready, wanted=2, queued=0)
    board.pool_row(1).store("heavy", ready=heavy, wanted=2, queued=2)
    board.master_row().store(
        beat_ms=int((time.monotonic() - ago) * 1000),
        stage=stage,
        generation=3,
        ready=ready,
        streams=12,
        queued=2,
        peak=40,
        capacity=100,
        room=room,
        wanted=4,
        pools=2,
    )


def test_the_master() -> None:
    board = Board(1)
    beat(board)
    status = overview(board).status()
    assert (status.pid, status.generation, status.stage, status.obstacle) == (os.getpid(), 3, "running", None)
    assert (status.streams, status.queued, status.peak, status.capacity) == (12, 2, 40, 100)
    assert (status.ready_workers, status.wanted_workers) == (1, 4)
    assert status.pools == (
        PoolStatus(name="common", ready_workers=1, wanted_workers=2),
        PoolStatus(name="heavy", ready_workers=2, wanted_workers=2, queued=2),
    )
    assert 60 <= status.uptime_secs < 90
    assert status.silent_secs < 30


def test_a_worker() -> None:
    board = Board(1)
    beat(board)
    board.peer_row(1).store_born(101, 2, "heavy")
    board.peer_row(1).store("ready", 9, late=True)
    row = board.row(1)
    row.store_totals(50, 40, 1, 9000)
    oldest_ms = int((time.monotonic() - 12.3) * 1000)
    row.store_figures(
        Figures(rss_bytes=41_000_000, cpu_ms=7000, oldest_ms=oldest_ms, cpu_percent=12.34, streams_per_sec=3, stuck=2)
    )
    row.store_note("two are stuck")
    (worker,) = overview(board).status().workers
    assert worker.oldest_stream_secs is not None
    assert 12.3 <= worker.oldest_stream_secs < 42
    assert msgspec.structs.replace(worker, oldest_stream_secs=None) == WorkerStatus(
        index=1,
        pid=101,
        generation=2,
        state="ready",
        late=True,
        streams=9,
        started=50,
        completed=40,
        failed=1,
        bytes_sent=9000,
        rss_bytes=41_000_000,
        cpu_ms=7000,
        cpu_percent=12.3,
        streams_per_sec=3.0,
        stuck_handlers=2,
        pool="heavy",
        note="two are stuck",
    )


def test_who_is_gone_is_not_there_and_who_comes_after_is_a_restart() -> None:
    board = Board(1)
    for index, pid in ((1, 101), (2, 102), (3, 103)):
        board.peer_row(index).store_born(pid, 2)
    board.peer_row(2).store_gone(asked=True)
    board.peer_row(3).store_gone(asked=False)
    board.peer_row(3).store_born(203, 3)
    workers = overview(board).status().workers
    assert [(worker.index, worker.pid, worker.restarts) for worker in workers] == [(1, 101, 0), (3, 203, 1)]
    assert workers[0].oldest_stream_secs is None


@pytest.mark.parametrize(
    ("how", "obstacle"),
    [
        ({}, None),
        ({"ready": 0}, "no worker is ready"),
        ({"heavy": 0}, "no worker of the pool heavy is ready"),
        ({"room": 0}, "no room for another stream"),
        ({"stage": "draining"}, "the master is draining"),
        ({"ago": HEALTHY_SECS + 2}, "the master has been silent for 7 s"),
    ],
)
def test_why_a_handoff_would_not_be_taken(how: dict[str, object], obstacle: str | None) -> None:
    board = Board(1)
    beat(board, **how)  # type: ignore[arg-type]
    assert overview(board).status().obstacle == obstacle


def test_memory_and_cpu_are_the_masters() -> None:
    code = "import time\nwhile time.process_time() < 0.1: pass\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as master:  # type: ignore[call-overload]
        assert master.stdout.read(1)
        status = overview(Board(1), master.pid).status()
        rss_bytes = psutil.Process(master.pid).memory_info().rss
        master.stdin.close()
    assert status.cpu_ms is not None
    assert 80 <= status.cpu_ms < 2000
    assert status.rss_bytes is not None
    assert abs(status.rss_bytes - rss_bytes) < 1 << 20


def test_memory_and_cpu_of_a_master_out_of_sight_are_unknown() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    status = overview(Board(1), gone.pid).status()
    assert (status.rss_bytes, status.cpu_ms) == (None, None)


def test_gauges_have_a_definition_each_and_no_file() -> None:
    board = Board(1)
    beat(board)
    board.peer_row(1).store_born(101, 1)
    board.row(1).store_figures(Figures(rss_bytes=1))
    for name, label, _ in overview(board).gauges():
        assert SPECS[name].kind == "gauge"
        assert not SPECS[name].merge
        assert bool(SPECS[name].labels) == bool(label)
    gauges = [gauge for gauge in overview(board).gauges() if gauge[1]]
    assert [(SPECS[name].labels, label) for name, label, _ in gauges] == [
        *[(("pool",), "common")] * 3,
        *[(("pool",), "heavy")] * 3,
        (("worker",), "1"),
    ]
    assert ("forkd_pool_queued_handoffs", "heavy", 2) in gauges
    shown = {name for name, _, _ in overview(board).gauges()}
    assert shown == {name for name, spec in SPECS.items() if spec.kind == "gauge" and not spec.merge}


def test_a_worker_that_has_not_told_has_no_memory_gauge() -> None:
    board = Board(1)
    board.peer_row(1).store_born(101, 1)
    assert "forkd_worker_resident_memory_bytes" not in {name for name, _, _ in overview(board).gauges()}


def test_the_oldest_stream_of_all() -> None:
    board = Board(1)
    now_ms = int(time.monotonic() * 1000)
    assert ("forkd_oldest_stream_seconds", "", 0) in overview(board).gauges()
    for index, age_ms in ((1, 500), (2, 7500), (3, 0)):
        board.peer_row(index).store_born(100 + index, 1)
        board.row(index).store_figures(Figures(oldest_ms=now_ms - age_ms if age_ms else 0))
    gauges = {name: value for name, _, value in overview(board).gauges()}
    assert 7.5 <= gauges["forkd_oldest_stream_seconds"] < 30


def test_what_an_older_version_says_can_be_read() -> None:
    old = (
        b'{"pid":1,"version":"0.1.0","uptime_secs":1.0,"silent_secs":0.1,"generation":1,"stage":"running",'
        b'"ready_workers":1,"streams":0,"capacity":10,"peak":0,"queued":0,"workers":[{"index":1,"pid":2,'
        b'"generation":1,"state":"ready","late":false,"streams":0,"restarts":0,"of_a_later_version":true}]}'
    )
    status = msgspec.json.decode(old, type=Status)
    assert status.workers[0].rss_bytes == 0
    assert (status.workers[0].pool, status.pools) == ("common", ())
    assert status.wanted_workers is None


def test_programs_are_counted_whoever_runs_them() -> None:
    board = Board(5)
    beat(board)
    assert overview(board).status().programs == 0
    for slot, mark in ((0, 1), (2, 2), (4, 255)):
        board.programs[slot] = mark
    assert overview(board).status().programs == 3
    assert ("forkd_programs", "", 3) in list(overview(board).gauges())
