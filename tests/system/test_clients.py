"""Clients as they come: slow, vanishing, half-closing, resetting, flooding, never reading.

What each of them gets, under which code it is counted, and that nothing of it stays behind (`Forkd.counting`).
"""

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness import (
    Answer,
    Forkd,
    connect,
    open_fds,
    read_answer,
    reset,
    running,
    send,
    tcp_pair,
    wait_for,
)

WORD_BYTES, WORDS = 1000, 500
CONFIG = {
    "server": {"write_timeout_secs": 0.5, "linger_secs": 5},
    "backends": {
        "mock": {"provider": "mock", "token_delay_ms": 10},
        "slow": {"provider": "mock", "token_delay_ms": 100},
        "endless": {"provider": "mock", "token_delay_ms": 10, "text": "word " * 20_000},
        "long": {"provider": "mock", "token_delay_ms": 0, "text": ("x" * WORD_BYTES + " ") * WORDS},
        "short": {"provider": "mock", "token_delay_ms": 0, "text": ("x" * WORD_BYTES + " ") * 40},
    },
}
SLOW, ENDLESS = b'{"prompt":"a","backend":"slow"}', b'{"prompt":"a","backend":"endless"}'
LONG, SHORT = b'{"prompt":"a","backend":"long"}', b'{"prompt":"a","backend":"short"}'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkd]:
    with running(tmp_path_factory.mktemp("clients"), config=CONFIG) as daemon:
        yield daemon


@pytest.fixture
def forkd(shared: Forkd) -> Iterator[Forkd]:
    """The daemon that these tests share; none of them may kill a worker of it."""
    workers = shared.workers()
    before = len(shared.log())
    yield shared
    print(shared.log()[before:][-20000:])
    assert shared.workers() == workers


def narrow_pair(*, tcp: bool) -> tuple[socket.socket, socket.socket]:
    """The client's end and Apache's, with as little room between them as the kernel allows."""
    if tcp:
        with socket.socket() as listener, socket.socket() as client:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client.connect(listener.getsockname())
            return socket.socket(fileno=client.detach()), listener.accept()[0]
    client, server = socket.socketpair()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return client, server


def hand_over(forkd: Forkd, server: socket.socket, payload: bytes) -> None:
    """Hand Apache's end over, and close it here."""
    with server, connect(forkd.path) as sender:
        send(sender, payload, server.fileno())


def read_until(client: socket.socket, what: bytes) -> bytes:
    client.settimeout(20)
    got = b""
    while what not in got:
        piece = client.recv(65536)
        assert piece, got
        got += piece
    return got


def handled(forkd: Forkd, before: int) -> dict[str, str]:
    """The access line that comes after `before` others."""
    wait_for(lambda: len(forkd.access_lines()) > before, "the access line")
    (line,) = forkd.access_lines()[before:]
    return line


# Slow.


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_slow_reader_gets_all_of_it_and_the_source_waits_for_it(forkd: Forkd, tcp: bool) -> None:
    before = len(forkd.access_lines())
    with forkd.counting():
        client, server = narrow_pair(tcp=tcp)
        hand_over(forkd, server, LONG)
        answer = read_answer(client)
        assert answer.complete
        assert len(answer.text) == WORDS * (WORD_BYTES + 1) - 1
    line = handled(forkd, before)
    assert line["reason"] == "ok"
    assert line["bytes"] == str(len(answer.raw))


# Never reading.


def test_clients_that_never_read_are_dropped(forkd: Forkd) -> None:
    """Whether the answer is still being produced, or is whole and held, or is an error; over TCP the kernel may notice
    first."""
    before = len(forkd.access_lines())
    kinds = [(payload, tcp) for payload in (LONG, SHORT, ENDLESS) for tcp in (False, True)]
    with forkd.counting(stream_write_timeout=len(kinds) + 1, unknown_backend=1):
        deaf, server = socket.socketpair()
        with suppress(BlockingIOError):
            while True:
                server.send(b" " * 4096, socket.MSG_DONTWAIT)
        hand_over(forkd, server, b'{"backend":"nonesuch"}')
        clients = []
        for payload, tcp in kinds:
            client, server = narrow_pair(tcp=tcp)
            hand_over(forkd, server, payload)
            clients.append(client)
        wait_for(lambda: len(forkd.access_lines()) == before + len(kinds) + 1, "all dropped")
        assert b"HTTP" not in read_answer(deaf).raw
        for client in clients:
            answer = read_answer(client)
            assert answer.raw.startswith(b"HTTP/1.1 200")
            assert b"[DONE]" not in answer.raw
    lines = forkd.access_lines()[before:]
    assert {line["reason"] for line in lines} == {"write_timeout"}
    # Backpressure: the source stopped when about 64 KB were held.
    assert all(int(line["chunks"]) < 300 for line in lines if line["backend"] == "long")
    # What was held and lost is not counted as sent.
    assert all(int(line["bytes"]) < 30_000 for line in lines if line["backend"] == "short")


# Gone.


def test_a_client_that_closes_midway(forkd: Forkd) -> None:
    with forkd.counting(stream_client_disconnected=2):
        for tcp in (False, True):
            client = forkd.hand_over(ENDLESS, tcp=tcp)
            read_until(client, b"word")
            client.close()


