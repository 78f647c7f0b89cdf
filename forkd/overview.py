"""The board in words: what `/status` answers, whether forkd is well, and the gauges that need no counting.

Made by the process that serves the metrics, which asks nobody: the board is shared memory, and the rest is in /proc.
The classes are the contract with whoever reads `/status`, of which `forkd status` is one. What a later version adds has
a default, so that each version of the one understands every version of the other.
"""

import os
import resource
import time
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

import forkd
from forkd.board import WORKERS_MAX, Board
from forkd.settings import COMMON

HEALTHY_SECS: Final = 5.0
"""A master that has said nothing for so long is stuck."""


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """One worker. Streams and life are the master's word, the rest is the worker's own."""

    index: int
    pid: int
    generation: int
    state: str
    late: bool = False
    streams: int = 0
    restarts: int = 0
    started: int = 0
    completed: int = 0
    failed: int = 0
    bytes_sent: int = 0
    streams_per_sec: float = 0.0
    cpu_percent: float = 0.0
    cpu_ms: int = 0
    rss_bytes: int = 0
    oldest_stream_secs: float | None = None
    stuck_handlers: int = 0
    pool: str = COMMON
    note: str = ""
    """What the operator should know, in words; as a rule nothing."""


class PoolStatus(Struct, frozen=True, kw_only=True):
    """One pool of workers, of the current generation. `queued` clients wait for one of them."""

    name: str
    ready_workers: int
    wanted_workers: int
    queued: int = 0


class Status(Struct, frozen=True, kw_only=True):
    """The master and its workers. `obstacle` is why a handoff would not be taken now, None if it would be.

    `wanted_workers`, `rss_bytes` and `cpu_ms` (the master's) are None where nobody knows.
    """

    pid: int
    version: str
    uptime_secs: float
    silent_secs: float
    generation: int
    stage: str
    obstacle: str | None = None
    ready_workers: int = 0
    wanted_workers: int | None = None
    streams: int = 0
    capacity: int = 0
    peak: int = 0
    queued: int = 0
    programs: int = 0
    rss_bytes: int | None = None
    cpu_ms: int | None = None
    pools: tuple[PoolStatus, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()


class Overview:
    """Looks at the board. `master_pid` and `started_at` (monotonic seconds) are the master's."""

    def __init__(self, board: Board, master_pid: int, started_at: float) -> None:
        self._board = board
        self._master = board.master_row()
        self._master_pid = master_pid
        self._started_at = started_at

    def status(self) -> Status:
        """Everything there is to tell."""
        master = self._master
        usage = _usage(self._master_pid)
        return Status(
            pid=self._master_pid,
            version=forkd.__version__,
            uptime_secs=round(time.monotonic() - self._started_at, 1),
            silent_secs=round(self._silent_secs(), 1),
            generation=master.generation,
            stage=master.stage,
            obstacle=self.sickness() or self.obstacle() or None,
            ready_workers=master.ready,
            wanted_workers=master.wanted or None,
            streams=master.streams,
            capacity=master.capacity,
            peak=master.peak,
            queued=master.queued,
            programs=self._programs(),
            rss_bytes=usage and usage[0],
            cpu_ms=usage and usage[1],
            pools=tuple(self._pools()),
            workers=tuple(self._workers()),
        )

    def _pools(self) -> Iterator[PoolStatus]:
        for number in range(self._master.pools):
            row = self._board.pool_row(number)
            yield PoolStatus(name=row.name, ready_workers=row.ready, wanted_workers=row.wanted, queued=row.queued)

    def _workers(self) -> Iterator[WorkerStatus]:
        now = time.monotonic()
        for index in range(1, WORKERS_MAX):
            peer = self._board.peer_row(index)
            if not peer.pid:  # indexes are given from below: nobody ever had this one, or one above
                return
            if not peer.life:
                continue
            row = self._board.row(index)
            figures = row.figures
            started, completed, failed, sent_bytes = row.totals
            yield WorkerStatus(
                index=index,
                pid=peer.pid,
                generation=peer.generation,
                state=peer.life,
                late=peer.late,
                streams=peer.streams,
                restarts=peer.restarts,
                started=started,
                completed=completed,
                failed=failed,
                bytes_sent=sent_bytes,
                streams_per_sec=round(figures.streams_per_sec, 1),
                cpu_percent=round(figures.cpu_percent, 1),
                cpu_ms=figures.cpu_ms,
                rss_bytes=figures.rss_bytes,
                oldest_stream_secs=round(max(0.0, now - figures.oldest_ms / 1000), 1) if figures.oldest_ms else None,
                stuck_handlers=figures.stuck,
                pool=peer.pool,
                note=row.note,
            )

    def gauges(self) -> Iterator[tuple[str, str, float]]:
        """Name, value of the only label (or ""), and value of each gauge of `forkd.metrics.SPECS` that is ours.

        A worker is its index, which others get after it: there are never more of them than were alive at once.
        """
        master = self._master
        yield "forkd_workers_ready", "", master.ready
        if master.wanted:
            yield "forkd_workers_wanted", "", master.wanted
        yield "forkd_queued_handoffs", "", master.queued
        for pool in self._pools():
            yield "forkd_pool_workers_ready", pool.name, pool.ready_workers
            yield "forkd_pool_workers_wanted", pool.name, pool.wanted_workers
            yield "forkd_pool_queued_handoffs", pool.name, pool.queued
        yield "forkd_capacity_streams", "", master.capacity
        yield "forkd_programs", "", self._programs()
        workers = list(self._workers())
        yield (
            "forkd_oldest_stream_seconds",
            "",
            max((worker.oldest_stream_secs or 0.0 for worker in workers), default=0),
        )
        for worker in workers:
            if worker.rss_bytes:  # it has not told yet
                yield "forkd_worker_resident_memory_bytes", str(worker.index), worker.rss_bytes
        yield "forkd_stuck_handlers", "", sum(worker.stuck_handlers for worker in workers)

    def sickness(self) -> str:
        """What is wrong with the master, or "". (If it were dead, this process would be, too.)"""
        silent = self._silent_secs()
        return f"the master has been silent for {silent:.0f} s" if silent >= HEALTHY_SECS else ""

    def obstacle(self) -> str:
        """Why a healthy master would not take a handoff now, or ""."""
        master = self._master
        if master.stage != "running":
            return f"the master is {master.stage}"
        if not master.ready:
            return "no worker is ready"
        for pool in self._pools():
            if not pool.ready_workers:
                return f"no worker of the pool {pool.name} is ready"
        return "" if master.room else "no room for another stream"

    def _programs(self) -> int:
        """How many programs (`exec`) run for clients, or are about to."""
        board = self._board
        return board.slots - bytes(board.programs).count(0)

    def _silent_secs(self) -> float:
        return max(0.0, time.monotonic() - self._master.beat_ms / 1000)


def _usage(pid: int) -> tuple[int, int] | None:
    """Resident memory in bytes and CPU time in ms of another process, None if they cannot be had (proc(5))."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm, open(f"/proc/{pid}/stat", "rb") as stat:
            pages = int(statm.read().split()[1])
            # The second field is a name in brackets, which may hold anything; utime and stime are the 14th and 15th.
            user, system = stat.read().rpartition(b")")[2].split()[11:13]
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize(), (int(user) + int(system)) * 1000 // os.sysconf("SC_CLK_TCK")
