"""The metrics process's parts: the port, the files, the pages."""

import errno
import glob
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import values

from forkd.board import Board, Figures
from forkd.exposition import Collector, Pages, address_of, bind, is_bound_to
from forkd.ledger import Ledger
from forkd.metrics import SPECS, Metrics
from forkd.overview import HEALTHY_SECS, Overview
from forkd.reasons import Metric

LOG = logging.getLogger("test-exposition")
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A directory of metric files; what prometheus_client keeps for the whole process is put back afterwards."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    yield str(tmp_path)
    values.close_all_multiprocess_files()  # type: ignore[no-untyped-call]


def read(collector: Collector) -> dict[tuple[str, ...], float]:
    """Samples by name and label values."""
    return {(s.name, *s.labels.values()): s.value for family in collector.collect() for s in family.samples}


def overview(board: Board) -> Overview:
    return Overview(board, 4711, time.monotonic() - 60)


def over(directory: str, *backends: str, board: Board | None = None) -> Collector:
    """A collector of the files in `directory`."""
    return Collector(directory, backends or ("mock",), LOG, overview(board or Board(1)))


def pages(board: Board, directory: str = "/nowhere") -> Pages:
    return Pages(overview(board), over(directory, board=board))


def beat(board: Board, *, ago: float = 0.0, stage: str = "running", ready: int = 1, room: int = 5, **more: int) -> None:
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
        **more,
    )


class TestPort:
    def test_is_closed_on_exec_and_never_blocks(self) -> None:
        with bind("127.0.0.1:0") as listener:
            assert not listener.get_inheritable()
            assert not listener.getblocking()
            assert re.fullmatch(r"127\.0\.0\.1:\d+", address_of(listener))

    def test_ipv6(self) -> None:
        failed_with = 0
        try:
            with bind("[::1]:0") as listener:
                assert re.fullmatch(r"\[::1\]:\d+", address_of(listener))
        except OSError as error:
            failed_with = error.errno or -1
        # A machine without IPv6 says so.
        assert failed_with in (0, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

    def test_an_empty_host_is_every_address(self) -> None:
        with bind(":0") as listener, socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
            assert address_of(listener).startswith(("[::]:", "0.0.0.0:"))

    def test_a_name(self) -> None:
        with bind("localhost:0") as listener:
            assert re.fullmatch(r"(127\.0\.0\.1|\[::1\]):\d+", address_of(listener))

    def test_taken(self) -> None:
        with bind("127.0.0.1:0") as listener, pytest.raises(OSError, match=r"Address already in use$"):
            bind(address_of(listener))

    @pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "x" * 70 + ".invalid", "a..b"])
    def test_addresses_that_are_not_ours(self, host: str) -> None:
        with pytest.raises(OSError) as caught:
            bind(f"{host}:9090")
        assert caught.value.strerror


