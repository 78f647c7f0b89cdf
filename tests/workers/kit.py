"""A worker's surroundings without the worker: a loop whose time passes at once, a board, a context, real sockets."""

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkd.board import Board, State
from forkd.logs import Logs, Sink
from forkd.metrics import Metrics
from forkd.selector import Selector
from forkd.settings import Server, Settings
from tests.harness import Answer
from workers.attachments import Attachments
from workers.context import Context, Timings
from workers.loop import Loop
from workers.offload import Offload
from workers.request import Request, parse
from workers.starters import Starters
from workers.stream import Stream


class Clock:
    """Stands in for the module `time` in the loop."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.end = float("inf")
        """No waiting goes beyond this."""

    def monotonic(self) -> float:
        return self.now


class HastySelector:
    """A selector that does not wait: when nothing is ready, the time it would have waited has passed."""

    def __init__(self, clock: Clock, selector: Selector[Any]) -> None:
        self._clock = clock
        self._selector = selector

    def select(self, timeout: float) -> list[tuple[int, int]]:
        events = self._selector.select(0)
        clock = self._clock
        clock.now = min(clock.now + (0.0 if events else timeout) + 1e-6, clock.end)
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)


class World:
    """All that a stream needs."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **server: Any) -> None:
        self.clock = Clock()
        monkeypatch.setattr("workers.loop.time", self.clock)
        self.loop = Loop()
        self.loop.selector = HastySelector(self.clock, self.loop.selector)  # type: ignore[assignment]
        self.board = Board(16)
        self.log = directory / "log"
        settings = Settings(server=Server(socket_path="unused", **server))
        logs = Logs(Sink(str(self.log)), "debug", "pretty", access=True)
        words, current = self.board.row(1).cell_of_current()
        self.context = Context(
            index=1,
            loop=self.loop,
            states=self.board.states,
            words=words,
            current=current,
            settings=settings,
            timings=Timings.of(settings),
            backends={},
            logs=logs,
            log=logging.getLogger("forkd"),
            metrics=Metrics(None, "test"),
            pools={},
            attachments=Attachments(None),
            files=Offload(self.loop),
            starters=Starters(self.loop, self.board.programs, settings),
        )
        self.loop.turn()

    def close(self) -> None:
        self.loop.close()
        os.close(self.context.logs.sink.fd)

    def advance(self, secs: float) -> None:
        """Let so much time pass."""
        end = self.clock.end = self.clock.now + secs
        while self.clock.now < end:
            self.loop.turn()
        self.clock.end = float("inf")

    def until(self, condition: Callable[[], Any]) -> None:
        """Turn until something holds, for at most an hour of the loop's time."""
        end = self.clock.now + 3600
        while not condition():
            assert self.clock.now < end, "never happened"
            self.loop.turn()

    def state(self, slot: int) -> State:
        return State(self.board.states[slot])

    def count(self, name: str, *labels: str) -> float:
        return self.context.metrics._counts[name, *labels]

    def access(self) -> list[dict[str, str]]:
        self.context.logs.sink.flush()
        lines = [line for line in self.log.read_text().splitlines() if " ACCESS " in line]
        return [dict(pair.split("=", 1) for pair in line.partition(": ")[2].split(" ")) for line in lines]

    def stream(self, payload: bytes = b"{}", *, slot: int = 3, narrow: bool = False) -> tuple[Stream, socket.socket]:
        """A stream, and its client's end."""
        client, server = socket.socketpair()
        if narrow:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client.setblocking(False)
        self.board.states[slot] = State.GIVEN
        request: Request = parse(payload, envelopes=True)
        return Stream(self.context, server.detach(), slot, 1, "", self.loop.now, request), client

    def read(self, client: socket.socket) -> Answer:
        """Read a client to its end while the loop turns, and close it."""
        pieces: list[bytes] = []

        def ended() -> bool:
            try:
                while piece := client.recv(65536):
                    pieces.append(piece)
            except BlockingIOError:
                return False
            return True

        self.until(ended)
        client.close()
        self.until(lambda: not self.context.streams)
        return Answer(b"".join(pieces))


def read_now(client: socket.socket) -> bytes:
    """What lies there to be read."""
    got = b""
    try:
        while piece := client.recv(65536):
            got += piece
    except BlockingIOError:
        pass
    return got
