"""Death and recovery: whatever happens to a worker, each client gets its stream or is told, and closed in order."""

import collections
import fcntl
import json
import os
import random
import re
import signal
import socket
import termios
import time
from pathlib import Path

import pytest

from tests.harness import Answer, connect, open_fds, read_answer, read_answers, send, tcp_pair, wait_for
from tests.system.crowd import begun, fate, fates, forkd_of, hand_over_many, prompt, ready_pids, settled


def test_a_worker_killed_under_a_thousand_streams(tmp_path: Path) -> None:
    with forkd_of(tmp_path, workers=4) as forkd:
        before = open_fds(forkd.pid)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt("Hello", backend="slow")] * 1000)
        begun(clients)
        victim = ready_pids(forkd)[1]
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(ready_pids(forkd)) == 5, "a new worker is ready")
        print(f"a new worker was ready {time.monotonic() - killed_at:.3f} s after the death")
        answers = fates(read_answers(clients))
        assert set(answers) == {"complete", "worker_lost"}
        assert 240 <= answers["worker_lost"] <= 260  # its share
        assert settled(forkd, before, deaths=1) == {"ended": answers["worker_lost"]}
        forkd.wait_for_metric("forkd_stream_errors_total", answers["worker_lost"], code="worker_lost")
        assert len(forkd.workers()) == 4


