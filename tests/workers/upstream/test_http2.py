"""HTTP/2, beside h2's own server: whatever the bytes' cut, the same answer as plain h2 would give."""

from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st

from forkd.settings import Http2 as Settings
from tests.workers.upstream.kit import REQUEST, FakePool, FakeTransport, Listener
from workers.loop import Loop
from workers.upstream.exchange import Exchange
from workers.upstream.http2 import DEFAULT_WINDOW_BYTES, Http2
from workers.upstream.message import HttpRequest

HEAD = [(":status", "200"), ("content-type", "text/event-stream")]
WINDOW_KB = 64


class World:
    """A connection of ours and h2's server, joined by hand."""

    def __init__(self, *, most: int = 100, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(initial_stream_window_kb=WINDOW_KB, initial_connection_window_kb=128)
        self.loop = Loop()
        self.pool = FakePool()
        self.transport: Any = FakeTransport()
        self.client = Http2(self.loop, self.pool, self.transport, self.settings, "https", "api.test", "/v1")
        self.server = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8", validate_inbound_headers=True)
        )
        self.server.initiate_connection()
        self.server.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: most})
        self.seen: list[h2.events.Event] = []
        self.exchange_bytes()

    def close(self) -> None:
        self.loop.close()

    def exchange_bytes(self) -> None:
        """Until neither has anything to say."""
        while True:
            up, down = self.transport.take(), self.server.data_to_send()
            if not up and not down:
                return
            if up:
                self.seen += self.server.receive_data(up)
            if down and self.transport.fd >= 0:
                self.client.received(down)

    def ask(self, request: HttpRequest = REQUEST) -> tuple[Exchange, Listener]:
        listener = Listener()
        exchange = Exchange(request, listener, fresh=False)
        self.client.send(exchange)
        self.exchange_bytes()
        return exchange, listener

    def kinds(self) -> list[type]:
        return [type(event) for event in self.seen]

    def last(self, kind: type) -> Any:
        return [event for event in self.seen if type(event) is kind][-1]


@pytest.fixture
def world():
    world = World()
    yield world
    world.close()


def test_a_request_arrives_whole_and_its_answer_too(world: World) -> None:
    assert world.pool.said[0] == "ready"
    _, listener = world.ask()
    request = world.last(h2.events.RequestReceived)
    assert dict(request.headers) == {
        ":method": "POST",
        ":scheme": "https",
        ":authority": "api.test",
        ":path": "/v1/chat",
        "content-type": "application/json",
        "x-request-id": "r1",
        "accept-encoding": "identity",
        "content-length": "7",
    }
    assert world.last(h2.events.DataReceived).data == REQUEST.body
    world.server.send_headers(1, HEAD)
    world.server.send_data(1, b"one")
    world.server.send_data(1, b"two", end_stream=True, pad_length=7)
    world.exchange_bytes()
    assert (listener.status, listener.fields) == (200, {"content-type": "text/event-stream"})
    assert (listener.data, listener.ended) == (b"onetwo", True)
    assert world.client.live == 0


def test_a_large_request_waits_for_the_upstreams_window(world: World) -> None:
    body = bytes(range(256)) * 1024
    world.client.send(Exchange(HttpRequest("/", (), body), Listener(), fresh=False))
    world.seen += world.server.receive_data(world.transport.take())
    got = b"".join(event.data for event in world.seen if isinstance(event, h2.events.DataReceived))
    assert len(got) == DEFAULT_WINDOW_BYTES
    for event in list(world.seen):
        if isinstance(event, h2.events.DataReceived):
            world.server.acknowledge_received_data(event.flow_controlled_length, 1)
    while True:
        down = world.server.data_to_send()
        if not down:
            break
        world.client.received(down)
        for event in world.server.receive_data(world.transport.take()):
            world.seen.append(event)
            if isinstance(event, h2.events.DataReceived):
                world.server.acknowledge_received_data(event.flow_controlled_length, 1)
    got = b"".join(event.data for event in world.seen if isinstance(event, h2.events.DataReceived))
    assert got == body
    assert world.kinds()[-1] is h2.events.StreamEnded


def test_windows_are_given_back_in_large_steps_and_not_while_paused(world: World) -> None:
    exchange, listener = world.ask()
    other, other_listener = world.ask()
    exchange.pause()
    world.server.send_headers(1, HEAD)
    world.server.send_headers(3, HEAD)
    sent = 0
    while world.server.local_flow_control_window(1) > 0:
        amount = min(world.server.local_flow_control_window(1), 8192)
        world.server.send_data(1, b"x" * amount)
        sent += amount
        world.exchange_bytes()
    assert sent == WINDOW_KB * 1024 == len(listener.data)
    # The other one goes on, for many times its window.
    for _ in range(100):
        world.server.send_data(3, b"y" * 8192)
        world.exchange_bytes()
    assert len(other_listener.data) == 100 * 8192
    updates = [e for e in world.seen if isinstance(e, h2.events.WindowUpdated) and e.stream_id == 3]
    assert 10 < len(updates) < 30
    exchange.resume()
    world.exchange_bytes()
    assert world.server.local_flow_control_window(1) > 0
    assert other is not exchange