class TestCollector:
    def test_adds_up_files_and_fills_in_zeros(self, directory: str) -> None:
        for key in ("worker-1", "worker-2"):
            metrics = Metrics(directory, key)
            metrics.stream_ended("mock", 100, 18, 0.5, 0.001)
            metrics.flush()
        master = Metrics(directory, "master")
        master.gauge("daemon_peak_streams", 7)
        found = read(over(directory, "mock", "openai"))
        assert found["daemon_chunks_sent_total",] == 36
        assert found["daemon_peak_streams",] == 7
        assert found["daemon_active_streams",] == 0
        assert found["daemon_backend_requests_total", "mock"] == 2
        assert found["daemon_backend_requests_total", "openai"] == 0
        assert found["daemon_stream_duration_seconds_bucket", "0.32"] == 0
        assert found["daemon_stream_duration_seconds_bucket", "0.64"] == 2
        assert found["daemon_stream_duration_seconds_count",] == 2
        assert found["daemon_stream_duration_seconds_sum",] == 1.0

    def test_shows_all_metrics_in_order_and_each_sample_once(self, directory: str) -> None:
        Metrics(directory, "master")
        families = list(over(directory).collect())
        assert [family.name for family in families] == [name.removesuffix("_total") for name in SPECS]
        for family in families:
            samples = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
            assert len(samples) == len(set(samples))

    @pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 9, 60, 200, 1000, 4095, 4096, 4097])
    def test_leaves_out_a_file_cut_anywhere(self, directory: str, length: int) -> None:
        metrics = Metrics(directory, "worker-1")
        metrics.stream_ended("mock", 100, 18, 0.5, 0.001)
        metrics.flush()
        whole = Path(directory, "histogram_worker-1.db").read_bytes()
        Path(directory, "histogram_worker-2.db").write_bytes(whole[:length])
        collector = over(directory)
        for scrape in (1, 2):
            found = read(collector)
            assert found["daemon_chunks_sent_total",] == 18
            assert found["daemon_stream_duration_seconds_count",] == 1
            assert found["forkd_metrics_files_skipped_total",] == scrape

    def test_a_file_that_is_removed_meanwhile_is_not_one_that_is_damaged(
        self, directory: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the gauges of an old master are."""
        Metrics(directory, "master")
        files = [*glob.glob(f"{directory}/*.db"), f"{directory}/gauge_sum_gone.db"]
        monkeypatch.setattr("forkd.exposition.glob.glob", lambda _: files)
        assert read(over(directory))["forkd_metrics_files_skipped_total",] == 0

    def test_reads_gauges_off_the_board(self, directory: str) -> None:
        board = Board(1)
        beat(board, wanted=3)
        board.peer_row(1).store_born(101, 1)
        board.row(1).store_figures(Figures(rss_bytes=40 << 20))
        Metrics(directory, "master")
        found = read(over(directory, board=board))
        assert found["forkd_workers_ready",] == 1
        assert found["forkd_workers_wanted",] == 3
        assert found["forkd_queued_handoffs",] == 2
        assert found["forkd_capacity_streams",] == 100
        assert found["forkd_worker_resident_memory_bytes", "1"] == 40 << 20
        assert found["daemon_active_streams",] == 0

    def test_says_so_when_there_is_nothing_to_read(self, directory: str) -> None:
        with pytest.raises(OSError, match="can be read"):
            list(over(directory).collect())

    def test_is_not_confused_by_a_directory_with_wildcards(self, directory: str) -> None:
        odd = Path(directory, "a[b]*")
        odd.mkdir()
        Metrics(str(odd), "master")
        assert read(over(str(odd)))["daemon_handoffs_total",] == 0


class TestPages:
    def test_health_is_the_masters(self) -> None:
        board = Board(1)
        assert pages(board).answer("/healthz", "").status == 503
        beat(board)
        assert pages(board).answer("/healthz", "") == (200, "text/plain; charset=utf-8", b"ok\n")
        beat(board, ago=HEALTHY_SECS + 2)
        assert pages(board).answer("/healthz", "").body == b"the master has been silent for 7 s\n"

    @pytest.mark.parametrize(
        ("how", "text"),
        [
            ({}, b"ok\n"),
            ({"ready": 0}, b"no worker is ready\n"),
            ({"room": 0}, b"no room for another stream\n"),
            ({"stage": "draining"}, b"the master is draining\n"),
            ({"stage": "stopping"}, b"the master is stopping\n"),
            ({"ago": 60.0}, b"the master has been silent for 60 s\n"),
        ],
    )
    def test_readiness(self, how: dict[str, object], text: bytes) -> None:
        board = Board(1)
        beat(board, **how)  # type: ignore[arg-type]
        reply = pages(board).answer("/readyz", "")
        assert (reply.status, reply.body) == (200 if text == b"ok\n" else 503, text)

    def test_status_is_the_overview_as_json(self) -> None:
        board = Board(1)
        beat(board)
        board.peer_row(1).store_born(101, 2)
        reply = pages(board).answer("/status", "")
        assert (reply.status, reply.content_type, reply.body[-1:]) == (200, "application/json", b"\n")
        status = json.loads(reply.body)
        assert (status["pid"], status["streams"], status["workers"][0]["pid"]) == (4711, 12, 101)

    def test_there_is_nothing_else(self) -> None:
        assert pages(Board(1)).answer("/metrics/", "").status == 404


def test_a_workers_row_and_the_masters_row_about_it_are_two() -> None:
    board = Board(10)
    board.peer_row(1).store_born(101, 1)
    board.peer_row(4095).store_born(102, 1)
    beat(board)
    board.row(1).clear()
    board.row(4095).clear()
    assert (board.peer_row(1).pid, board.peer_row(4095).pid) == (101, 102)
    assert board.master_row().capacity == 100
    assert bytes(board.states) == bytes(10)


class TestDocumentation:
    def test_is_true_of_every_metric(self) -> None:
        rows = {}
        for line in DOCS.read_text().splitlines():
            if line.startswith(("| `daemon_", "| `forkd_")):
                name, kind, label, bucket, meaning = (cell.strip() for cell in line.strip("|").split("|"))
                labels = tuple(one.strip(" `") for one in label.split(",") if one.strip())
                rows[name.strip("`")] = (kind, labels, float(bucket.removesuffix(" s") or 0), meaning)
        assert rows == {name: (s.kind, s.labels, s.first_bucket, s.help) for name, s in SPECS.items()}
        assert list(rows) == list(SPECS)

    def test_names_every_value_of_the_closed_labels(self) -> None:
        text = DOCS.read_text()
        for spec in SPECS.values():
            for value in spec.values:
                assert f"`{value}`" in text
        assert SPECS["daemon_stream_errors_total"].values == tuple(Metric)
        assert Ledger.judge.__doc__ is not None
        for outcome in SPECS["forkd_streams_recovered_total"].values:
            assert f'"{outcome}"' in Ledger.judge.__doc__


@pytest.mark.parametrize(
    ("bound", "asked", "same"),
    [
        ("127.0.0.1:0", "127.0.0.1:{port}", True),
        ("127.0.0.1:0", "127.0.0.1:0", True),
        ("127.0.0.1:0", "localhost:{port}", True),
        ("127.0.0.1:0", "127.0.0.1:1", False),
        ("127.0.0.1:0", "0.0.0.0:{port}", False),
        ("127.0.0.1:0", ":{port}", False),
        (":0", ":{port}", True),
        (":0", "127.0.0.1:{port}", False),
    ],
)
def test_whether_a_socket_is_what_an_address_would_give(bound: str, asked: str, same: bool) -> None:
    with bind(bound) as listener:
        assert is_bound_to(listener, asked.format(port=listener.getsockname()[1])) is same
