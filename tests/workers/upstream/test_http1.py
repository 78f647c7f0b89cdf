"""HTTP/1.1: what an answer's bytes do to the exchange, and to the connection."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.upstream.kit import REQUEST, FakePool, FakeTransport, Listener
from workers.loop import Loop
from workers.upstream.exchange import Exchange
from workers.upstream.http1 import HEAD_MAX_BYTES, Http1
from workers.upstream.message import HttpRequest

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = CHUNKED + b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


class World:
    def __init__(self) -> None:
        self.loop = Loop()
        self.pool = FakePool()
        self.transport: Any = FakeTransport()
        self.connection = Http1(self.loop, self.pool, self.transport, "api.test:81", "/v1")

    def ask(self, request: HttpRequest = REQUEST) -> tuple[Exchange, Listener]:
        listener = Listener()
        exchange = Exchange(request, listener, fresh=False)
        self.connection.send(exchange)
        return exchange, listener

    def tick(self, ticks: int) -> None:
        """Let so much time go by."""
        self.loop.at += ticks
        for due in sorted(due for due in self.loop._buckets if due <= self.loop.at):
            for timed in self.loop._buckets.pop(due):
                timed.tick()


@pytest.fixture
def world():
    world = World()
    yield world
    world.loop.close()


def test_the_request(world: World) -> None:
    world.ask()
    assert world.transport.take() == (
        b"POST /v1/chat HTTP/1.1\r\nhost: api.test:81\r\ncontent-type: application/json\r\nx-request-id: r1\r\n"
        b'accept-encoding: identity\r\ncontent-length: 7\r\n\r\n{"a":1}'
    )


@given(st.sets(st.integers(1, len(WHOLE) - 1)))
def test_any_cut_gives_the_same_answer_and_the_connection_lives_on(cuts: set[int]) -> None:
    world = World()
    try:
        for _ in range(2):
            _, listener = world.ask()
            for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(WHOLE)], strict=True):
                world.connection.received(WHOLE[start:end])
            assert (listener.status, listener.data, listener.ended) == (200, b"onetwo", True)
            assert listener.fields["content-type"] == "text/event-stream"
        assert world.pool.said == ["idle", "idle"]
    finally:
        world.loop.close()


def test_an_interim_answer_is_passed_over(world: World) -> None:
    _, listener = world.ask()
    world.connection.received(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + WHOLE)
    assert (listener.status, listener.data, listener.ended) == (200, b"onetwo", True)


@pytest.mark.parametrize(
    ("answer", "eof", "status", "data", "outcome"),
    [
        # The end of the connection is the end of the message, if nothing says otherwise.
        (b"HTTP/1.1 200 OK\r\n\r\nall of it", True, 200, b"all of it", "complete"),
        (b"HTTP/1.0 200 OK\r\n\r\nall of it", True, 200, b"all of it", "complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nall", False, 200, b"all", "complete"),
        # More than was announced: the answer is what was announced, the connection is not trusted any more.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nall of it", False, 200, b"all", "complete"),
        (WHOLE + b"HTTP/1.1 200 OK\r\n", False, 200, b"onetwo", "complete"),
        # Less than was announced.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nall of it", True, 200, b"all of it", "backend_reset"),
        (CHUNKED + b"3\r\none\r\n", True, 200, b"one", "backend_reset"),
        (b"", True, 0, b"", "backend_reset"),
        (b"HTTP/1.1 200 OK\r\nConte", True, 0, b"", "backend_reset"),
        # No HTTP.
        (b"garbage\r\n\r\n", False, 0, b"", "backend_garbled"),
        (b"\x16\x03\x01\x00\x00", False, 0, b"", "backend_garbled"),
        (CHUNKED + b"ZZ\r\n", False, 200, b"", "backend_garbled"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", False, 0, b"", "backend_garbled"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            False,
            0,
            b"",
            "backend_garbled",
        ),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", False, 0, b"", "backend_garbled"),
    ],
)
def test_odd_answers_close_the_connection(
    world: World, answer: bytes, eof: bool, status: int, data: bytes, outcome: str
) -> None:
    _, listener = world.ask()
    if answer:
        world.connection.received(answer)
    if eof and world.transport.fd >= 0:
        world.transport.close()
        world.connection.lost("", "it closed the connection")
    assert (listener.status, listener.data) == (status, data)
    if outcome == "complete":
        assert listener.ended
    else:
        assert listener.failure is not None
        assert listener.failure.code == outcome
    assert world.pool.said == ["closed"]
    assert world.transport.fd == -1


@pytest.mark.parametrize("piece", [b"X-Filler: 0123456789\r\n", b"X" * 1000])
def test_a_head_without_an_end(world: World, piece: bytes) -> None:
    _, listener = world.ask()
    world.connection.received(b"HTTP/1.1 200 OK\r\n")
    sent = 0
    while not listener.over:
        world.connection.received(piece)
        sent += len(piece)
    assert HEAD_MAX_BYTES - len(piece) <= sent <= HEAD_MAX_BYTES + len(piece)
    assert listener.failure is not None
    assert listener.failure.code == "backend_head_too_large"
    assert world.transport.fd == -1


def test_a_connection_that_dies_before_it_answers_again_was_stale(world: World) -> None:
    world.ask()
    world.connection.received(WHOLE)
    _, listener = world.ask()
    world.transport.close()
    world.connection.lost("", "it closed the connection")
    assert listener.failure is not None
    assert listener.failure.stale
    fresh = World()
    _, first = fresh.ask()
    fresh.connection.lost("backend_reset", "reset")
    assert first.failure is not None
    assert not first.failure.stale
    fresh.loop.close()


TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlate"


def test_a_farewell_that_crosses_the_request_is_no_answer_to_it(world: World) -> None:
    """RFC 9110, 15.5.9: a server may say 408 on a connection that was idle for too long."""
    world.ask()
    world.connection.received(WHOLE)
    _, listener = world.ask()
    world.connection.received(TIMED_OUT)
    assert listener.failure is not None
    assert listener.failure.stale
    assert not listener.failure.unseen
    assert not listener.status
    assert world.transport.fd == -1
    assert world.pool.said == ["idle", "closed"]


@pytest.mark.parametrize(
    ("used", "answer"), [(False, TIMED_OUT), (True, TIMED_OUT.replace(b"Connection: close\r\n", b""))]
)
def test_other_timeouts_are_answers(world: World, used: bool, answer: bytes) -> None:
    """On a new connection, or where the connection stays: it is the model that took too long."""
    if used:
        world.ask()
        world.connection.received(WHOLE)
    _, listener = world.ask()
    world.connection.received(answer)
    assert (listener.status, listener.data, listener.ended) == (408, b"late", True)


def test_bytes_on_an_idle_connection_close_it(world: World) -> None:
    world.ask()
    world.connection.received(WHOLE)
    world.connection.received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert world.transport.fd == -1
    assert world.pool.said == ["idle", "closed"]


def test_cancel_closes(world: World) -> None:
    exchange, listener = world.ask()
    world.connection.received(CHUNKED + b"3\r\none\r\n")
    exchange.cancel()
    assert world.transport.fd == -1
    assert world.pool.said == ["closed"]
    assert not listener.over


def test_a_cancel_from_within_the_answer(world: World) -> None:
    exchange, listener = world.ask()

    def body(data: bytes) -> None:
        listener.data += data
        exchange.cancel()

    listener.body = body  # type: ignore[method-assign]
    world.connection.received(WHOLE)
    assert listener.data == b"one"
    assert world.transport.fd == -1
    assert world.pool.said == ["closed"]


def test_release_keeps_a_connection_whose_answer_ends(world: World) -> None:
    exchange, listener = world.ask()
    world.connection.received(CHUNKED + b"3\r\none\r\n")
    exchange.release()
    world.connection.received(b"3\r\ntwo\r\n0\r\n\r\n")
    assert world.pool.said == ["idle"]
    assert listener.data == b"one"
    _, another = world.ask()  # the released one's deadline is not this one's
    world.tick(200)
    assert not another.over
    assert world.transport.fd >= 0


def test_release_does_not_wait_for_ever(world: World) -> None:
    exchange, _ = world.ask()
    world.connection.received(CHUNKED)
    exchange.release()
    world.tick(99)
    assert world.transport.fd >= 0
    world.tick(2)
    assert world.transport.fd == -1
    assert world.pool.said == ["closed"]


def test_pause_stops_the_reading(world: World) -> None:
    exchange, _ = world.ask()
    exchange.pause()
    assert world.transport.paused
    exchange.resume()
    assert not world.transport.paused


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_random_bytes_never_do_more_than_end_the_connection(pieces: list[bytes]) -> None:
    world = World()
    try:
        _, listener = world.ask()
        for piece in pieces:
            if world.transport.fd >= 0:
                world.connection.received(piece)
        assert listener.error is None
    finally:
        world.loop.close()


@pytest.mark.parametrize(
    "begun", [b"", CHUNKED, CHUNKED + b"3\r\none\r\n3;x=", CHUNKED + b"3\r\none\r\n0\r\nx-trailer: "]
)
def test_what_is_neither_head_nor_body_is_bounded_too(world: World, begun: bytes) -> None:
    _, listener = world.ask()
    world.connection.received(begun or b"HTTP/1.1 200 OK\r\nx: ")
    for _ in range(HEAD_MAX_BYTES // 4096 + 1):
        if world.transport.fd >= 0:
            world.connection.received(b"a" * 4096 if not begun.endswith(b"\r\n\r\n") else b"0" * 4096)
    assert listener.failure is not None
    assert listener.failure.code in ("backend_head_too_large", "backend_garbled")
    assert world.transport.fd < 0


def test_interim_answers_without_end_are_no_answer(world: World) -> None:
    _, listener = world.ask()
    for _ in range(HEAD_MAX_BYTES // 20 + 1):
        if world.transport.fd >= 0:
            world.connection.received(b"HTTP/1.1 103 Hints\r\n\r\n")
    assert listener.failure is not None
    assert listener.failure.code == "backend_head_too_large"


def test_chunks_whose_lines_come_alone_may_be_many(world: World) -> None:
    _, listener = world.ask()
    world.connection.received(CHUNKED)
    for _ in range(HEAD_MAX_BYTES // 3 + 1):
        for piece in (b"3\r\n", b"abc", b"\r\n"):
            world.connection.received(piece)
    world.connection.received(b"0\r\n\r\n")
    assert listener.ended
    assert world.pool.said == ["idle"]
