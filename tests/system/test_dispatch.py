"""Which worker gets a handoff, what happens when none can take it, and what ps(1) shows of it."""

import os
import re
import select
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.harness import Answer, Forkd, connect, open_fds, read_answer, read_answers, send, wait_for
from tests.system.crowd import begun, fate, fates, forkd_of, hand_over_many, prompt, ready_pids, settled


def title(pid: int) -> str:
    return psutil.Process(pid).cmdline()[0]


def streams(forkd: Forkd) -> list[int]:
    """How many streams each worker has, by its title."""
    return sorted(int(title(pid).rpartition("streams=")[2]) for pid in forkd.workers())


def worker_of(forkd: Forkd, answer: Answer) -> str:
    """Which worker answered, by the access log."""

    def found() -> list[str]:
        return [line["worker"] for line in forkd.access_lines() if line["request_id"] == answer.header("x-request-id")]

    wait_for(found, "its access line")
    return found()[0]


def test_the_load_is_shared_and_ps_shows_it(tmp_path: Path) -> None:
    with forkd_of(tmp_path, workers=4) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="still")] * 402)
        begun(clients)
        wait_for(lambda: sum(streams(forkd)) == 402, "all are shown")
        assert max(streams(forkd)) - min(streams(forkd)) <= 2
        name = re.escape(str(tmp_path / "forkd.yaml"))
        wait_for(
            lambda: re.fullmatch(rf"forkd: master \[{name}\] workers=4 streams=402", title(forkd.pid)),
            "the master's title",
        )
        names = sorted(title(pid) for pid in forkd.workers())
        for index, name in enumerate(names, 1):
            assert re.fullmatch(rf"forkd: worker {index} \[gen 1\] streams=(99|10[0-3])", name)
        for client in clients:
            client.close()
        wait_for(lambda: streams(forkd) == [0, 0, 0, 0], "the titles are up to date")


def test_the_least_loaded_worker_is_chosen(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd, connect(forkd.path) as sender:
        clients = hand_over_many(sender, [prompt(backend="still")] * 20)
        begun(clients)
        wait_for(lambda: sum(streams(forkd)) == 20, "all are shown")
        assert max(streams(forkd)) - min(streams(forkd)) <= 2
        os.kill(ready_pids(forkd)[0], signal.SIGKILL)
        wait_for(lambda: len(ready_pids(forkd)) == 3, "a new worker is ready")
        clients += hand_over_many(sender, [prompt(backend="still")] * 6)
        wait_for(lambda: streams(forkd) in ([6, 9], [6, 10], [6, 11]), "all six go to the new one")
        for client in clients:
            client.close()


def test_more_clients_than_max_connections(tmp_path: Path) -> None:
    with forkd_of(tmp_path, server={"max_connections": 10}) as forkd:
        before = open_fds(forkd.pid)
        with connect(forkd.path) as sender:
            live = hand_over_many(sender, [prompt(backend="still")] * 10)
            begun(live)
            client, server = socket.socketpair()
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # unread input must not turn the refusal into a reset
            with server:
                send(sender, prompt(), server.fileno())
            refused = read_answer(client)
        assert (refused.status, refused.json["code"]) == (503, "no_capacity")
        assert refused.header("retry-after") == "1"
        assert refused.header("connection") == "close"
        assert not refused.reset
        for client in live:
            client.close()
        settled(forkd, before)
        assert fate(forkd.ask()) == "complete"
        forkd.wait_for_metric("daemon_connections_rejected_total", 1)
        forkd.wait_for_metric("daemon_connections_total", 12)
        forkd.wait_for_metric("forkd_handoff_errors_total", 1, code="no_capacity")
        forkd.wait_for_metric("daemon_peak_streams", 10)


def test_thousands_wait_for_workers_that_are_stopped(tmp_path: Path) -> None:
    with forkd_of(tmp_path, server={"queue_size": 2500, "queue_timeout_secs": 60}) as forkd:
        before = open_fds(forkd.pid)
        for pid in ready_pids(forkd):
            os.kill(pid, signal.SIGSTOP)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="fast")] * 3500)
        forkd.wait_for_metric("daemon_connections_total", 3500)
        refused = int(forkd.metric("daemon_connections_rejected_total"))
        assert 200 < refused < 1000  # all that found no room in two channels and the queue
        for pid in ready_pids(forkd):
            os.kill(pid, signal.SIGCONT)
        answers = read_answers(clients)
        assert fates(answers) == {"complete": 3500 - refused, "no_capacity": refused}
        assert {answer.header("retry-after") for answer in answers if answer.status == 503} == {"1"}
        settled(forkd, before)


