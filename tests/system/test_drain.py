"""Stopping, and the other signals: each client gets a whole stream or is told, and nothing is left behind."""

import collections
import errno
import os
import re
import select
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from forkd import process
from forkd.board import Board
from forkd.boot import Boot
from forkd.channel import Assignment, Down, send_down
from forkd.logs import Logs, Sink
from forkd.settings import Settings
from tests.harness import Forkd, connect, open_fds, read_answers, running, send, wait_for
from tests.system.crowd import begun, fate, fates, forkd_of, hand_over_many, prompt, ready_pids, settled
from workers.main import run as run_worker


def gone(pids: list[int]) -> bool:
    """None of these processes is left (a zombie is not a process any more)."""
    return all(not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie" for pid in pids)


def left_in_order(forkd: Forkd, family: list[int]) -> None:
    """Wait until forkd has exited with status 0, has removed its socket and has left no process."""
    assert forkd.process is not None
    assert forkd.process.wait(20) == 0
    assert not Path(forkd.path).exists()
    wait_for(lambda: gone(family), "no process is left")


def family_of(forkd: Forkd) -> list[int]:
    return [child.pid for child in psutil.Process(forkd.pid).children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_streams_finish_and_takes_nothing_new(tmp_path: Path, number: signal.Signals) -> None:
    with forkd_of(tmp_path) as forkd:
        family = family_of(forkd)
        persistent = connect(forkd.path)
        silent = connect(forkd.path)
        clients = hand_over_many(persistent, [prompt(backend="slow")] * 20)
        begun(clients)
        os.kill(forkd.pid, number)
        wait_for(lambda: f"{number.name}: finishing 20 streams" in forkd.log(), "it drains")
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):  # the senders take both for the same
            connect(forkd.path)
        _, server = socket.socketpair()
        for sender in (persistent, silent):
            with pytest.raises(BrokenPipeError):
                send(sender, prompt(), server.fileno())
        master = psutil.Process(forkd.pid)
        wait_for(lambda: " draining workers=2 streams=" in master.cmdline()[0], "the master's title says so")
        wait_for(lambda: any(" draining streams=" in title for title in titles(forkd)), "the workers' titles say so")
        assert fates(read_answers(clients)) == {"complete": 20}
        left_in_order(forkd, family)
        assert "forkd stopped" in forkd.log()


def titles(forkd: Forkd) -> list[str]:
    return [psutil.Process(pid).cmdline()[0] for pid in forkd.workers()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_to_the_whole_group_is_the_masters_business(tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal sends INT and QUIT, and systemd TERM unless told otherwise."""
    with running(tmp_path, popen={"start_new_session": True}) as forkd:
        family = family_of(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt()] * 20)
        begun(clients)
        os.killpg(forkd.pid, number)
        answers = fates(read_answers(clients))
        if number == signal.SIGQUIT:
            assert set(answers) <= {"shutdown", "worker_lost", "complete"}
        else:
            assert answers == {"complete": 20}
        left_in_order(forkd, family)


def test_a_stop_while_500_senders_are_handing_over(tmp_path: Path) -> None:
    with forkd_of(tmp_path, server={"queue_size": 4096}) as forkd:
        family = family_of(forkd)
        clients: list[socket.socket] = []
        refusals: collections.Counter[str] = collections.Counter()
        all_there = threading.Barrier(500)

        def hand_over_until_refused(persistent: bool) -> None:
            sender = None
            all_there.wait(60)
            while True:
                client, server = socket.socketpair()
                try:
                    with server:
                        sender = sender or connect(forkd.path)
                        send(sender, prompt(backend="fast"), server.fileno())
                except OSError as error:
                    client.close()
                    refusals[errno.errorcode[error.errno or 0]] += 1
                    return
                clients.append(client)
                if len(clients) == 1000:
                    os.kill(forkd.pid, signal.SIGTERM)
                if not persistent:
                    sender.close()
                    sender = None

        senders = [threading.Thread(target=hand_over_until_refused, args=(number % 2 == 0,)) for number in range(500)]
        for thread in senders:
            thread.start()
        for thread in senders:
            thread.join(60)
            assert not thread.is_alive()
        assert set(refusals) <= {"ECONNREFUSED", "EPIPE", "ENOENT"}
        assert sum(refusals.values()) == 500
        answers = fates(read_answers(clients, patience=60))
        print(refusals, answers)
        assert set(answers) <= {"complete", "no_capacity", "queue_timeout", "shutdown"}
        assert answers["complete"]
        left_in_order(forkd, family)


def test_streams_that_outlast_the_shutdown_timeout_are_told(tmp_path: Path) -> None:
    with forkd_of(tmp_path, server={"shutdown_timeout_secs": 0.5}) as forkd:
        family = family_of(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="still")] * 20)
        begun(clients)
        os.kill(forkd.pid, signal.SIGTERM)
        assert fates(read_answers(clients)) == {"shutdown": 20}
        left_in_order(forkd, family)
        assert "20 streams did not finish in time: ending them" in forkd.log()


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGQUIT),
        (signal.SIGQUIT,),
    ],
)
def test_a_second_stop_ends_streams_at_once(tmp_path: Path, numbers: tuple[signal.Signals, ...]) -> None:
    with forkd_of(tmp_path) as forkd:
        family = family_of(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt("flood")] * 20)
        begun(clients)
        for number in numbers:
            os.kill(forkd.pid, number)
            wait_for(lambda: re.search("(finishing|ending) 20 streams", forkd.log()), "the signal was taken")
        answers = read_answers(clients)
        assert [answer.error["code"] for answer in answers if answer.error] == ["shutdown"] * 20
        left_in_order(forkd, family)
    assert re.search(rf"{numbers[-1].name}: ending \d+ streams", forkd.log())
    assert ("for up to" in forkd.log()) is (len(numbers) > 1)


def test_clients_that_read_nothing_do_not_hold_up_a_stop(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        family = family_of(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt("flood")] * 4)
        begun(clients)
        forkd.wait_for_metric("daemon_active_streams", 4)
        os.kill(forkd.pid, signal.SIGQUIT)
        left_in_order(forkd, family)
        for client in clients:
            client.close()


def test_a_worker_that_dies_during_the_drain(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        family = family_of(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 20)
        begun(clients)
        victim = ready_pids(forkd)[0]
        os.kill(forkd.pid, signal.SIGTERM)
        wait_for(lambda: any(" draining streams=" in title for title in titles(forkd)), "the workers drain")
        os.kill(victim, signal.SIGKILL)
        answers = fates(read_answers(clients))
        assert sum(answers.values()) == 20
        assert 9 <= answers["complete"] <= 11  # its share, which may be one stream more or less than half
        assert answers["worker_lost"] == 20 - answers["complete"]
        left_in_order(forkd, [*family, *ready_pids(forkd)])


def test_a_worker_that_is_sent_sigterm_drains_and_is_replaced(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        before = open_fds(forkd.pid)
        first, second = ready_pids(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 20)
            begun(clients)
            os.kill(first, signal.SIGTERM)
            wait_for(lambda: len(ready_pids(forkd)) == 3, "another worker is ready")
            clients += hand_over_many(sender, [prompt()] * 20)
        assert fates(read_answers(clients)) == {"complete": 40}
        wait_for(lambda: forkd.workers() == sorted([second, ready_pids(forkd)[2]]), "the drained worker is gone")
        assert settled(forkd, before) == {}


def test_a_worker_with_a_full_channel_still_drains(tmp_path: Path) -> None:
    with forkd_of(tmp_path, server={"queue_timeout_secs": 60}) as forkd:
        for pid in ready_pids(forkd):
            os.kill(pid, signal.SIGSTOP)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt()] * 700)
        forkd.wait_for_metric("daemon_connections_total", 700)
        os.kill(forkd.pid, signal.SIGTTOU)  # there is no room to tell it
        wait_for(lambda: "1 workers wanted" in forkd.log(), "the signal was taken")
        for pid in ready_pids(forkd):
            os.kill(pid, signal.SIGCONT)
        assert fates(read_answers(clients)) == {"complete": 700}
        wait_for(lambda: len(forkd.workers()) == 1, "one worker is gone")


def test_more_and_fewer_workers(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="still")] * 6)
            begun(clients)
            os.kill(forkd.pid, signal.SIGTTIN)
            wait_for(lambda: len(ready_pids(forkd)) == 3, "one more is ready")
            clients += hand_over_many(sender, [prompt(backend="still")] * 3)  # the least loaded is the new one
        wait_for(lambda: sum(streams(forkd)) == 9 and min(streams(forkd)) >= 2, "the new one has its share")
        wanted = ["3"]
        for expected in ("2", "1", "1"):
            os.kill(forkd.pid, signal.SIGTTOU)
            wanted.append(expected)
            wait_for(lambda: re.findall(r"(\d) workers wanted", forkd.log()) == wanted, "the signal was taken")
        drains = re.compile(r" draining streams=[1-9]$")
        wait_for(lambda: sum(bool(drains.search(title)) for title in titles(forkd)) == 2, "two of them drain")
        for client in clients:
            client.close()
        wait_for(lambda: len(forkd.workers()) == 1, "one stays, whatever comes")
        assert fate(forkd.ask()) == "complete"
        assert forkd.metric("forkd_worker_deaths_total") == 0
        wait_for(lambda: psutil.Process(forkd.pid).cmdline()[0].endswith(" workers=1 streams=0"), "the title says so")


def streams(forkd: Forkd) -> list[int]:
    """How many streams each worker has, by its title."""
    return [int(title.rpartition("streams=")[2]) for title in titles(forkd)]


def test_hup_tells_how_many_streams_there_are(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 5)
        begun(clients)
        os.kill(forkd.pid, signal.SIGHUP)
        wait_for(lambda: "5 streams in 2 workers" in forkd.log(), "it says so")
        assert fates(read_answers(clients)) == {"complete": 5}


def test_usr1_reopens_the_log_in_every_process(tmp_path: Path) -> None:
    log, rotated = tmp_path / "forkd.log", tmp_path / "forkd.log.1"
    with running(tmp_path, config={"workers": {"count": 2}}) as forkd:
        pids = [forkd.pid, *forkd.workers()]
        before = {pid: open_fds(pid) for pid in pids}
        log.rename(rotated)
        os.kill(forkd.pid, signal.SIGUSR1)

        def reopened() -> bool:
            links = [os.readlink(file) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists()]
            return str(rotated) not in links and links.count(str(log)) == len(pids)

        wait_for(reopened, "nobody has the old file open")
        assert {pid: open_fds(pid) for pid in pids} == before
        old = rotated.read_text()
        for _ in range(4):
            assert fate(forkd.ask()) == "complete"
        wait_for(lambda: len(forkd.access_lines()) == 4, "access lines are in the new file")
        assert rotated.read_text() == old


def test_a_log_that_cannot_be_reopened_harms_nobody(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    with running(tmp_path, config={"logging": {"file": str(directory / "forkd.log")}}, ready=False) as forkd:
        wait_for(lambda: len(forkd.workers()) == 2, "workers are there")
        workers = forkd.workers()
        (directory / "forkd.log").rename(tmp_path / "forkd.log")
        directory.rmdir()
        os.kill(forkd.pid, signal.SIGUSR1)
        for who in ("master", "worker 1", "worker 2"):
            wait_for(lambda who=who: f"{who}: cannot reopen" in forkd.log(), "each of them says so, in the old file")
        assert fate(forkd.ask()) == "complete"
        assert forkd.workers() == workers


def test_a_master_that_is_killed(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        family = family_of(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 20)
            begun(clients)
            assert forkd.process is not None
            forkd.process.kill()
            forkd.process.wait()
        assert Path(forkd.path).exists()
        (tmp_path / "forkd.log").rename(tmp_path / "forkd.log.1")
        forkd.start()  # on the stale socket, while the old workers are at work
        assert fate(forkd.ask()) == "complete"
        assert fates(read_answers(clients)) == {"complete": 20}
        wait_for(lambda: gone(family), "the old workers are gone")
        assert fate(forkd.ask()) == "complete"


def test_handoffs_in_the_channel_of_a_master_that_is_gone(tmp_path: Path) -> None:
    """A worker reads them, even when the master died with reports unread: then the kernel first says ECONNRESET."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    logs = Logs(Sink(str(tmp_path / "log")), "info", "pretty", access=True)
    pid = os.fork()
    if pid == 0:
        try:
            process.close_all_but([theirs.fileno(), logs.sink.fd])
            run_worker(Boot(1, 1, theirs, Board(3), Settings(), logs, None))
        finally:
            os._exit(0)
    theirs.close()
    assert select.select([ours], [], [], 20)[0]  # READY is there, and stays unread
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    clients = []
    for slot in range(3):
        client, server = socket.socketpair()
        with server:
            head = Assignment(slot, 1, Down.ASSIGN, 0, 0, time.monotonic())
            send_down(ours, head, prompt(), [server.fileno()])
        clients.append(client)
    ours.close()
    os.kill(pid, signal.SIGCONT)
    assert fates(read_answers(clients)) == {"complete": 3}
    os.waitpid(pid, 0)
    os.close(logs.sink.fd)