def test_more_data_than_the_window_allows_is_a_breach(world: World) -> None:
    exchange, listener = world.ask()
    _, other = world.ask()
    exchange.pause()
    world.server.send_headers(1, HEAD)
    world.server.send_headers(3, HEAD)
    world.exchange_bytes()
    amount = WINDOW_KB * 1024 + 1
    while amount > 0:
        size = min(amount, 16384)
        world.client.received(size.to_bytes(3) + bytes((0, 0)) + (1).to_bytes(4) + b"z" * size)
        amount -= size
    world.exchange_bytes()
    assert world.last(h2.events.StreamReset).error_code == ErrorCodes.FLOW_CONTROL_ERROR
    assert listener.failure is not None
    assert listener.failure.code == "backend_garbled"
    world.server.send_data(3, b"unharmed", end_stream=True)
    world.exchange_bytes()
    assert (other.data, other.ended) == (b"unharmed", True)


def test_cancel_resets_the_stream_and_late_data_is_dropped(world: World) -> None:
    exchange, listener = world.ask()
    world.server.send_headers(1, HEAD)
    world.server.send_data(1, b"late")
    exchange.cancel()
    world.exchange_bytes()
    assert world.last(h2.events.StreamReset).error_code == ErrorCodes.CANCEL
    assert (listener.data, listener.over, world.client.live) == (b"", False, 0)
    _, after = world.ask()
    world.server.send_headers(3, HEAD, end_stream=True)
    world.exchange_bytes()
    assert after.ended


def test_after_a_goaway_what_is_answered_goes_on_and_the_rest_is_told(world: World) -> None:
    _, first = world.ask()
    _, second = world.ask()
    world.server.send_headers(1, HEAD)
    world.client.received(world.server.data_to_send())
    goaway = (8).to_bytes(3) + bytes((7, 0)) + bytes(4) + (1).to_bytes(4) + bytes(4)
    world.client.received(goaway)
    assert second.failure is not None
    assert (second.failure.code, second.failure.unseen, second.failure.outrun) == ("backend_unavailable", True, True)
    assert world.client.room == 0
    world.server.send_data(1, b"the rest", end_stream=True)
    world.client.received(world.server.data_to_send())
    assert (first.data, first.ended) == (b"the rest", True)
    assert world.transport.fd == -1
    assert world.pool.said[-1] == "gone"


def test_an_answer_with_a_length_harms_nobody(world: World) -> None:
    _, first = world.ask()
    _, second = world.ask()
    world.server.send_headers(1, [(":status", "429"), ("content-length", "4")])
    world.server.send_data(1, b"full", end_stream=True)
    world.server.send_headers(3, HEAD)
    world.server.send_data(3, b"fine", end_stream=True)
    world.exchange_bytes()
    assert (first.status, first.data, first.ended) == (429, b"full", True)
    assert (second.data, second.ended) == (b"fine", True)
    assert world.transport.fd >= 0


@pytest.mark.parametrize(("last", "code"), [(0, 0), (1, 11)])
def test_a_goaway_of_one_who_answers_nobody_or_complains_is_no_connection_at_its_end(
    world: World, last: int, code: int
) -> None:
    world.ask()
    _, second = world.ask()
    world.client.received((8).to_bytes(3) + bytes((7, 0)) + bytes(4) + last.to_bytes(4) + code.to_bytes(4))
    assert second.failure is not None
    assert (second.failure.unseen, second.failure.outrun) == (True, False)


@pytest.mark.parametrize(
    ("code", "expected", "unseen"),
    [(ErrorCodes.REFUSED_STREAM, "backend_unavailable", True), (ErrorCodes.INTERNAL_ERROR, "backend_reset", False)],
)
def test_a_reset_stream(world: World, code: ErrorCodes, expected: str, unseen: bool) -> None:
    _, listener = world.ask()
    world.server.reset_stream(1, code)
    world.exchange_bytes()
    assert listener.failure is not None
    assert (listener.failure.code, listener.failure.unseen) == (expected, unseen)
    assert code.name in listener.failure.detail
    assert world.transport.fd >= 0


def test_the_upstreams_limit_counts_and_ours(world: World) -> None:
    assert world.client.room == 100
    few = World(most=3)
    assert few.client.room == 3
    few.ask()
    assert few.client.room == 2
    few.close()


def test_a_ping_without_an_answer_ends_the_connection(world: World) -> None:
    _, listener = world.ask()
    now = world.loop.now
    world.client.check(now + 9)
    assert not world.transport.written
    world.client.check(now + 11)
    assert b"forkd   " in world.transport.take()
    world.client.check(now + 11 + 19)
    assert not listener.over
    world.client.check(now + 11 + 20)
    assert listener.failure is not None
    assert listener.failure.code == "backend_silent"
    assert world.transport.fd == -1


