"""A stream without a head: the body, and how it ends."""

import socket

import pytest

from forkd.board import State
from forkd.settings import OpenAiBackend as OpenAiSettings
from tests.harness import Answer, read_answer, tcp_pair
from tests.workers.kit import World, read_now
from tests.workers.test_stream import Source
from workers import sse
from workers.backends.base import Backend
from workers.backends.mock import MockBackend
from workers.backends.openai import OpenAiBackend
from workers.bare import BareStream
from workers.request import parse
from workers.stream import HIGH_WATER_BYTES

SLOT = 3
MOCK = MockBackend("mock", "", 0)


def begin(world: World, backend: Backend = MOCK, *, tcp: bool = True) -> tuple[BareStream, socket.socket, Source]:
    """A stream over TCP, since only TCP has resets; without `tcp`, one that a few bytes fill."""
    client, server = tcp_pair() if tcp else socket.socketpair()
    if not tcp:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    client.setblocking(False)
    world.board.states[SLOT] = State.GIVEN
    stream = BareStream(world.context, server.detach(), SLOT, 1, "", world.loop.now, parse(b"{}", envelopes=False))
    source = Source()
    stream.begin(backend, source)
    return stream, client, source


def end(world: World, client: socket.socket) -> Answer:
    """What the client reads up to its end."""
    client.setblocking(True)
    answer = read_answer(client)
    world.until(lambda: not world.context.streams)
    return answer


def test_the_text_goes_out_as_it_is(world: World) -> None:
    stream, client, source = begin(world)
    assert world.state(SLOT) == State.GIVEN
    stream.text("Grüße,\n")
    assert world.state(SLOT) == State.FOREIGN
    assert read_now(client) == "Grüße,\n".encode()
    for piece in ("data: ", "x\n\n"):
        stream.text(piece)
    stream.event(sse.named_event("usage", b"{}"))
    stream.done()
    assert source.told == ["start", "cancel"]
    answer = end(world, client)
    assert (answer.raw, answer.reset) == (b"data: x\n\n", False)
    world.until(lambda: not world.context.streams)
    assert world.state(SLOT) == State.ENDED
    (line,) = world.access()
    assert (line["status"], line["reason"], line["chunks"], line["bytes"]) == ("200", "ok", "3", "18")


def test_an_empty_answer_is_an_empty_body(world: World) -> None:
    stream, client, _ = begin(world)
    stream.done()
    answer = end(world, client)
    assert (answer.raw, answer.reset) == (b"", False)


def test_an_upstreams_own_events_where_they_are_wanted(world: World) -> None:
    stream, client, _ = begin(world, OpenAiBackend("openai", OpenAiSettings(format="raw")))
    stream.event(b"data: one\n\n")
    stream.event(b"data: [DONE]\n\n")
    stream.done(b"")
    assert end(world, client).raw == b"data: one\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("said", ["", "half of"])
def test_a_failure_is_a_reset_behind_what_was_said(world: World, said: str) -> None:
    stream, client, source = begin(world)
    if said:
        stream.text("")
        stream.text(said)  # is still queued
    stream.fail("backend_reset")
    stream.fail("internal_error")
    assert source.told == ["start", "cancel"]
    assert world.context.finished == [(SLOT, 1)]
    answer = end(world, client)
    assert (answer.raw, answer.reset) == (said.encode(), True)
    (line,) = world.access()
    assert line["reason"] == "backend_reset"
    assert world.count("forkd_stream_errors_total", "backend_reset") == 1


def test_a_client_that_somebody_else_could_not_go_on_with_is_reset(world: World) -> None:
    stream, client, _ = begin(world)
    stream.take_up(State.GIVEN, "bad_handoff")
    answer = end(world, client)
    assert (answer.raw, answer.reset) == (b"", True)


def test_nothing_is_put_into_a_quiet_body(world: World) -> None:
    stream, client, _ = begin(world)
    stream.tick()
    world.advance(60)  # past headers_after_secs and heartbeat_secs
    assert read_now(client) == b""
    assert world.state(SLOT) == State.GIVEN
    stream.text("x")
    world.advance(60)
    assert read_now(client) == b"x"
    stream.done()
    assert end(world, client).raw == b""


def test_a_slow_client_holds_the_source_up_and_then_has_all(world: World) -> None:
    stream, client, source = begin(world, tcp=False)
    piece = "~" * 10_000
    count = 0
    while "pause" not in source.told:
        stream.text(piece)
        world.loop.turn()
        count += 1
    assert world.state(SLOT) == State.FOREIGN
    assert count * len(piece) > HIGH_WATER_BYTES
    got = b""

    def resumed() -> bool:
        nonlocal got
        got += read_now(client)
        return "resume" in source.told

    world.until(resumed)
    assert world.state(SLOT) == State.FOREIGN
    stream.done()
    assert got + end(world, client).raw == piece.encode() * count


def test_a_client_that_takes_nothing_is_not_told_that_it_had_all(world: World) -> None:
    stream, client, _ = begin(world)
    stream.tick()
    for _ in range(100):
        stream.text("~" * 100_000)
    world.until(lambda: not world.context.streams)
    (line,) = world.access()
    assert line["reason"] == "write_timeout"
    assert end(world, client).reset


def test_a_client_that_goes_ends_the_source(world: World) -> None:
    stream, client, source = begin(world)
    stream.text("x")
    client.close()
    world.until(lambda: not world.context.streams)
    assert source.told == ["start", "cancel"]
    assert world.access()[0]["reason"] == "client_disconnected"
