"""The process that serves the metrics, asked over HTTP beside a running daemon."""

import contextlib
import os
import re
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import Forkd, open_fds, read_answer, running, wait_for

# Name: type, labels, first of 15 doubling buckets. What the dashboards and alerts of the daemon before us ask for.
REFERENCE: dict[str, tuple[str, set[str], float]] = {
    "daemon_active_connections": ("gauge", set(), 0),
    "daemon_connections_total": ("counter", set(), 0),
    "daemon_connections_rejected_total": ("counter", set(), 0),
    "daemon_active_streams": ("gauge", set(), 0),
    "daemon_peak_streams": ("gauge", set(), 0),
    "daemon_bytes_sent_total": ("counter", set(), 0),
    "daemon_chunks_sent_total": ("counter", set(), 0),
    "daemon_stream_errors_total": ("counter", {"reason"}, 0),
    "daemon_stream_duration_seconds": ("histogram", set(), 0.01),
    "daemon_handoffs_total": ("counter", set(), 0),
    "daemon_handoff_errors_total": ("counter", {"reason"}, 0),
    "daemon_handoff_duration_seconds": ("histogram", set(), 0.0001),
    "daemon_backend_requests_total": ("counter", {"backend"}, 0),
    "daemon_backend_errors_total": ("counter", {"backend"}, 0),
    "daemon_backend_duration_seconds": ("histogram", {"backend"}, 0.01),
    "daemon_backend_ttfb_seconds": ("histogram", {"backend"}, 0.001),
}
REASONS = {"client_disconnected", "timeout", "canceled", "network", "other"}
LONG: dict[str, Any] = {"backends": {"mock": {"provider": "mock", "token_delay_ms": 600_000}}}
"""A stream that says one word and then nothing for as long as any test takes."""


def address(forkd: Forkd) -> tuple[str, int]:
    """Where it says that it serves metrics."""
    found = wait_for(lambda: re.search(r"metrics on http://([\d.]+):(\d+)/metrics", forkd.log()), "a metrics address")
    return found[1], int(found[2])


def get(forkd: Forkd, path: str, **how: Any) -> requests.Response:
    """One request."""
    host, port = address(forkd)
    return requests.get(f"http://{host}:{port}{path}", timeout=20, **how)