@pytest.mark.parametrize("queue_size", [0, 100])
def test_what_waits_for_too_long_is_refused(tmp_path: Path, queue_size: int) -> None:
    with forkd_of(tmp_path, server={"queue_size": queue_size, "queue_timeout_secs": 1}) as forkd:
        before = open_fds(forkd.pid)
        for pid in ready_pids(forkd):
            os.kill(pid, signal.SIGSTOP)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt()] * 1000)
        forkd.wait_for_metric("daemon_connections_total", 1000)
        forkd.wait_for_metric("forkd_handoff_errors_total", queue_size, code="queue_timeout")
        for pid in ready_pids(forkd):
            os.kill(pid, signal.SIGCONT)
        answers = fates(read_answers(clients))
        assert answers["queue_timeout"] == queue_size
        assert answers["complete"] + answers["no_capacity"] == 1000 - queue_size
        assert answers["complete"]
        assert answers["no_capacity"]
        settled(forkd, before)
        assert fate(forkd.ask()) == "complete"


def test_a_worker_whose_heart_is_late_is_passed_over(tmp_path: Path) -> None:
    with forkd_of(tmp_path, logging={"level": "info", "access": True}) as forkd:
        before = open_fds(forkd.pid)
        stopped, _ = ready_pids(forkd)
        os.kill(stopped, signal.SIGSTOP)
        unanswered: list[socket.socket] = []

        def all_answered() -> bool:
            """Hand over so many clients at once that by load two of them would go to the stopped worker."""
            with connect(forkd.path) as sender:
                clients = hand_over_many(sender, [prompt()] * (len(unanswered) + 4))
            answered = [client for client in clients if select.select([client], [], [], 0.2)[0]]
            unanswered.extend(client for client in clients if client not in answered)
            assert set(fates(read_answers(answered))) == {"complete"}
            return len(answered) == len(clients)

        wait_for(all_answered, "the stopped worker is passed over")
        assert unanswered
        os.kill(stopped, signal.SIGCONT)
        answers = read_answers(unanswered)
        assert fates(answers) == {"complete": len(unanswered)}
        (returned,) = {worker_of(forkd, answer) for answer in answers}
        wait_for(lambda: worker_of(forkd, forkd.ask(prompt(backend="fast"))) == returned, "it is given streams again")
        settled(forkd, before)
        assert len(ready_pids(forkd)) == 2


def test_a_machine_that_was_frozen_kills_nobody(tmp_path: Path) -> None:
    """Stopped and continued together, for longer than a worker may be silent."""
    with forkd_of(tmp_path, workers_more={"timeout_secs": 1.25}) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 10)
        begun(clients)
        machine = [psutil.Process(forkd.pid), *map(psutil.Process, forkd.workers())]
        for process in machine:
            process.suspend()
        with pytest.raises(psutil.TimeoutExpired):
            machine[1].wait(2.5)  # nothing to wait for but time itself: that is what a freeze is
        for process in reversed(machine):
            process.resume()
        assert fates(read_answers(clients)) == {"complete": 10}
        assert len(ready_pids(forkd)) == 2
        assert "is silent for" not in forkd.log()
