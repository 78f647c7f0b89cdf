"""Metrics: counted here, added to files that others read together. Each case runs in a process of its own, as it does
in life: prometheus_client keeps its files for as long as the process lives."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from forkd.metrics import BUCKETS, FILE_BYTES, SPECS, Metrics
from forkd.reasons import REASONS

# From the README of the reference.
REFERENCE = {
    "daemon_active_connections": ("gauge", ""),
    "daemon_connections_total": ("counter", ""),
    "daemon_connections_rejected_total": ("counter", ""),
    "daemon_active_streams": ("gauge", ""),
    "daemon_peak_streams": ("gauge", ""),
    "daemon_bytes_sent_total": ("counter", ""),
    "daemon_chunks_sent_total": ("counter", ""),
    "daemon_stream_errors_total": ("counter", "reason"),
    "daemon_stream_duration_seconds": ("histogram", ""),
    "daemon_handoffs_total": ("counter", ""),
    "daemon_handoff_errors_total": ("counter", "reason"),
    "daemon_handoff_duration_seconds": ("histogram", ""),
    "daemon_backend_requests_total": ("counter", "backend"),
    "daemon_backend_errors_total": ("counter", "backend"),
    "daemon_backend_duration_seconds": ("histogram", "backend"),
    "daemon_backend_ttfb_seconds": ("histogram", "backend"),
}


def in_a_child(act: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def collected(directory: Path) -> dict[tuple[str, ...], float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_the_references_metrics_are_all_there() -> None:
    assert {
        name: (spec.kind, ",".join(spec.labels)) for name, spec in SPECS.items() if name.startswith("daemon_")
    } == REFERENCE
    assert SPECS["daemon_handoff_duration_seconds"].first_bucket == 0.0001
    assert SPECS["daemon_stream_duration_seconds"].first_bucket == 0.01
    assert SPECS["daemon_backend_ttfb_seconds"].first_bucket == 0.001


def test_counts_of_several_processes_add_up_and_outlive_them(tmp_path: Path) -> None:
    def work(key: str) -> Callable[[], None]:
        def act() -> None:
            metrics = Metrics(str(tmp_path), key)
            metrics.count("daemon_handoffs_total")
            metrics.count("daemon_handoffs_total", amount=2)
            metrics.flush()
            metrics.stream_failed("write_timeout")
            metrics.handoff_failed("no_fd")
            metrics.flush()
            metrics.flush()
            metrics.count("daemon_handoffs_total")  # never flushed

        return act

    for key in ("master", "worker-1", "worker-2", "worker-1"):
        in_a_child(work(key))
    found = collected(tmp_path)
    assert found["daemon_handoffs_total",] == 12
    assert found["forkd_stream_errors_total", "write_timeout"] == 4
    assert found["daemon_stream_errors_total", "timeout"] == 4
    assert found["forkd_handoff_errors_total", "no_fd"] == 4
    assert found["daemon_handoff_errors_total", "other"] == 4
    # A successor goes on in the files of its index: restarts add none.
    assert {file.name.rpartition("_")[2] for file in tmp_path.iterdir()} == {"master.db", "worker-1.db", "worker-2.db"}


def test_a_scrape_never_finds_a_file_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file is one that was cut, which a scrape counts and warns of."""
    sizes: list[list[int]] = []
    allocate = os.posix_fallocate

    def watched(fd: int, offset: int, length: int) -> None:
        sizes.append([file.stat().st_size for file in tmp_path.glob("*.db")])
        allocate(fd, offset, length)

    def act() -> None:
        assert Metrics(str(tmp_path), "worker-1").fault is None
        assert sizes == [[], [FILE_BYTES]]

    monkeypatch.setattr(os, "posix_fallocate", watched)
    in_a_child(act)
    assert len(list(tmp_path.iterdir())) == 2


def test_histograms_agree_with_prometheus_clients_own(tmp_path: Path) -> None:
    values = [0.0, 0.00005, 0.0001, 0.00011, 0.5, 1.6384, 1.7, 1e9]

    def act() -> None:
        metrics = Metrics(str(tmp_path), "worker-1")
        for value in values:
            metrics.observe("daemon_handoff_duration_seconds", value)
        metrics.flush()

    in_a_child(act)
    found = collected(tmp_path)
    bounds = [0.0001 * 2**power for power in range(BUCKETS)]
    for bound in bounds:
        label = str(float(bound))
        assert found["daemon_handoff_duration_seconds_bucket", label] == sum(value <= bound for value in values)
    assert found["daemon_handoff_duration_seconds_bucket", "+Inf"] == len(values)
    assert found["daemon_handoff_duration_seconds_count",] == len(values)
    assert found["daemon_handoff_duration_seconds_sum",] == pytest.approx(sum(values))


def test_a_stream_with_and_without_a_backend_and_a_first_byte(tmp_path: Path) -> None:
    def act() -> None:
        metrics = Metrics(str(tmp_path), "worker-1")
        metrics.stream_ended("mock", 100, 3, 0.5, 0.1)
        metrics.stream_ended("mock", 50, 0, 0.5, -1.0)
        metrics.stream_ended("", 25, 0, 0.5, -1.0)
        metrics.flush()

    in_a_child(act)
    found = collected(tmp_path)
    assert found["daemon_bytes_sent_total",] == 175
    assert found["daemon_chunks_sent_total",] == 3
    assert found["daemon_stream_duration_seconds_count",] == 3
    assert found["daemon_backend_requests_total", "mock"] == 2
    assert found["daemon_backend_duration_seconds_count", "mock"] == 2
    assert found["daemon_backend_ttfb_seconds_count", "mock"] == 1


def test_gauges_are_the_masters_and_show_the_last_value(tmp_path: Path) -> None:
    def act() -> None:
        metrics = Metrics(str(tmp_path), "master")
        metrics.gauge("daemon_active_connections", 5)
        metrics.gauge("daemon_active_connections", 3)

    in_a_child(act)
    assert collected(tmp_path)["daemon_active_connections",] == 3


def test_every_reason_can_be_counted(tmp_path: Path) -> None:
    def act() -> None:
        metrics = Metrics(str(tmp_path), "master")
        for code in REASONS:
            metrics.stream_failed(code)
            metrics.handoff_failed(code)
        metrics.flush()

    in_a_child(act)
    found = collected(tmp_path)
    assert all(found["forkd_handoff_errors_total", code] == 1 for code in REASONS)
    reasons = {"client_disconnected", "timeout", "canceled", "network", "other"}
    assert {key[1] for key in found if key[0] == "daemon_stream_errors_total"} <= reasons


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(None, "master")
    metrics.count("daemon_handoffs_total")
    metrics.observe("daemon_stream_duration_seconds", 1.0)
    metrics.gauge("daemon_active_connections", 1)
    metrics.flush()
    assert not list(tmp_path.iterdir())


def test_files_have_all_their_room_from_the_start(tmp_path: Path) -> None:
    """A sparse file that grows under a mapping on a full disk is SIGBUS."""
    Metrics(str(tmp_path), "master")
    for file in tmp_path.iterdir():
        assert file.stat().st_blocks * 512 >= FILE_BYTES


def test_files_that_cannot_be_had_are_a_fault_and_no_exception(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path / "nowhere"), "worker-1")
    assert isinstance(metrics.fault, FileNotFoundError)
    metrics.count("daemon_connections_total")
    metrics.flush()
