"""One stream: its answer, its deadlines, its outcome, and what the board says meanwhile."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from forkd.board import State
from forkd.handoff import encode_envelope
from tests.harness import Answer
from tests.workers.kit import World, read_now
from workers import sse
from workers.backends.mock import MockBackend
from workers.stream import HIGH_WATER_BYTES, Stream

BACKEND = MockBackend("mock", "", 0)
SLOT = 3


class Source:
    """A source that does what the test says."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def check(self, now: float) -> float:
        return float("inf")

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.told.append(name)


def begin(world: World, payload: bytes = b"{}", **how: Any) -> tuple[Stream, socket.socket, Source]:
    stream, client = world.stream(payload, **how)
    source = Source()
    stream.begin(BACKEND, source)
    return stream, client, source


def test_an_answer_and_the_states_on_its_way(world: World) -> None:
    stream, client, source = begin(world, b'{"request_id":"r","user_id":"u"}')
    assert source.told == ["start"]
    assert world.state(SLOT) == State.GIVEN
    assert read_now(client) == b""
    stream.text("a")
    assert world.state(SLOT) == State.OPEN
    stream.text("b")
    stream.done()
    assert world.state(SLOT) == State.ENDED
    assert source.told == ["start", "cancel"]
    answer = world.read(client)
    assert (answer.status, answer.text, answer.complete) == (200, "ab", True)
    assert answer.header("x-request-id") == "r"
    assert world.context.finished == [(SLOT, 1)]
    assert (world.context.started, world.context.completed, world.context.failed) == (1, 1, 0)
    assert world.context.sent_bytes == len(answer.raw)
    (line,) = world.access()
    assert (line["request_id"], line["user_id"], line["reason"]) == ("r", "u", "ok")
    assert (line["status"], line["bytes"], line["chunks"]) == ("200", str(len(answer.raw)), "2")


def test_an_end_is_final(world: World) -> None:
    stream, client, _ = begin(world)
    stream.text("a")
    stream.done()
    stream.text("b")
    stream.done()
    stream.fail("worker_lost")
    answer = world.read(client)
    assert answer.text == "a"
    assert answer.complete
    assert answer.error is None
    assert len(world.access()) == 1
    assert len(world.context.finished) == 1


def test_a_failure_before_the_head_is_a_status(world: World) -> None:
    stream, client, _ = begin(world, b'{"response_headers":{"Access-Control-Allow-Origin":"*"}}')
    stream.fail("no_capacity")
    answer = world.read(client)
    assert answer.status == 503
    assert answer.header("retry-after") == "1"
    assert answer.header("access-control-allow-origin") == "*"
    assert answer.json == {
        "error": "The server is out of capacity",
        "code": "no_capacity",
        "request_id": answer.header("x-request-id"),
    }
    assert world.access()[0]["status"] == "503"
    assert world.count("forkd_stream_errors_total", "no_capacity") == 1
    assert world.context.failed == 1


def test_a_failure_after_it_is_an_event(world: World) -> None:
    stream, client, _ = begin(world)
    stream.text("a")
    stream.fail("worker_lost")
    answer = world.read(client)
    assert answer.status == 200
    assert answer.text == "a"
    assert not answer.complete
    assert answer.error is not None
    assert answer.error["code"] == "worker_lost"


def test_head_requests(world: World) -> None:
    payload = encode_envelope({"request": {"method": "HEAD"}}, b"{}")
    stream, client, source = begin(world, payload)
    answer = world.read(client)
    assert (answer.status, answer.body) == (200, b"")
    assert source.told in ([], ["cancel"])
    stream, client = world.stream(payload)
    stream.fail("no_capacity")
    answer = world.read(client)
    assert (answer.status, answer.body) == (503, b"")


# Taken up from a worker that died.