def test_a_ping_that_is_answered_keeps_it(world: World) -> None:
    _, listener = world.ask()
    now = world.loop.now
    world.client.check(now + 11)
    world.exchange_bytes()
    world.client.check(now + 31)
    assert not listener.over


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff" * 64,
        bytes.fromhex("000000 01 04 00000001"),  # HEADERS without a head
        bytes.fromhex("000001 00 00 00000063 00"),  # DATA on a stream that never was
        bytes.fromhex("000001 00 00 00000001 00"),  # DATA before the head
        bytes.fromhex("000000 00 00 00000000"),  # DATA on the connection
        bytes.fromhex("000002 00 08 00000001 ff00"),  # more padding than data, after the head
        bytes.fromhex("000004 08 00 00000000 00000000"),  # WINDOW_UPDATE by nothing
        bytes.fromhex("000000 09 04 00000001"),  # CONTINUATION of nothing
    ],
)
def test_garbage_ends_the_connection_and_every_exchange(world: World, garbage: bytes) -> None:
    _, listener = world.ask()
    if garbage[4:5] == b"\x08":
        world.server.send_headers(1, HEAD)
        world.exchange_bytes()
    world.client.received(garbage)
    assert listener.failure is not None
    assert listener.failure.code == "backend_garbled"
    assert world.transport.fd == -1
    assert world.pool.said[-1] == "gone"


def test_what_is_no_http2_at_all_is_named() -> None:
    loop, pool, transport = Loop(), FakePool(), FakeTransport()
    client = Http2(loop, pool, transport, Settings(), "http", "a", "")  # type: ignore[arg-type]
    client.received(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert pool.failure is not None
    assert "does not speak HTTP/2" in pool.failure.detail
    loop.close()


def test_settings_that_never_come(world: World) -> None:
    loop, pool, transport = Loop(), FakePool(), FakeTransport()
    client = Http2(loop, pool, transport, Settings(), "http", "a", "")  # type: ignore[arg-type]
    client.late()
    assert pool.failure is not None
    assert pool.failure.code == "backend_timeout"
    assert transport.fd == -1
    world.client.late()  # one that is ready does not mind
    assert world.transport.fd >= 0
    loop.close()


@st.composite
def answers(draw: st.DrawFn) -> list[tuple[int, str, bytes, int | None]]:
    """Acts of the server on three streams, in an order that HTTP/2 allows."""
    acts: list[tuple[int, str, bytes, int | None]] = []
    for number in (1, 3, 5):
        acts.append((number, "head", b"", None))
        for data in draw(st.lists(st.binary(max_size=300), max_size=5)):
            acts.append((number, "data", data, draw(st.none() | st.integers(0, 255))))
        acts.append((number, draw(st.sampled_from(["end", "end_with_data", "trailers", "reset", "open"])), b"e", None))
    order = draw(st.permutations([number for number, *_ in acts]))
    queues = {number: [act for act in acts if act[0] == number] for number in (1, 3, 5)}
    mixed = [queues[number].pop(0) for number in order]
    pings = draw(st.sets(st.integers(0, len(mixed))))
    for at in sorted(pings, reverse=True):
        mixed.insert(at, (0, "ping", b"", None))
    return mixed


@given(answers(), st.data())
def test_any_cut_of_the_bytes_gives_what_plain_h2_gives(
    acts: list[tuple[int, str, bytes, int | None]], data: st.DataObject
) -> None:
    world = World()
    try:
        listeners = {1 + 2 * index: world.ask()[1] for index in range(3)}
        expected = {number: [0, b"", False] for number in listeners}
        server = world.server
        for number, act, content, padding in acts:
            if act == "head":
                server.send_headers(number, [*HEAD, ("x-long", "v" * 50)])
                expected[number][0] = 200
            elif act == "data":
                server.send_data(number, content, pad_length=padding)
                expected[number][1] += content
            elif act == "ping":
                server.ping(b"12345678")
            elif act == "end":
                server.end_stream(number)
                expected[number][2] = True
            elif act == "end_with_data":
                server.send_data(number, content, end_stream=True)
                expected[number][1] += content
                expected[number][2] = True
            elif act == "trailers":
                server.send_headers(number, [("x-trailer", "t")], end_stream=True)
                expected[number][2] = True
            elif act == "reset":
                server.reset_stream(number, ErrorCodes.INTERNAL_ERROR)
        stream = server.data_to_send()
        cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=20)))
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            if end > start:
                world.client.received(stream[start:end])
        for number, listener in listeners.items():
            assert [listener.status, listener.data, listener.ended] == expected[number]
            assert (listener.failure is not None) == ((number, "reset", b"e", None) in acts)
        world.seen += server.receive_data(world.transport.take())  # what we said was good HTTP/2 too
        assert h2.events.ConnectionTerminated not in world.kinds()
    finally:
        world.close()


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_random_bytes_never_do_more_than_end_the_connection(pieces: list[bytes]) -> None:
    world = World()
    try:
        _, listener = world.ask()
        for piece in pieces:
            if world.transport.fd >= 0:
                world.client.received(piece)
        assert listener.error is None
    finally:
        world.close()