def scrape(forkd: Forkd) -> dict[str, float]:
    """Every sample, by its name and labels as they are written."""
    response = get(forkd, "/metrics")
    assert response.status_code == 200
    return {
        sample.name + "".join(f"{{{label}={value}}}" for label, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def metrics_pids(forkd: Forkd) -> list[int]:
    """The metrics processes, by their title."""
    found = []
    for child in psutil.Process(forkd.pid).children():
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("forkd: metrics ["):
                found.append(child.pid)
    return found


def metrics_pid(forkd: Forkd) -> int:
    """The metrics process, once it shows its title."""
    (pid,) = wait_for(lambda: metrics_pids(forkd), "a metrics process")
    return int(pid)


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            count += os.readlink(entry).startswith("socket:")
    return count


def test_after_one_stream_every_metric_of_the_reference_is_there(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        answer = forkd.ask()
        # The master and the worker write each at its own time, and the worker one metric after the other.
        last = {f"{name}_count" for name, (kind, _, _) in REFERENCE.items() if kind == "histogram"}

        def counted() -> bool:
            samples = scrape(forkd)
            histograms = [v for key, v in samples.items() if key.partition("{")[0] in last]
            return samples["daemon_handoffs_total"] == 1 and histograms == [1] * len(last)

        wait_for(counted, "all of it counted")
        text = get(forkd, "/metrics").text
        families = {}
        for family in text_string_to_metric_families(text):
            families[family.name + ("_total" if family.type == "counter" else "")] = family
        for name, (kind, labels, first) in REFERENCE.items():
            family = families[name]
            assert family.type == kind, name
            assert family.documentation, name
            assert {label for s in family.samples for label in s.labels} - {"le"} == labels, name
            if kind == "histogram":
                bounds = [s.labels["le"] for s in family.samples if s.name == f"{name}_bucket"]
                assert [float(bound) for bound in bounds] == [first * 2**n for n in range(15)] + [float("inf")], name
                counts = [s.value for s in family.samples if s.name == f"{name}_bucket"]
                assert counts == sorted(counts), name
                assert counts[-1] == 1, name
        samples = scrape(forkd)
        assert samples["daemon_connections_total"] == samples["daemon_handoffs_total"] == 1
        assert samples["daemon_backend_requests_total{backend=mock}"] == 1
        assert samples["daemon_bytes_sent_total"] == len(answer.raw)
        assert samples["daemon_peak_streams"] == 1
        assert "pid=" not in text
        openmetrics = get(forkd, "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert {family.name for family in parse_openmetrics(openmetrics.text)} == {
            name.removesuffix("_total") for name in families
        }


def test_what_was_never_counted_is_zero(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        samples = scrape(forkd)
        for name, (kind, labels, _) in REFERENCE.items():
            if not labels:
                assert samples[name if kind != "histogram" else f"{name}_count"] == 0, name
        for reason in REASONS:
            assert samples[f"daemon_stream_errors_total{{reason={reason}}}"] == 0
            assert samples[f"daemon_handoff_errors_total{{reason={reason}}}"] == 0
        assert samples["daemon_backend_requests_total{backend=mock}"] == 0
        assert samples["forkd_streams_recovered_total{outcome=redispatched}"] == 0


def test_counters_are_summed_over_workers_and_outlive_them(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        for client in [forkd.hand_over() for _ in range(6)]:
            assert read_answer(client).complete
        wait_for(lambda: scrape(forkd)["daemon_chunks_sent_total"] == 6 * 18, "all chunks counted")
        counted = [
            path for path in tmp_path.glob("metrics/*/counter_worker-*.db") if b"daemon_chunks" in path.read_bytes()
        ]
        assert len(counted) == 2
        files = {path.name for path in tmp_path.glob("metrics/*/*.db")}
        for pid in forkd.workers():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: forkd.log().count(" ready (pid") == 4, "two new workers")
        assert scrape(forkd)["daemon_chunks_sent_total"] == 6 * 18
        for client in [forkd.hand_over() for _ in range(2)]:
            assert read_answer(client).complete
        wait_for(lambda: scrape(forkd)["daemon_chunks_sent_total"] == 8 * 18, "the new workers' chunks added")
        wait_for(lambda: scrape(forkd)["forkd_worker_deaths_total"] == 2, "two deaths counted")
        assert {path.name for path in tmp_path.glob("metrics/*/*.db")} == files


def counters(samples: dict[str, float]) -> dict[str, float]:
    """What may never fall: counters, and all that a histogram is made of."""
    return {name: value for name, value in samples.items() if re.search(r"_(total|count|sum|bucket)(\{|$)", name)}


def test_200_restarts_leave_no_more_files_than_10_and_no_counter_falls(tmp_path: Path) -> None:
    workers, restarts = 4, 200
    with running(tmp_path, config={"workers": {"count": workers}}) as forkd:

        def files() -> set[str]:
            return {path.name for path in tmp_path.glob("metrics/*/*")}

        after_10: set[str] = set()
        last = counters(scrape(forkd))
        began = 0
        for killed in range(workers, restarts + 1, workers):
            client = forkd.hand_over()
            assert client.recv(1)  # a stream that the death finds begun, and counts
            began += 1
            for pid in forkd.workers():
                os.kill(pid, signal.SIGKILL)
            assert read_answer(client).reset is False
            wait_for(lambda killed=killed: forkd.log().count(" ready (pid") == workers + killed, "new workers")
            now = counters(scrape(forkd))
            fallen = {name: (value, now.get(name)) for name, value in last.items() if now.get(name, -1) < value}
            assert not fallen, f"after {killed} restarts"
            last = now
            if killed >= 10 and not after_10:
                after_10 = files()
        assert files() == after_10
        wait_for(lambda: scrape(forkd)["forkd_worker_deaths_total"] == restarts, "every death counted")
        wait_for(lambda: scrape(forkd)["daemon_connections_total"] == began, "every handoff counted")


def test_gauges_are_exact_after_a_crash(tmp_path: Path) -> None:
    with running(tmp_path, config=LONG) as forkd:
        clients = [forkd.hand_over() for _ in range(6)]
        for client in clients:
            assert client.recv(4096)
        wait_for(lambda: scrape(forkd)["daemon_active_streams"] == 6, "six active streams")
        wait_for(lambda: get(forkd, "/status").json()["streams"] == 6, "six streams in the status")
        victim, other = get(forkd, "/status").json()["workers"]
        assert victim["streams"] + other["streams"] == 6
        os.kill(victim["pid"], signal.SIGKILL)
        wait_for(lambda: scrape(forkd)["daemon_active_streams"] == other["streams"], "the other worker's streams")
        samples = scrape(forkd)
        assert samples["daemon_active_connections"] == other["streams"]
        assert samples["daemon_peak_streams"] == 6
        assert samples["forkd_streams_recovered_total{outcome=ended}"] == victim["streams"]
        for client in clients:
            client.close()
        wait_for(lambda: scrape(forkd)["daemon_active_connections"] == 0, "nothing active")


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        forkd.ask()
        wait_for(lambda: scrape(forkd)["daemon_chunks_sent_total"] == 18, "18 chunks counted")
        (directory,) = tmp_path.glob("metrics/master-*")
        whole = (directory / "counter_master.db").read_bytes()
        (directory / "counter_worker-90.db").write_bytes(whole[:300])
        (directory / "counter_worker-91.db").write_bytes(b"")
        (directory / "counter_worker-92.db").write_bytes(b"garbage\n" * 600)
        (directory / "nonsense.db").mkdir()
        first, second = scrape(forkd), scrape(forkd)
        assert first["daemon_chunks_sent_total"] == second["daemon_chunks_sent_total"] == 18
        assert first["daemon_connections_total"] == 1
        assert first["forkd_metrics_files_skipped_total"] == 4
        assert second["forkd_metrics_files_skipped_total"] == 8
        for name in ("counter_worker-90.db", "counter_worker-91.db", "counter_worker-92.db", "nonsense.db"):
            assert forkd.log().count(f"{name} cannot be read") == 1
        shutil.rmtree(directory / "nonsense.db")
        for number in (90, 91, 92):
            (directory / f"counter_worker-{number}.db").unlink()
        assert scrape(forkd)["forkd_metrics_files_skipped_total"] == 8


def test_not_ready_while_every_worker_is_stopped(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        wait_for(lambda: get(forkd, "/readyz").status_code == 200, "ready")
        workers = forkd.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        unready = wait_for(lambda: (r := get(forkd, "/readyz")).status_code == 503 and r.text, "not ready")
        assert unready == "no worker is ready\n"
        assert [worker["late"] for worker in get(forkd, "/status").json()["workers"]] == [True, True]
        assert get(forkd, "/healthz").status_code == 200
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: get(forkd, "/readyz").status_code == 200, "ready again")


def test_not_ready_without_room(tmp_path: Path) -> None:
    with running(tmp_path, config={**LONG, "server": {"max_connections": 1}}) as forkd:
        wait_for(lambda: get(forkd, "/readyz").status_code == 200, "ready")
        with forkd.hand_over() as client:
            assert client.recv(4096)
            unready = wait_for(lambda: (r := get(forkd, "/readyz")).status_code == 503 and r.text, "not ready")
            assert unready == "no room for another stream\n"
        wait_for(lambda: get(forkd, "/readyz").status_code == 200, "ready again")


def test_a_drain_is_not_ready_but_healthy(tmp_path: Path) -> None:
    with running(tmp_path, config=LONG) as forkd:
        pid = metrics_pid(forkd)
        with forkd.hand_over() as client:
            assert client.recv(4096)
            wait_for(lambda: get(forkd, "/readyz").status_code == 200, "ready")
            os.kill(forkd.pid, signal.SIGTERM)
            unready = wait_for(lambda: (r := get(forkd, "/readyz")).status_code == 503 and r.text, "not ready")
            assert unready == "the master is draining\n"
            assert get(forkd, "/healthz").status_code == 200
            assert get(forkd, "/status").json()["stage"] == "draining"
            assert scrape(forkd)["daemon_connections_total"] == 1
        assert forkd.stop() == 0
        assert not psutil.pid_exists(pid)


def test_a_master_that_hangs_is_not_healthy(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        wait_for(lambda: get(forkd, "/readyz").status_code == 200, "ready")
        metrics_pid(forkd)
        os.kill(forkd.pid, signal.SIGSTOP)
        try:
            sick = wait_for(lambda: (r := get(forkd, "/healthz")).status_code == 503 and r.text, "not healthy")
            assert re.fullmatch(r"the master has been silent for \d+ s\n", sick)
            assert get(forkd, "/readyz").status_code == 503
            assert get(forkd, "/metrics").status_code == 200
        finally:
            os.kill(forkd.pid, signal.SIGCONT)
        wait_for(lambda: get(forkd, "/healthz").status_code == 200, "healthy again")


def test_status_tells_of_every_process(tmp_path: Path) -> None:
    with running(tmp_path, config=LONG) as forkd, forkd.hand_over() as client:
        assert client.recv(4096)
        wait_for(lambda: get(forkd, "/status").json()["streams"] == 1, "one stream")
        status = get(forkd, "/status").json()
        assert status["pid"] == forkd.pid
        assert status["stage"] == "running"
        assert status["generation"] == 1
        assert status["peak"] == 1
        assert status["queued"] == 0
        assert status["ready_workers"] == 2
        assert status["capacity"] > 1
        assert status["uptime_secs"] > 0
        assert re.fullmatch(r"\d+\.\d+.*", status["version"])
        workers = status["workers"]
        assert sorted(worker["pid"] for worker in workers) == forkd.workers()
        assert sorted(worker["streams"] for worker in workers) == [0, 1]
        assert [(w["index"], w["generation"], w["state"], w["restarts"]) for w in workers] == [
            (1, 1, "ready", 0),
            (2, 1, "ready", 0),
        ]
        os.kill(workers[1]["pid"], signal.SIGKILL)

        def reborn() -> bool:
            now = get(forkd, "/status").json()["workers"]
            return [(w["state"], w["restarts"]) for w in now] == [("ready", 0), ("ready", 1)]

        wait_for(reborn, "a restart of worker 2")
        assert get(forkd, "/status").json()["workers"][1]["pid"] != workers[1]["pid"]


def test_a_taken_port_stops_nothing_but_the_metrics(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with running(tmp_path, config={"metrics": {"listen_addr": taken}}) as forkd:
            assert f"cannot serve metrics on {taken}: Address already in use; going on without" in forkd.log()
            assert forkd.ask().complete
            forkd.wait_for_metric("daemon_chunks_sent_total", 18)
            assert not metrics_pids(forkd)
            assert forkd.stop() == 0


def test_a_dead_metrics_process_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path, config=LONG) as forkd, forkd.hand_over() as client:
        assert client.recv(4096)
        wait_for(lambda: scrape(forkd)["daemon_active_streams"] == 1, "one stream")
        first = metrics_pid(forkd)
        fds = open_fds(forkd.pid)
        os.kill(first, signal.SIGTERM)  # said to the whole group: it goes when the master does
        assert scrape(forkd)["daemon_active_streams"] == 1
        assert metrics_pid(forkd) == first
        for number in (signal.SIGKILL, signal.SIGSEGV):
            pid = metrics_pid(forkd)
            os.kill(pid, number)
            # The port stays open meanwhile: nobody is refused.
            assert scrape(forkd)["daemon_active_streams"] == 1
            assert wait_for(lambda gone=pid: metrics_pids(forkd) != [gone] and metrics_pid(forkd), "another") != pid
            assert f"the metrics process (pid {pid}) was killed by {number.name}; starting another" in forkd.log()
        assert not psutil.pid_exists(first)
        assert all(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(forkd.pid).children())
        assert open_fds(forkd.pid) == fds


def test_it_holds_no_client(tmp_path: Path) -> None:
    slow = {"backends": {"mock": {"provider": "mock", "token_delay_ms": 150}}}
    with running(tmp_path, config=slow) as forkd:
        clients = [forkd.hand_over(tcp=True) for _ in range(5)]
        wait_for(lambda: get(forkd, "/status").json()["streams"] == 5, "five streams")
        # Born while the master had clients, which the first one was not.
        pid = metrics_pid(forkd)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: metrics_pids(forkd) not in ([pid], []), "another")
        answers = [read_answer(client) for client in clients]
        assert all(answer.complete for answer in answers)
        wait_for(lambda: sockets(metrics_pid(forkd)) == 1, "the listener to be its only socket")


def test_it_goes_with_a_master_that_is_killed(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        family = [metrics_pid(forkd), *forkd.workers()]
        os.kill(forkd.pid, signal.SIGKILL)

        def gone(pid: int) -> bool:
            # Nobody may be there to reap them: dead is enough.
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            return True

        wait_for(lambda: all(gone(pid) for pid in family), "everybody gone")


def test_a_terminals_signals_are_not_meant_for_it(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        pid = metrics_pid(forkd)
        assert get(forkd, "/healthz").status_code == 200
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2):
            os.kill(pid, number)
            assert get(forkd, "/healthz").status_code == 200
        assert metrics_pid(forkd) == pid


def test_its_log_is_reopened(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        host, port = address(forkd)
        metrics_pid(forkd)
        log = tmp_path / "forkd.log"
        log.rename(tmp_path / "forkd.log.1")
        os.kill(forkd.pid, signal.SIGUSR1)
        (directory,) = tmp_path.glob("metrics/master-*")

        def warned() -> bool:
            # A file of another name each time, since each is named in the log once.
            number = len(list(directory.glob("counter_odd-*")))
            (directory / f"counter_odd-{number}.db").write_bytes(b"?")
            assert requests.get(f"http://{host}:{port}/metrics", timeout=20).status_code == 200
            return log.exists() and "cannot be read" in log.read_text()

        wait_for(warned, "a warning in the new log")


def test_slow_clients_stop_nobody(tmp_path: Path) -> None:
    with running(tmp_path) as forkd, contextlib.ExitStack() as stack:
        where = address(forkd)
        pid = metrics_pid(forkd)
        for number in range(300):
            client = stack.enter_context(socket.create_connection(where))
            with contextlib.suppress(ConnectionError):  # the oldest are sent away when there are too many
                if number % 3 == 1:
                    client.sendall(b"GET /status HTTP/1.1\r\nHost:")
                elif number % 3 == 2:
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            if number % 50 == 0:
                assert scrape(forkd)["daemon_connections_total"] == 0
        assert get(forkd, "/status").json()["pid"] == forkd.pid
        assert sockets(pid) <= 129
        stack.close()
        wait_for(lambda: sockets(pid) == 1, "every connection closed")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET //status HTTP/1.1\r\n\r\n", 200),
        (b"GET /status?x=/../ HTTP/1.0\r\n\r\n", 200),
        (b"\r\nGET /status HTTP/1.1\r\n\r\n", 200),
        (b"GET /status HTTP/1.1\n\n", 200),
        (b"GET /status HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", 200),
        (b"POST /status HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000), 405),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
        (b"get /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /status SPDY/3\r\n\r\n", 400),
        (b"GET /status HTTP/2.0\r\n\r\n", 505),
        (b"GET\r\n\r\n", 400),
        (b"a b c d e\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"\0" * 40_000, 400),
        (b"GET /" + b"x" * 40_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 4000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n", 431),
    ],
)
def test_requests_of_all_kinds(server: Forkd, request_bytes: bytes, status: int) -> None:
    pid = metrics_pid(server)
    assert get(server, "/healthz").status_code == 200
    wait_for(lambda: sockets(pid) == 1, "no connection left")
    with socket.create_connection(address(server), timeout=20) as client:
        client.sendall(request_bytes)
        answer = read_answer(client)
    assert answer.status == status
    assert not answer.reset
    assert answer.header("connection") == "close"
    assert int(answer.header("content-length") or -1) == len(answer.body)
    if status == 405:
        assert answer.header("allow") == "GET, HEAD"
    wait_for(lambda: sockets(pid) == 1, "the connection closed")


def test_head_is_get_without_the_body(server: Forkd) -> None:
    with socket.create_connection(address(server), timeout=20) as client:
        client.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = read_answer(client)
    assert answer.status == 200
    assert int(answer.header("content-length") or 0) > 1000
    assert answer.body == b""


def test_half_a_request_is_an_answer_if_the_client_waits_for_one(server: Forkd) -> None:
    with socket.create_connection(address(server), timeout=20) as client:
        client.sendall(b"GET /status")
        client.shutdown(socket.SHUT_WR)
        assert read_answer(client).status == 400


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon for tests that leave no trace on it."""
    with running(tmp_path_factory.mktemp("server")) as forkd:
        yield forkd


def test_without_metrics_there_is_no_process(tmp_path: Path) -> None:
    for number, parts in enumerate(({"config": {"metrics": {"enabled": False}}}, {"arguments": ("--benchmark",)})):
        directory = tmp_path / str(number)
        directory.mkdir()
        with running(directory, **parts) as forkd:
            assert forkd.ask().complete
            assert len(psutil.Process(forkd.pid).children()) == 2
            assert "metrics on" not in forkd.log()
            maps = Path(f"/proc/{forkd.pid}/maps").read_text()
            assert not any(".db" in line for line in maps.splitlines())
