"""Every metric's definition, and how a process counts.

Counting is local: a dict in this process, added to once per stream or less. `flush`, about once a second, adds what has
gathered to prometheus_client's multiprocess files, which whoever serves the metrics reads together. So a scrape lags
by a second at most, and a stream costs no lock and no mmap.

A file is keyed by who writes it ("master", "worker-3", after an upgrade "b-worker-3"), not by pid: a successor with the
same index goes on where the last one stopped, so counters never fall and restarts add no files. Two live processes must
never share a key.

Names, types, labels and buckets of `daemon_*` are the reference's; `forkd_*` is new.
"""

import os
from bisect import bisect_left
from collections import defaultdict
from typing import Any, Final, Literal, NamedTuple

from forkd.reasons import REASONS, Metric


class Spec(NamedTuple):
    """One metric. `first_bucket` is a histogram's smallest bound, in seconds; 14 more follow, each twice the last.

    `values` are all that an only label can have, where they are few: those are shown as 0 before they were counted.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    first_bucket: float = 0.0
    values: tuple[str, ...] = ()
    merge: str = ""
    """How a gauge of several masters is one: an old one still drains after an upgrade. `sum` or `max`. A gauge without
    it is in no file: whoever serves the metrics reads it off the board (`forkd.overview`)."""


BUCKETS: Final = 15
FILE_BYTES: Final = 512 << 10
"""Room for a hundred and fifty series of histograms, of which a backend has two and each of its models two more."""
_REASONS: Final = tuple(Metric)
_OUTCOMES: Final = ("redispatched", "ended", "poison", "closed")
"""What `forkd.ledger.Ledger.judge` returns."""

SPECS: Final[dict[str, Spec]] = {
    "daemon_active_connections": Spec("gauge", "Clients handed over and not yet done", merge="sum"),
    "daemon_connections_total": Spec("counter", "Handoffs received"),
    "daemon_connections_rejected_total": Spec("counter", "Handoffs refused for want of room"),
    "daemon_active_streams": Spec("gauge", "Streams that a worker has", merge="sum"),
    "daemon_peak_streams": Spec("gauge", "The most streams at once since the start", merge="max"),
    "daemon_bytes_sent_total": Spec("counter", "Bytes sent to clients"),
    "daemon_chunks_sent_total": Spec("counter", "Chunks of text sent to clients"),
    "daemon_stream_errors_total": Spec("counter", "Streams that failed", ("reason",), values=_REASONS),
    "daemon_stream_duration_seconds": Spec("histogram", "From handoff to end", (), 0.01),
    "daemon_handoffs_total": Spec("counter", "Handoffs received whole"),
    "daemon_handoff_errors_total": Spec(
        "counter", "Handoffs that could not become a stream", ("reason",), values=_REASONS
    ),
    "daemon_handoff_duration_seconds": Spec("histogram", "From receipt to the worker", (), 0.0001),
    "daemon_backend_requests_total": Spec("counter", "Streams given to a backend", ("backend",)),
    "daemon_backend_errors_total": Spec("counter", "Streams that a backend failed", ("backend",)),
    "daemon_backend_duration_seconds": Spec("histogram", "From a backend's start to its end", ("backend",), 0.01),
    "daemon_backend_ttfb_seconds": Spec("histogram", "From a backend's start to its first text", ("backend",), 0.001),
    "forkd_stream_errors_total": Spec("counter", "Streams that failed, by code", ("code",)),
    "forkd_handoff_errors_total": Spec("counter", "Handoffs that could not become a stream, by code", ("code",)),
    "forkd_handoffs_relayed_total": Spec("counter", "Handoffs of clients that Apache relays, under TLS or HTTP/2"),
    "forkd_streams_recovered_total": Spec(
        "counter", "Streams of dead workers, by what became of them", ("outcome",), values=_OUTCOMES
    ),
    "forkd_backend_errors_total": Spec("counter", "Streams that a backend failed, by code", ("backend", "code")),
    "forkd_backend_retries_total": Spec(
        "counter", "Requests that were sent again, by what went wrong", ("backend", "code")
    ),
    "forkd_backend_events_skipped_total": Spec("counter", "Malformed events that were left out", ("backend",)),
    "forkd_backend_connections_total": Spec("counter", "Connections opened", ("backend",)),
    "forkd_backend_time_to_first_token_seconds": Spec(
        "histogram", "From handoff to a backend's first text", ("backend", "model"), 0.01
    ),
    "forkd_backend_time_per_output_token_seconds": Spec(
        "histogram", "Between two tokens, on average over a stream", ("backend", "model"), 0.001
    ),
    "forkd_tokens_total": Spec("counter", "Tokens, as the backend reports them", ("backend", "model", "direction")),
    "forkd_master_errors_total": Spec("counter", "Bugs in the master that it survived; each is in the log"),
    "forkd_worker_deaths_total": Spec("counter", "Workers that died unasked"),
    "forkd_handoff_warnings_total": Spec("counter", "Handoffs answered with defaults, by what was wrong", ("code",)),
    "forkd_response_headers_refused_total": Spec("counter", "Application response headers that could not pass"),
    "forkd_log_lines_dropped_total": Spec("counter", "Log lines dropped because they could not be written at once"),
    "forkd_metrics_files_skipped_total": Spec("counter", "Files of counts that a scrape could not read and left out"),
    "forkd_workers_ready": Spec("gauge", "Workers that take handoffs"),
    "forkd_workers_wanted": Spec("gauge", "Workers that there should be"),
    "forkd_queued_handoffs": Spec("gauge", "Clients that wait for a worker"),
    "forkd_pool_workers_ready": Spec("gauge", "Workers of a pool that take handoffs", ("pool",)),
    "forkd_pool_workers_wanted": Spec("gauge", "Workers of a pool that there should be", ("pool",)),
    "forkd_pool_queued_handoffs": Spec("gauge", "Clients that wait for a worker of a pool", ("pool",)),
    "forkd_capacity_streams": Spec("gauge", "Streams that there is room for in all"),
    "forkd_programs": Spec("gauge", "Programs that run for clients"),
    "forkd_oldest_stream_seconds": Spec("gauge", "Age of the oldest stream"),
    "forkd_stuck_handlers": Spec("gauge", "Handlers that go on though nobody listens any more"),
    "forkd_worker_resident_memory_bytes": Spec("gauge", "Resident memory", ("worker",)),
}
BOUNDS: Final = {
    name: [spec.first_bucket * 2**power for power in range(BUCKETS)]
    for name, spec in SPECS.items()
    if spec.kind == "histogram"
}


class Metrics:
    """This process's counts. With `directory` None they are kept and never written (`--benchmark`).

    Neither are they where the files cannot be had; then `fault` says why, for the owner's log. Streams matter more.
    """

    def __init__(self, directory: str | None, key: str) -> None:
        self._counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        """By name and labels."""
        self._observed: dict[tuple[str, ...], list[float]] = {}
        self.fault: OSError | None = None
        self._files: dict[str, Any] | None = None
        if directory is not None:
            try:
                self._files = _open(directory, key)
            except OSError as error:
                self.fault = error

    def count(self, name: str, *labels: str, amount: float = 1) -> None:
        """Add to a counter."""
        self._counts[name, *labels] += amount

    def observe(self, name: str, secs: float, *labels: str) -> None:
        """Add a value to a histogram."""
        key = (name, *labels)
        cells = self._observed.get(key)
        if cells is None:
            cells = self._observed[key] = [0.0] * (BUCKETS + 2)
        cells[bisect_left(BOUNDS[name], secs)] += 1
        cells[-1] += secs

    def stream_ended(self, backend: str, sent: int, chunks: int, duration: float, ttfb: float) -> None:
        """All that is counted of every stream. `backend` may be "", and `ttfb` negative: there was none."""
        counts = self._counts
        counts["daemon_bytes_sent_total",] += sent
        counts["daemon_chunks_sent_total",] += chunks
        self.observe("daemon_stream_duration_seconds", duration)
        if backend:
            counts["daemon_backend_requests_total", backend] += 1
            self.observe("daemon_backend_duration_seconds", duration, backend)
            if ttfb >= 0:
                self.observe("daemon_backend_ttfb_seconds", ttfb, backend)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge, at once. Only the master has gauges."""
        if self._files is not None:
            self._files[name].set(value)

    def stream_failed(self, code: str) -> None:
        """Count a failed stream under its code and under the reference's reason."""
        self.count("forkd_stream_errors_total", code)
        self.count("daemon_stream_errors_total", REASONS[code].metric)

    def handoff_failed(self, code: str) -> None:
        """Count a handoff that could not become a stream under its code and under the reference's reason."""
        self.count("forkd_handoff_errors_total", code)
        self.count("daemon_handoff_errors_total", REASONS[code].metric)

    def flush(self) -> None:
        """Add what has gathered since the last time to the files."""
        if self._files is None:
            return
        counts, self._counts = self._counts, defaultdict(float)
        for (name, *labels), amount in counts.items():
            metric = self._files[name]
            (metric.labels(*labels) if labels else metric).inc(amount)
        observed, self._observed = self._observed, {}
        for (name, *labels), cells in observed.items():
            metric = self._files[name]
            child = metric.labels(*labels) if labels else metric
            # prometheus_client can observe one value at a time only; these are the cells that its observe() adds to.
            for bucket, amount in zip(child._buckets, cells, strict=False):
                if amount:
                    bucket.inc(amount)
            child._sum.inc(cells[-1])


