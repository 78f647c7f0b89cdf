"""HTTP/2 with an upstream that means no good, and what a connection leaves behind."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from forkd.settings import Http2 as Settings
from tests.workers.upstream.kit import REQUEST, FakePool, FakeTransport, Listener
from workers.loop import Loop
from workers.upstream.exchange import Exchange
from workers.upstream.http2 import LAST_NUMBER, OWED_MAX_BYTES, Http2

SETTINGS, PING, HEADERS = 0x4, 0x6, 0x1
END_HEADERS = 0x4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


class World:
    def __init__(self) -> None:
        self.loop = Loop()
        self.pool = FakePool()
        self.transport: Any = FakeTransport()
        self.connection = Http2(self.loop, self.pool, self.transport, Settings(), "https", "api.test", "/v1")
        self.connection.received(frame(SETTINGS, 0, 0))

    def ask(self) -> tuple[Exchange, Listener]:
        listener = Listener()
        exchange = Exchange(REQUEST, listener, fresh=False)
        self.connection.send(exchange)
        return exchange, listener


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.loop.close()


def test_a_field_may_hold_any_bytes(world: World) -> None:
    _, listener = world.ask()
    head = Encoder().encode([(b":status", b"200"), (b"x-name", b"caf\xe9"), (b"retry-after", b"1")])
    world.connection.received(frame(HEADERS, END_HEADERS, 1, head))
    assert (listener.status, listener.fields) == (200, {"x-name": "caf\xe9", "retry-after": "1"})


@given(st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=6)), max_size=4), st.binary(max_size=4))
def test_no_head_does_more_than_end_the_connection(fields: list[tuple[bytes, bytes]], status: bytes) -> None:
    world = World()
    try:
        world.ask()
        head = Encoder().encode([(b":status", status), *fields])
        world.connection.received(frame(HEADERS, END_HEADERS, 1, head))
    finally:
        world.loop.close()


def test_one_who_has_pings_answered_and_never_reads_is_cut_off(world: World) -> None:
    _, listener = world.ask()
    world.transport.unsent_bytes = 1
    for _ in range(OWED_MAX_BYTES // 1700 + 1):
        if world.transport.fd >= 0:
            world.connection.received(frame(PING, 0, 0, b"12345678") * 100)
    assert world.transport.fd < 0
    assert listener.failure is not None
    assert listener.failure.code == "backend_garbled"


def test_pings_of_one_who_reads_are_answered_for_ever(world: World) -> None:
    _, listener = world.ask()
    for _ in range(OWED_MAX_BYTES // 1700 + 1):
        world.connection.received(frame(PING, 0, 0, b"12345678") * 100)
        assert len(world.transport.take()) >= 1700
    assert not listener.over


def test_a_connection_whose_numbers_are_used_up_takes_no_more(world: World) -> None:
    world.connection._next_number = LAST_NUMBER
    exchange, _ = world.ask()
    assert exchange.number == LAST_NUMBER
    assert world.connection.room == 0


@pytest.mark.parametrize("ending", ["close", "lost", "broken"])
def test_a_connection_that_ended_is_not_left_for_the_garbage_collector(world: World, ending: str) -> None:
    gc.collect()
    gc.disable()
    try:
        exchange, _ = world.ask()
        state = weakref.ref(world.connection._h2)
        if ending == "close":
            exchange.cancel()
            world.connection.close()
        elif ending == "lost":
            world.transport.close()
            world.connection.lost("", "it closed the connection")
        else:
            world.connection.received(frame(HEADERS, END_HEADERS, 0))
        assert world.transport.fd < 0
        assert world.connection.room == 0
        world.connection._h2 = None  # type: ignore[assignment]
        assert state() is None
    finally:
        gc.enable()
