"""The pool, with connections that the test opens by hand."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from forkd.metrics import Metrics
from forkd.settings import OpenAiBackend
from tests.workers.upstream.kit import REQUEST, FakeTransport, Listener
from workers.loop import Loop
from workers.upstream.message import HttpRequest
from workers.upstream.pool import Pool


class FakeOrigin:
    scheme = "https"
    authority = "api.test"
    base_path = "/v1"
    protocol = ""
    """TLS will tell."""

    def __init__(self) -> None:
        self.wanted: list[Callable[[Any], None]] = []

    def reach(self, answer: Callable[[Any], None]) -> None:
        self.wanted.append(answer)


class World:
    def __init__(self) -> None:
        self.loop = Loop()
        self.origin: Any = FakeOrigin()
        log, metrics = logging.getLogger("forkd"), Metrics(None, "test")
        self.pool = Pool(self.loop, log, metrics, "openai", OpenAiBackend(), self.origin)

    def ask(self) -> Listener:
        listener = Listener()
        self.pool.ask(REQUEST, listener)
        return listener

    def dialled(self, protocol: str) -> FakeTransport:
        """One of the connections that are being opened is there."""
        transport: Any = FakeTransport()
        self.pool.dialled(next(iter(self.pool._dials)), transport, protocol)
        return transport


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.loop.close()


@pytest.mark.parametrize("told", [("http/1.1", "h2"), ("h2", "http/1.1"), ("", "h2")])
def test_each_connection_is_spoken_to_as_tls_told_of_it(world: World, told: tuple[str, str]) -> None:
    for protocol in told:
        world.ask()
        transport = world.dialled(protocol)
        sent = transport.take()
        assert sent.startswith(b"PRI * HTTP/2.0" if protocol == "h2" else b"POST /v1/chat HTTP/1.1\r\n"), sent
        if protocol == "h2":
            transport.owner.received(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))  # type: ignore[attr-defined]
            transport.owner.lost("", "it closed the connection")  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "\0", "\x1f", "\x7f", "é"])
def test_what_would_break_out_of_its_line_is_not_asked(world: World, text: str) -> None:
    for request in (
        HttpRequest(text, REQUEST.headers, b""),
        HttpRequest("/chat", (("x-test", "v"), (text, "v")), b""),
        HttpRequest("/chat", (("x-test", text), ("x-more", "v")), b""),
    ):
        with pytest.raises(ValueError, match="cannot be sent"):
            world.pool.ask(request, Listener())
    assert not world.origin.wanted