@pytest.mark.parametrize(
    ("state", "status", "written"),
    [
        (State.GIVEN, 502, b""),
        (State.COMMITTED, 502, b""),
        (State.OPENING, 502, b""),
        (State.OPENING, 200, b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"),
        (State.OPEN, 200, b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n" + sse.content_event("a")),
        (State.PARTIAL, 200, b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n" + sse.content_event("a") + b'data: {"conte'),
    ],
)
def test_a_client_that_another_worker_left(world: World, state: State, status: int, written: bytes) -> None:
    """Its parser understands the whole of what both workers said."""
    stream, client = world.stream()
    stream.take_up(state, "worker_lost")
    answer = Answer(written + world.read(client).raw)
    assert answer.status == status
    assert answer.error is not None
    assert answer.error["code"] == "worker_lost"
    assert b"[DONE]" not in answer.raw
    assert stream.outcome == "worker_lost"


# Slow clients.


def test_backpressure_and_its_end(world: World) -> None:
    stream, client, source = begin(world, narrow=True)
    sent = 0
    while "pause" not in source.told:
        stream.text("x" * 1000)
        sent += 1
    assert sent < HIGH_WATER_BYTES // 1000 + 30
    stream.text("more")  # it may have had one in hand
    assert source.told.count("pause") == 1
    got = b""
    while "resume" not in source.told:
        got += read_now(client)
        world.loop.turn()
    assert world.state(SLOT) == State.OPEN
    stream.done()
    answer = Answer(got + world.read(client).raw)
    assert answer.complete
    assert len(answer.text) == sent * 1000 + 4


@pytest.mark.parametrize("ended", [False, True])
def test_a_client_that_takes_nothing_is_dropped(make_world: Callable[..., World], ended: bool) -> None:
    """And not counted as served, though all was said."""
    world = make_world(write_timeout_secs=30)
    stream, client, source = begin(world, narrow=True)
    for _ in range(30):
        stream.text("x" * 1000)
    if ended:
        stream.done()
    assert world.access() == []
    world.advance(29)
    assert world.context.streams
    world.advance(10)
    assert not world.context.streams
    assert stream.outcome == "write_timeout"
    assert "cancel" in source.told
    (line,) = world.access()
    assert line["reason"] == "write_timeout"
    assert int(line["bytes"]) == len(read_now(client)) < 30_000
    assert (world.context.completed, world.context.failed) == (0, 1)
    assert world.count("daemon_stream_errors_total", "timeout") == 1
    client.close()


def test_a_client_that_takes_little_is_not(make_world: Callable[..., World]) -> None:
    world = make_world(write_timeout_secs=30, max_stream_duration_secs=0)
    stream, client, _ = begin(world, narrow=True)
    for _ in range(30):
        stream.text("x" * 1000)
    stream.done()
    got = b""
    for _ in range(8):
        world.advance(25)
        got += read_now(client)
    answer = Answer(got + world.read(client).raw)
    assert answer.complete
    assert stream.outcome == "ok"


def test_a_client_gone_with_bytes_held_is_a_disconnect(world: World) -> None:
    stream, client, _ = begin(world, narrow=True)
    for _ in range(30):
        stream.text("x" * 1000)
    stream.done()
    client.close()
    world.until(lambda: not world.context.streams)
    assert stream.outcome == "client_disconnected"
    assert [line["reason"] for line in world.access()] == ["client_disconnected"]


def test_a_client_that_goes_away(world: World) -> None:
    stream, client, source = begin(world)
    client.close()
    world.until(lambda: not world.context.streams)
    assert source.told == ["start", "cancel"]
    assert stream.outcome == "client_disconnected"
    assert world.access()[0]["status"] == "0"
    assert world.context.finished == [(SLOT, 1)]


# Deadlines.


def test_a_quiet_stream_gets_comments(make_world: Callable[..., World]) -> None:
    world = make_world(heartbeat_secs=15, max_stream_duration_secs=0, headers_after_secs=0)
    stream, client, _ = begin(world)
    world.advance(60)
    assert read_now(client) == b""  # there is no head to hang a comment on
    stream.text("a")
    read_now(client)
    world.advance(14)
    assert read_now(client) == b""
    world.advance(46.5)
    assert read_now(client) == sse.HEARTBEAT * 4
    stream.done()
    assert world.read(client).raw == sse.DONE


def test_a_model_that_thinks_for_long_gets_its_head_early(make_world: Callable[..., World]) -> None:
    world = make_world(heartbeat_secs=15, headers_after_secs=10)
    stream, client, _ = begin(world)
    world.advance(9.9)
    assert read_now(client) == b""
    world.advance(0.2)
    assert world.state(SLOT) == State.OPEN
    head = read_now(client)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n" + sse.HEARTBEAT)
    world.advance(16)
    assert read_now(client) == sse.HEARTBEAT
    stream.fail("backend_timeout")  # from now on a failure is an event
    answer = world.read(client)
    assert answer.raw.startswith(b"event: error\n")
    (line,) = world.access()
    assert (line["status"], line["reason"], line["ttfb_ms"]) == ("200", "backend_timeout", "-")


def test_no_comments_where_none_are_wanted(make_world: Callable[..., World]) -> None:
    world = make_world(heartbeat_secs=0, max_stream_duration_secs=0)
    stream, client, _ = begin(world)
    stream.text("a")
    read_now(client)
    world.advance(1000)
    assert read_now(client) == b""
    stream.done()
    world.read(client)


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_may_last_so_long(make_world: Callable[..., World], begun: bool) -> None:
    world = make_world(max_stream_duration_secs=300, heartbeat_secs=0, headers_after_secs=0)
    stream, client, source = begin(world)
    if begun:
        stream.text("a")
    world.advance(299)
    assert stream.live
    world.advance(2)
    assert stream.outcome == "max_duration"
    assert "cancel" in source.told
    answer = world.read(client)
    assert answer.status == (200 if begun else 504)
    assert answer.error is not None
    assert answer.error["code"] == "max_duration"


# Bugs.


def test_a_bug_costs_one_stream_and_the_books_balance(world: World) -> None:
    stream, client, _ = begin(world)
    stream.text("a")
    stream.crashed(ValueError("a bug"))
    answer = world.read(client)
    assert answer.error is not None
    assert answer.error["code"] == "internal_error"
    stream, client, _ = begin(world, narrow=True)
    for _ in range(30):
        stream.text("x" * 1000)
    stream.done()
    stream.crashed(ValueError("another"))  # with bytes held: they are lost
    assert not world.context.streams
    client.close()
    assert [line["reason"] for line in world.access()] == ["internal_error", "internal_error"]
    assert world.context.finished == [(SLOT, 1), (SLOT, 1)]
    assert world.log.read_text().count("Traceback") + world.log.read_text().count("ValueError") >= 2