def shape_of(answer: Answer) -> str:
    """What an answer consists of, for the summary: status lines, kinds of events."""
    found = re.findall(rb"HTTP/1.1 \d+|event: \w+|\[DONE\]|data: \{\"content\"", answer.raw)
    names = [piece.decode().removeprefix("HTTP/1.1 ").replace('data: {"content"', "text") for piece in found]
    return " ".join(name for name, before in zip(names, ["", *names], strict=False) if name != before)


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_killed_in_their_first_millisecond(tmp_path: Path, workers: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    burst, rounds = 3, 250
    clients: list[socket.socket] = []
    with forkd_of(tmp_path, workers=workers) as forkd:
        before = open_fds(forkd.pid)
        alive = set(ready_pids(forkd))
        with connect(forkd.path) as sender:
            for _ in range(rounds):
                payloads = [prompt("Hello", backend=chance.choice(("mock", "fast"))) for _ in range(burst)]
                clients += hand_over_many(sender, payloads)
                wait_until = time.perf_counter() + chance.random() / 1000
                while time.perf_counter() < wait_until:
                    pass
                victim = chance.choice(sorted(alive))
                known = set(ready_pids(forkd))
                os.kill(victim, signal.SIGKILL)
                born = wait_for(lambda known=known: set(ready_pids(forkd)) - known, "a new worker is ready")
                alive = alive - {victim} | born
        answers = read_answers(clients)
        outcomes = fates(answers)
        print(dict(outcomes))
        for shape, count in collections.Counter(shape_of(answer) for answer in answers).most_common():
            print(f"{count:5} {shape}")
        assert set(outcomes) <= {"complete", "worker_lost", "poison"}
        assert outcomes["complete"]
        assert outcomes["worker_lost"]
        print(settled(forkd, before, deaths=rounds))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_handoff_that_kills_twice_is_poison(tmp_path: Path, workers: int) -> None:
    with forkd_of(tmp_path, workers=workers) as forkd:
        before = open_fds(forkd.pid)
        with connect(forkd.path) as sender:
            live = hand_over_many(sender, [prompt("Hello", backend="still")] * 10)
            begun(live)
            (poisonous, *behind) = hand_over_many(sender, [prompt("kill@0"), *[prompt("Hello")] * 20])
        answer = read_answer(poisonous)
        assert (answer.status, answer.json["code"]) == (502, "poison")
        assert fates(read_answers(live)) == {"worker_lost": 10}
        others = fates(read_answers(behind))
        assert set(others) <= {"complete", "worker_lost"}
        if workers == 1:  # none of them can have begun before the poison killed
            assert others == {"complete": 20}
        assert fate(forkd.ask()) == "complete"
        assert settled(forkd, before, deaths=2)["poison"] == 1


@pytest.mark.parametrize("act", ["kill", "exit"])
def test_a_death_amid_the_answer_is_told(tmp_path: Path, act: str) -> None:
    with forkd_of(tmp_path) as forkd:
        answer = forkd.ask(prompt(f"{act}@5"), tcp=True)
        assert answer.status == 200
        assert answer.text == "Hello! I am "  # what a turn has to say goes out at its end, which this one did not see
        assert fate(answer) == "worker_lost"
        forkd.wait_for_metric("forkd_worker_deaths_total", 1)
        forkd.wait_for_metric("forkd_streams_recovered_total", 1, outcome="ended")
        assert {"kill": "was killed by SIGKILL", "exit": "exited with status 3"}[act] in forkd.log()


def test_a_death_just_before_the_first_write(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        answer = forkd.ask(prompt("kill@write"), tcp=True)
        assert answer.status == 502
        assert answer.header("content-type") == "text/event-stream"
        assert fate(answer) == "worker_lost"


def test_a_death_just_after_the_first_write(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        answer = forkd.ask(prompt("kill@written"), tcp=True)
        assert answer.status == 200
        assert answer.text == "kill@written"
        assert b"\n\nHTTP/1.1 502 " in answer.raw  # to the reader of events these are fields of unknown names
        assert [event.name for event in answer.events] == ["message", "error"]
        assert fate(answer) == "worker_lost"


def test_a_death_between_the_last_word_and_the_end_does_no_harm(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        answer = forkd.ask(prompt("kill@done"), tcp=True)
        assert [event.data for event in answer.events[:3]] == ['{"content":"kill@done"}', "[DONE]", "{}"]
        assert not answer.reset


@pytest.mark.parametrize("where", [0, 1, 4])
def test_a_backend_that_raises_costs_its_own_stream_only(tmp_path: Path, where: int) -> None:
    with forkd_of(tmp_path, workers=1) as forkd:
        with connect(forkd.path) as sender:
            other = hand_over_many(sender, [prompt("Hello")])
            begun(other)
            answer = forkd.ask(prompt(f"fail@{where}"))
        assert fate(answer) == "internal_error"
        assert answer.status == (200 if where == 4 else 500)
        assert fates(read_answers(other)) == {"complete": 1}
        assert fate(forkd.ask()) == "complete"
        assert "RuntimeError: the backend is broken" in forkd.log()
        assert len(ready_pids(forkd)) == 1


def stuck(client: socket.socket, server: socket.socket) -> None:
    """Wait until what lies unread and unsent between the two ends has stopped growing."""
    sizes: list[tuple[bytes, bytes]] = []

    def still() -> bool:
        unread = fcntl.ioctl(client, termios.FIONREAD, b"\0" * 4)
        sizes.append((unread, fcntl.ioctl(server, termios.TIOCOUTQ, b"\0" * 4)))
        return unread != b"\0" * 4 and len(sizes) > 40 and len(set(sizes[-40:])) == 1

    wait_for(still, "the client's buffer is full")


@pytest.mark.parametrize("tcp", [False, True])
def test_a_slow_reader_is_told_behind_the_half_event_it_has(tmp_path: Path, tcp: bool) -> None:
    with forkd_of(tmp_path, workers=1) as forkd:
        before = open_fds(forkd.pid)
        client, server = tcp_pair() if tcp else socket.socketpair()
        with server, connect(forkd.path) as sender:
            send(sender, prompt("flood"), server.fileno())
            stuck(client, server)
        os.kill(ready_pids(forkd)[0], signal.SIGKILL)
        wait_for(lambda: len(ready_pids(forkd)) == 2, "a new worker is ready")
        forkd.wait_for_metric("forkd_streams_recovered_total", 1, outcome="ended")
        answer = read_answer(client)
        last = answer.events[-1]
        assert last.name == "error"
        half, _, told = last.data.rpartition("\n")
        assert half.startswith('{"content":"~~~')
        assert not half.endswith('"}')
        assert json.loads(told)["code"] == "worker_lost"
        assert not answer.reset
        assert settled(forkd, before, deaths=1) == {"ended": 1}


@pytest.mark.parametrize("tcp", [False, True])
def test_a_death_while_lingering_is_silent(tmp_path: Path, tcp: bool) -> None:
    with forkd_of(tmp_path, workers=1, server={"linger_secs": 60}) as forkd:
        before = open_fds(forkd.pid)
        client = forkd.hand_over(prompt("Hello"), tcp=tcp)
        client.sendall(b"not read by anybody yet")
        pieces = b""
        while piece := client.recv(65536):
            pieces += piece
        assert fate(Answer(pieces)) == "complete"
        os.kill(ready_pids(forkd)[0], signal.SIGKILL)
        forkd.wait_for_metric("forkd_streams_recovered_total", 1, outcome="closed")
        assert client.recv(1) == b""
        client.close()
        assert settled(forkd, before, deaths=1) == {"closed": 1}


def test_handoffs_that_wait_in_a_dead_workers_channel_go_to_others_whole(tmp_path: Path) -> None:
    with forkd_of(tmp_path, server={"queue_timeout_secs": 60}) as forkd:
        before = open_fds(forkd.pid)
        first, second = ready_pids(forkd)
        for pid in (first, second):
            os.kill(pid, signal.SIGSTOP)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt("Hello")] * 900)
        forkd.wait_for_metric("daemon_connections_total", 900)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: len(ready_pids(forkd)) == 3, "a new worker is ready")
        os.kill(second, signal.SIGCONT)
        assert fates(read_answers(clients)) == {"complete": 900}
        outcomes = settled(forkd, before, deaths=1)
        assert set(outcomes) == {"redispatched"}
        assert outcomes["redispatched"] > 200


def test_all_workers_killed_at_once(tmp_path: Path) -> None:
    with forkd_of(tmp_path, workers=3) as forkd:
        before = open_fds(forkd.pid)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt("Hello", backend="still")] * 300)
        begun(clients)
        for pid in ready_pids(forkd):
            os.kill(pid, signal.SIGKILL)
        assert fates(read_answers(clients)) == {"worker_lost": 300}
        outcomes = settled(forkd, before, deaths=3)
        assert outcomes["ended"] >= 300  # some were judged again: who was to tell them died too,
        assert set(outcomes) <= {"ended", "closed"}  # perhaps having told them
        assert fate(forkd.ask()) == "complete"


