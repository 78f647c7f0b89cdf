"""One measured run: a fresh daemon, one load, what both have cost.

The window opens just before the first handoff and closes when the last stream has ended at its client and
`SETTLE_SECS` have passed, in which the daemon does what it owes after a stream: closing, reporting, logging. Nothing is
subtracted from it; what an idle daemon costs (heartbeats, a metrics process) is measured before, over `IDLE_SECS`, and
reported beside it.

Memory is the growth of the daemon between the idle state after warm-up and the moment at which all streams are live.
"""

import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from driver import Generator
from percentiles import percentile
from proc import MachineTime, Memory
from scraper import scraping
from shape import Shape
from subjects import Subject

IDLE_SECS = 1.0
SETTLE_SECS = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of one run. Percentiles and memory are None when no stream got so far."""

    subject: str
    streams: int
    cpu_us: float  # user+system of all processes, per stream that arrived whole, microseconds
    master_cpu_us: float  # of it, the first process alone: forkd's master, per handoff
    memory_kb: float | None  # PSS per live stream, 1 KB = 1024 bytes
    memory_unfiled_kb: float | None  # of it, what is no page of a file: see proc.py
    live: int  # streams alive when the memory was read
    live_peak: int
    ttfb_p50_ms: float | None
    ttfb_p99_ms: float | None
    gap_p50_ms: float | None  # of each stream's longest gap
    gap_p99_ms: float | None
    eof_p99_ms: float | None  # from the last byte to EOF
    lost: int
    fates: dict[str, int]
    processes: int
    idle_cpu_ms: float  # of the idle daemon, per second
    generator_cpu_percent: float  # of one CPU, during the window
    generator_late_p99_ms: float | None
    other_cpu_percent: float  # of one CPU: all else that ran on the machine, or that the hypervisor took away
    api_cpu_percent: float | None  # of one CPU, during the window; None, like what follows, where no fake API is needed
    api_late_p50_ms: float | None
    api_late_p99_ms: float | None
    api_first_p99_ms: float | None
    api_connections: int | None
    api_connections_peak: int | None
    connect_retries: int
    secs: float
    exit_status: int
    explanation: str

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


def measure(subject: Subject, shape: Shape, load: Path) -> Run:
    """Start the subject, put the load on it, stop it. Raises TrialError or LoadError if that cannot be done."""
    with tempfile.TemporaryDirectory(prefix="forkd-bench-") as name:
        directory = Path(name)
        daemon = subject.start(directory, shape)
        try:
            generator = Generator(load, shape, daemon, directory)
            try:
                tree, api = daemon.tree, daemon.api
                idle_ns = -tree.cpu_ns()
                time.sleep(IDLE_SECS)
                idle_ns += tree.cpu_ns()

                alive: list[tuple[int, Memory]] = []  # how many streams and what they occupy, when all are live
                memory = tree.memory()
                api_ns = -api.tree.cpu_ns() if api else 0
                machine, cpu_ns, started = MachineTime.now(), tree.cpu_ns(), time.monotonic()
                master_ns = -tree.root_cpu_ns()
                with scraping(daemon.metrics_url) if daemon.metrics_url else nullcontext():
                    outcome = generator.run(lambda live: alive.append((live, tree.memory() - memory)))
                    time.sleep(SETTLE_SECS)
                cpu_ns, processes = tree.cpu_ns() - cpu_ns, len(tree.pids())
                master_ns += tree.root_cpu_ns()
                window_secs = time.monotonic() - started
                api_ns += api.tree.cpu_ns() if api else 0
                ours_secs = (cpu_ns + api_ns) / 1e9 + outcome.generator_cpu_secs
                other_percent = _others(machine, ours_secs, window_secs)
            finally:
                generator.close()
        finally:
            exit_status = daemon.stop()
    [(live, grown)] = alive
    totals = api.totals if api else None
    return Run(
        subject=subject.name,
        streams=shape.streams,
        cpu_us=cpu_ns / 1000 / max(1, shape.streams - outcome.lost),
        master_cpu_us=master_ns / 1000 / shape.streams,
        memory_kb=grown.pss / 1024 / live if live else None,
        memory_unfiled_kb=grown.unfiled / 1024 / live if live else None,
        live=live,
        live_peak=outcome.live_peak,
        ttfb_p50_ms=percentile(outcome.ttfb_ms, 50),
        ttfb_p99_ms=percentile(outcome.ttfb_ms, 99),
        gap_p50_ms=percentile(outcome.gap_ms, 50),
        gap_p99_ms=percentile(outcome.gap_ms, 99),
        eof_p99_ms=percentile(outcome.tail_ms, 99),
        lost=outcome.lost,
        fates=outcome.fates,
        processes=processes,
        idle_cpu_ms=idle_ns / 1e6 / IDLE_SECS,
        generator_cpu_percent=100 * outcome.generator_cpu_secs / outcome.secs,
        generator_late_p99_ms=percentile(outcome.late_ms, 99),
        other_cpu_percent=other_percent,
        api_cpu_percent=100 * api_ns / 1e9 / window_secs if api else None,
        api_late_p50_ms=totals.late_p50_ms if totals else None,
        api_late_p99_ms=totals.late_p99_ms if totals else None,
        api_first_p99_ms=totals.first_p99_ms if totals else None,
        api_connections=totals.connections if totals else None,
        api_connections_peak=totals.connections_peak if totals else None,
        connect_retries=outcome.connect_retries,
        secs=outcome.secs,
        exit_status=exit_status,
        explanation=outcome.explanation,
    )


def _others(before: MachineTime, ours_secs: float, window_secs: float) -> float:
    after = MachineTime.now()
    busy_secs = after.busy_secs + after.stolen_secs - before.busy_secs - before.stolen_secs
    return max(0.0, 100 * (busy_secs - ours_secs) / window_secs)