def _allocate(directory: str, key: str) -> None:
    """Make the files with all the room they will need: on a full disk this is an error now, a sparse file SIGBUS later.

    The library takes the size of an existing file as its capacity, and begins a file of zeros as a new one. A new file
    gets its name when it has its size: a scrape would take an empty one for damaged.
    """
    for kind in ("counter", "histogram", *(["gauge_sum", "gauge_max"] if key.endswith("master") else [])):
        path = os.path.join(directory, f"{kind}_{key}.db")
        made = path if os.path.exists(path) else f"{path}.new"
        fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < FILE_BYTES:
                os.posix_fallocate(fd, 0, FILE_BYTES)
        finally:
            os.close(fd)
        os.replace(made, path)


def _open(directory: str, key: str) -> dict[str, Any]:
    """prometheus_client's metrics over files in `directory` named after `key`.

    The library chooses its kind of value when it is imported, by an environment variable, and names files by pid; both
    are set here instead, for this process and this set of metrics.
    """
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values  # noqa: PLC0415

    _allocate(directory, key)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    values.ValueClass = values.MultiProcessValue(lambda: key)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    made: dict[str, Any] = {}
    for name, spec in SPECS.items():
        labels = spec.labels
        if spec.kind == "counter":
            made[name] = Counter(name, spec.help, labels, registry=registry)
        elif spec.kind == "gauge":
            if spec.merge and key.endswith("master"):
                mode: Any = spec.merge
                made[name] = Gauge(name, spec.help, labels, registry=registry, multiprocess_mode=mode)
        else:
            made[name] = Histogram(name, spec.help, labels, registry=registry, buckets=BOUNDS[name])
    return made