def test_a_death_while_anothers_streams_are_being_recovered(tmp_path: Path) -> None:
    with forkd_of(tmp_path) as forkd:
        before = open_fds(forkd.pid)
        first, second = ready_pids(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt("Hello", backend="still")] * 600)
        begun(clients)
        os.kill(second, signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)  # its half are put into the channel of the second, which cannot read them
        wait_for(lambda: forkd.metric("forkd_streams_recovered_total", outcome="ended") >= 290, "they are judged")
        os.kill(second, signal.SIGKILL)
        assert fates(read_answers(clients)) == {"worker_lost": 600}
        outcomes = settled(forkd, before, deaths=2)
        assert set(outcomes) == {"ended"}
        assert outcomes["ended"] > 600  # some were judged twice


def test_without_the_ledger_a_dead_workers_clients_are_lost_but_the_books_balance(tmp_path: Path) -> None:
    with forkd_of(tmp_path, server={"ledger": False}) as forkd:
        before = open_fds(forkd.pid)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt("Hello", backend="slow")] * 100)
        begun(clients)
        assert open_fds(forkd.pid) < before + 40
        os.kill(ready_pids(forkd)[0], signal.SIGKILL)
        answers = read_answers(clients)
        lost = sum(not answer.complete and answer.error is None for answer in answers)
        assert 45 <= lost <= 55  # its share
        assert sum(answer.complete for answer in answers) == 100 - lost
        assert settled(forkd, before, deaths=1) == {"closed": lost}
        assert fate(forkd.ask()) == "complete"


def test_workers_that_die_before_they_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    monkeypatch.setenv("FORKD_TEST_BROKEN", str(broken))
    with forkd_of(tmp_path, workers=1, server={"queue_timeout_secs": 1}) as forkd:
        before = open_fds(forkd.pid)
        with connect(forkd.path) as sender:
            live = hand_over_many(sender, [prompt("Hello", backend="still")] * 5)
        begun(live)
        broken.touch()
        os.kill(ready_pids(forkd)[0], signal.SIGKILL)
        answer = forkd.ask()
        assert (answer.status, answer.json["code"]) == (503, "queue_timeout")
        assert answer.header("retry-after") == "1"
        wait_for(lambda: forkd.log().count("exited with status 7") >= 3, "it keeps trying")
        broken.unlink()
        wait_for(lambda: len(ready_pids(forkd)) == 2, "a worker is ready at last")
        # The head was out for these: only a worker can tell them, so they waited for one.
        assert fates(read_answers(live)) == {"worker_lost": 5}
        assert fate(forkd.ask()) == "complete"
        assert settled(forkd, before, deaths=forkd.log().count("; streams: "))["ended"] == 5


def test_a_worker_that_computes_or_is_stopped_is_ended_and_its_clients_told(tmp_path: Path) -> None:
    with forkd_of(tmp_path, workers=3, workers_more={"timeout_secs": 3.5}) as forkd:
        before = open_fds(forkd.pid)
        with connect(forkd.path) as sender:
            live = hand_over_many(sender, [prompt("flood")] * 3)  # one for each worker
            begun(live)
            (spinning,) = hand_over_many(sender, [prompt("spin@2")])
            begun([spinning])
            (stopping,) = hand_over_many(sender, [prompt("stop@2")])
            begun([stopping])
            waiting = hand_over_many(sender, [prompt("Hello")] * 30)
        wait_for(lambda: len(ready_pids(forkd)) == 5, "both are replaced")
        assert fates(read_answers([spinning, stopping])) == {"worker_lost": 2}
        assert fates(read_answers(waiting)) == {"complete": 30}
        log = forkd.log()
        assert log.count("is silent for 4 s: ending it") == 2
        assert "was killed by SIGABRT" in log
        assert "was killed by SIGKILL" in log
        assert "Fatal Python error: Aborted" in log
        # Its stack; not looked at line by line, because faulthandler writes in pieces and others write to the log too.
        assert len(re.findall(r'^  File ".*", line \d+ in ', log, re.MULTILINE)) > 5
        assert len(set(ready_pids(forkd)[:3]) & set(forkd.workers())) == 1
        for client in live:
            client.close()
        settled(forkd, before, deaths=2)
