"""The pool over real connections to the fake API: which is used, when one is opened, who is told when there is none."""

import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from forkd.metrics import Metrics
from forkd.settings import Http2, OpenAiBackend
from tests.fake_api import FakeApi
from tests.harness import own_fds, wait_for
from tests.workers.upstream.kit import Listener
from workers.loop import Loop
from workers.offload import Offload
from workers.upstream.dns import Address, Resolver
from workers.upstream.exchange import Exchange
from workers.upstream.message import HttpRequest
from workers.upstream.origin import Origin
from workers.upstream.pool import IDLE_SECS, Pool


class World:
    """A pool, its loop and its threads."""

    def __init__(self, api_base: str, look_up: Callable[[str, int], list[Address]] | None = None, **own: Any) -> None:
        self.loop = Loop()
        self.threads = Offload(self.loop)
        resolver = Resolver(self.loop, self.threads, *([look_up] if look_up else []))
        settings = OpenAiBackend(api_base=api_base, **own)
        origin = Origin(settings, resolver, self.threads)
        self.pool = Pool(self.loop, logging.getLogger("forkd"), Metrics(None, "test"), "openai", settings, origin)

    def ask(self, pattern: str = "ok", *, fresh: bool = False) -> tuple[Exchange, Listener]:
        listener = Listener()
        request = HttpRequest("/chat/completions", (("x-test-pattern", pattern),), b"{}")
        return self.pool.ask(request, listener, fresh=fresh), listener

    def until(self, condition: Callable[[], Any]) -> None:
        def turned() -> Any:
            self.loop.after(1, Nudge())
            self.loop.turn()
            return condition()

        wait_for(turned, "what the pool was to do")

    def answered(self, *listeners: Listener) -> None:
        self.until(lambda: all(listener.over for listener in listeners))
        assert [listener.failure for listener in listeners] == [None] * len(listeners)

    def later(self, secs: float) -> None:
        """Have the pool keep house as if so much time had passed."""
        self.loop.now += secs
        self.pool.tick()

    def close(self) -> None:
        for connection in [*self.pool._busy, *self.pool._shared, *self.pool._unready]:
            connection.close()
        for dial in self.pool._dials:
            if dial._transport is not None:
                dial._transport.close()
        self.pool.close()
        self.threads.close()
        self.loop.close()


class Nudge:
    """Keeps the loop from sleeping."""

    def tick(self) -> None: ...
    def crashed(self, error: Exception) -> None: ...


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    """Makes worlds; when they are closed, no fd is left."""
    before = own_fds()
    made: list[World] = []

    def world(api: "FakeApi | str", *args: Any, **own: Any) -> World:
        base = api if isinstance(api, str) else api.base
        if isinstance(api, FakeApi) and api.ca_file:
            own["ca_file"] = api.ca_file
        made.append(World(base, *args, **own))
        return made[-1]

    yield world
    for one in made:
        one.close()
    wait_for(lambda: own_fds() <= before, "the end of every fd")


H2 = Http2(enabled="force")


def test_the_connection_used_last_is_used_next(make: Callable[..., World]) -> None:
    with FakeApi() as api:
        world = make(api)
        asked = [world.ask("gate-headers") for _ in range(2)]
        world.until(lambda: len(api.requests) == 2)
        api.gate.let(1)
        world.until(lambda: any(listener.over for _, listener in asked))
        api.gate.let(1)
        world.answered(*(listener for _, listener in asked))
        latest = world.pool._idle[-1]
        for _ in range(3):
            _, listener = world.ask()
            assert world.pool._busy == {latest}
            world.answered(listener)
        assert api.connections_opened == 2


def test_no_more_idle_connections_are_kept_than_wanted_and_none_for_long(make: Callable[..., World]) -> None:
    with FakeApi() as api:
        world = make(api, pool_max_idle=2)
        world.answered(*(world.ask()[1] for _ in range(5)))
        assert world.pool.connections == 2
        world.later(IDLE_SECS - 5)
        assert world.pool.connections == 2
        world.later(IDLE_SECS + 5)
        assert world.pool.connections == 0
        api.wait_for(lambda api: not api.connections_open, "the connections' end")


def test_http2_opens_the_next_connection_before_it_is_needed(make: Callable[..., World]) -> None:
    with FakeApi(max_streams=8) as api:
        world = make(api, http2=H2)
        listeners = [world.ask("gate-headers")[1]]
        world.until(lambda: len(api.requests) == 1)
        listeners += [world.ask("gate-headers")[1] for _ in range(6)]
        world.until(lambda: len(world.pool._shared) == 2)
        assert all(connection.room for connection in world.pool._shared)
        api.gate.open()
        world.answered(*listeners)


def test_a_failed_dial_fails_those_who_waited_longest(make: Callable[..., World]) -> None:
    with FakeApi() as api:
        world = make(api, http2=H2)
        world.pool._room_each = 2
        api.on_accept = ["reset", "silent"]  # or the other one could serve all of them first
        listeners = [world.ask()[1] for _ in range(3)]
        world.until(lambda: any(listener.over for listener in listeners))
        assert [listener.failure is not None for listener in listeners] == [True, True, False]


def test_an_api_without_http2_gets_a_connection_for_each_who_waits(make: Callable[..., World]) -> None:
    with FakeApi(tls="good", alpn=("http/1.1",)) as api:
        world = make(api)
        listeners = [world.ask("gate-headers")[1] for _ in range(20)]
        world.until(lambda: len(api.requests) == 20)
        assert api.connections_opened == 20
        api.gate.open()
        world.answered(*listeners)


def test_an_api_that_takes_no_streams_is_not_dialled_without_end(make: Callable[..., World]) -> None:
    with FakeApi(max_streams=0) as api:
        world = make(api, http2=H2)
        listeners = [world.ask()[1] for _ in range(3)]
        world.until(lambda: all(listener.over for listener in listeners))
        assert {listener.failure and listener.failure.code for listener in listeners} == {"backend_overloaded"}
        assert api.connections_opened <= 3


def test_who_is_cancelled_while_it_waits_is_told_nothing_and_asks_nothing(make: Callable[..., World]) -> None:
    with FakeApi() as api:
        world = make(api, http2=H2)
        exchange, gone = world.ask()
        _, stays = world.ask()
        exchange.cancel()
        world.answered(stays)
        assert not gone.over
        assert len(api.requests) == 1


@pytest.mark.parametrize("http2", [Http2(enabled=False), H2])
def test_a_connection_that_died_meanwhile_is_told_apart(make: Callable[..., World], http2: Http2) -> None:
    with FakeApi() as api:
        world = make(api, http2=http2)
        world.answered(world.ask()[1])
        _, listener = world.ask("cut-before-answer")
        world.until(lambda: listener.over)
        assert listener.failure is not None
        assert listener.failure.stale
        _, listener = world.ask("cut-before-answer", fresh=True)
        world.until(lambda: listener.over)
        assert listener.failure is not None
        assert not listener.failure.stale


def test_a_name_that_is_none(make: Callable[..., World]) -> None:
    def look_up(host: str, port: int) -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    world = make("http://api.test/v1", look_up)
    listeners = [world.ask()[1] for _ in range(3)]
    assert not any(listener.over for listener in listeners), "told before the one who asks holds the exchange"
    world.until(lambda: all(listener.over for listener in listeners))
    assert {listener.failure and listener.failure.code for listener in listeners} == {"backend_unresolved"}
    assert world.pool.connections == 0
