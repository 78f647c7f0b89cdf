"""The web server over real sockets, its loop in a thread of the test's."""

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from forkd.webserver import Reply, WebServer
from tests.harness import Answer, read_answer, wait_for

LOG = logging.getLogger("test-webserver")
BIG = bytes(range(256)) * 65536


def answer(path: str, accept: str) -> Reply:
    if path == "/big":
        return Reply(200, "application/octet-stream", BIG)
    if path == "/bug":
        raise RuntimeError("a bug")
    return Reply(200, "text/plain", f"{path} {accept}".encode())


class Site:
    """A running server."""

    def __init__(self, server: WebServer, listener: socket.socket) -> None:
        self.server = server
        self.listener = listener

    def connect(self, sent: bytes = b"") -> socket.socket:
        client = socket.create_connection(self.listener.getsockname(), timeout=20)
        client.sendall(sent)
        return client

    def get(self, path: str) -> Answer:
        return read_answer(self.connect(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: a/b\r\n\r\n".encode()))


@contextlib.contextmanager
def serving(max_connections: int = 8, lifetime_secs: float = 60.0) -> Iterator[Site]:
    """A server in a thread, which ends when a byte comes through a pipe."""
    selector = selectors.DefaultSelector()
    end, ender = os.pipe()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    listener.setblocking(False)
    server = WebServer(selector, listener, answer, LOG, max_connections=max_connections, lifetime_secs=lifetime_secs)
    selector.register(end, selectors.EVENT_READ)

    def loop() -> None:
        while True:
            for key, mask in selector.select(server.timeout(time.monotonic())):
                if key.data is None:
                    return
                key.data.on_ready(mask)
            server.expire(time.monotonic())

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield Site(server, listener)
    finally:
        os.write(ender, b"x")
        thread.join()
        selector.close()
        listener.close()
        os.close(end)
        os.close(ender)
    assert not thread.is_alive()


def test_answers_with_path_and_accept() -> None:
    with serving() as site:
        reply = site.get("/page?query=1")
        assert (reply.status, reply.body, reply.header("content-length")) == (200, b"/page a/b", "9")


def test_takes_a_request_in_pieces() -> None:
    with serving() as site, site.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n":
            client.sendall(bytes((byte,)))
        assert read_answer(client).body == b"/x "


def test_a_slow_reader_gets_all_of_a_big_answer_and_holds_up_nobody() -> None:
    with serving() as site, site.connect(b"GET /big HTTP/1.1\r\n\r\n") as slow:
        assert slow.recv(10)
        assert site.get("/quick").status == 200
        assert read_answer(slow).body == BIG


def test_the_oldest_goes_when_there_are_too_many() -> None:
    with serving(max_connections=3) as site, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(site.connect()) for _ in range(3)]
        wait_for(lambda: site.server.open == 3, "three connections")
        assert site.get("/x").status == 200
        assert silent[0].recv(1) == b""
        assert site.get("/x").status == 200
        assert site.server.open <= 3


def test_whoever_takes_too_long_is_told_and_sent_away() -> None:
    with serving(lifetime_secs=0.3) as site:
        silent = site.connect()
        slow = site.connect(b"GET / HTT")
        deaf = site.connect(b"GET /big HTTP/1.1\r\n\r\n")
        assert read_answer(silent).raw == b""
        assert read_answer(slow).status == 408
        wait_for(lambda: site.server.open == 0, "all gone")
        deaf.close()


def test_sleeps_for_ever_when_nobody_is_there() -> None:
    with serving() as site:
        assert site.get("/x").status == 200
        wait_for(lambda: site.server.open == 0, "the connection closed")
        assert site.server.timeout(time.monotonic()) is None


def test_a_bug_in_a_page_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as site:
        assert site.get("/bug").status == 500
        assert site.get("/x").status == 200
    assert "cannot answer /bug" in caplog.text


def test_a_reset_at_any_time_is_no_news() -> None:
    with serving() as site:
        for sent in (b"", b"GET", b"GET /x HTTP/1.1\r\n\r\n", b"GET /big HTTP/1.1\r\n\r\n"):
            client = site.connect(sent)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        assert site.get("/x").status == 200
        wait_for(lambda: site.server.open == 0, "all gone")


def test_without_fds_it_waits_instead_of_spinning() -> None:
    failures = [OSError(24, "Too many open files")] * 2

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return super().accept()

    selector = selectors.DefaultSelector()
    with Listener() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        server = WebServer(selector, listener, answer, LOG)
        with socket.create_connection(listener.getsockname(), timeout=20) as client:
            client.sendall(b"GET /x HTTP/1.1\r\n\r\n")
            clock = time.monotonic()
            for _ in range(2):
                assert selector.select(20)
                server.on_ready(selectors.EVENT_READ)
                assert server.timeout(clock) is not None
                assert not selector.select(0)
                clock += 5
                server.expire(clock)
            assert selector.select(20)
            server.on_ready(selectors.EVENT_READ)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            client.close()
            server.expire(clock + 60)
    selector.close()