def test_a_client_that_closed_before_it_was_handed_over(forkd: Forkd) -> None:
    with forkd.counting(stream_client_disconnected=2):
        for client, server in (socket.socketpair(), tcp_pair()):
            client.close()
            hand_over(forkd, server, ENDLESS)


def test_a_half_closed_client_is_a_disconnect(forkd: Forkd) -> None:
    """Before the handoff, and midway. What it gets until then is whole events, and no ending that would be a lie."""
    answers = []
    with forkd.counting(stream_client_disconnected=4):
        for tcp in (False, True):
            client, server = tcp_pair() if tcp else socket.socketpair()
            client.shutdown(socket.SHUT_WR)
            hand_over(forkd, server, ENDLESS)
            answers.append(read_answer(client))
            client = forkd.hand_over(ENDLESS, tcp=tcp)
            begun = read_until(client, b"word")
            client.shutdown(socket.SHUT_WR)
            rest = read_answer(client)
            answers.append(Answer(begun + rest.raw, rest.reset))
    for answer in answers:
        assert not answer.reset
        assert answer.status == 200
        assert answer.body.endswith(b"\n\n")
        assert answer.text
        assert not answer.complete
        assert answer.error is None


# Resets, at each point of a client's life.


def test_a_reset_before_the_handoff(forkd: Forkd) -> None:
    client, server = tcp_pair()
    with forkd.counting(client_disconnected=1):
        reset(client)
        hand_over(forkd, server, ENDLESS)


def test_a_reset_between_handoff_and_head(tmp_path: Path) -> None:
    with running(tmp_path, config={**CONFIG, "workers": {"count": 1}}) as forkd, forkd.counting(client_disconnected=1):
        (worker,) = forkd.workers()
        fds = open_fds(forkd.pid)
        os.kill(worker, signal.SIGSTOP)
        client = forkd.hand_over(ENDLESS, tcp=True)
        wait_for(lambda: open_fds(forkd.pid) == fds + 1, "received by the master")
        reset(client)
        os.kill(worker, signal.SIGCONT)


def test_a_reset_midway(forkd: Forkd) -> None:
    with forkd.counting(stream_client_disconnected=1):
        client = forkd.hand_over(ENDLESS, tcp=True)
        read_until(client, b"word")
        reset(client)


def test_a_reset_while_data_is_held(forkd: Forkd) -> None:
    """While the source waits for the client, and after it has said all."""
    with forkd.counting(stream_client_disconnected=2):
        for payload in (LONG, SHORT):
            client, server = narrow_pair(tcp=True)
            hand_over(forkd, server, payload)
            read_until(client, b"200 OK")
            reset(client)


def test_a_reset_while_lingering(forkd: Forkd) -> None:
    before = len(forkd.access_lines())
    with forkd.counting():
        client = forkd.hand_over(tcp=True)
        while client.recv(65536):
            pass
        reset(client)
        assert handled(forkd, before)["reason"] == "ok"


def test_a_client_that_stays_after_the_end_is_closed_in_time(tmp_path: Path) -> None:
    config = {**CONFIG, "server": {"linger_secs": 0.2}}
    with running(tmp_path, config=config) as forkd:
        with forkd.counting():
            client = forkd.hand_over(tcp=True)
            while client.recv(65536):
                pass
            # `counting` waits until the worker and the master have let go.
        client.close()


# Flooding.


def test_a_client_that_sends_megabytes_gets_its_whole_answer(forkd: Forkd) -> None:
    """As one that uploads more than the application cared to read. The close must not destroy what it has not read."""
    size = 8_000_000
    with forkd.counting():
        clients = [forkd.hand_over(SLOW, tcp=tcp) for tcp in (True, False)]
        for client in clients:
            client.settimeout(20)
            client.sendall(b"x" * size)  # reads nothing before all is sent
        for client in clients:
            answer = read_answer(client)
            assert not answer.reset
            assert answer.complete


def test_clients_that_send_for_ever_are_held_up_and_let_go(tmp_path: Path) -> None:
    """They cost their window and no more: others are served, and after the linger they are closed."""
    with running(tmp_path, config={**CONFIG, "server": {"linger_secs": 0.5}}) as forkd:
        failures: list[OSError] = []

        def flood(client: socket.socket) -> None:
            try:
                while True:
                    client.send(b"x" * 65536)
            except OSError as error:
                failures.append(error)

        with forkd.counting():
            clients = [forkd.hand_over(tcp=True) for _ in range(4)]
            threads = [threading.Thread(target=flood, args=(client,)) for client in clients]
            for thread in threads:
                thread.start()
            assert forkd.ask().complete
            for thread in threads:
                thread.join(20)
        assert len(failures) == len(clients)
        for client in clients:
            client.close()
        assert {line["reason"] for line in forkd.access_lines()} == {"ok"}


def test_clients_that_send_a_little_are_none_the_worse(forkd: Forkd) -> None:
    """Pipelined requests, the rest of a body: read and discarded, without the loop spinning on it."""
    with forkd.counting():
        client = forkd.hand_over(SLOW, tcp=True)
        for _ in range(30):
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            select.select([client], [], [], 0.02)
        assert read_answer(client).complete
