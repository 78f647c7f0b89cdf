"""One request and what can be done to whoever sent it: the view that patterns have of a connection."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from tests.fake_api.dialects import Dialect, OpenAI, dialect_of
from tests.fake_api.pipe import Pipe
from tests.fake_api.records import Seen
from tests.fake_api.wire import Event

if TYPE_CHECKING:
    from tests.fake_api.server import FakeApi

Fields: TypeAlias = Sequence[tuple[str, str]]

SSE_FIELDS: Final[Fields] = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))


class Exchange(ABC):
    """A request that is complete, to be answered by `head`, any number of `send` or `say`, and `end`; or otherwise.

    All that waits ends by CancelledError when the client is gone.
    """

    def __init__(self, api: "FakeApi", seen: Seen, pipe: Pipe) -> None:
        self.api = api
        self.seen = seen
        self.pipe = pipe
        try:
            request = seen.json
        except ValueError:
            request = None
        dialect = dialect_of(seen.path, request)
        self.known = dialect is not None and seen.method == "POST" and isinstance(request, dict)
        """It is a request that this API takes."""
        self.dialect: Dialect = dialect or OpenAI({})
        self.spelling = self.dialect.spelling

    @abstractmethod
    async def head(self, status: int = 200, fields: Fields = SSE_FIELDS) -> None:
        """The final head. Without a content-length among the fields the body's end is told by the protocol."""

    @abstractmethod
    async def inform(self, status: int, fields: Fields = ()) -> None:
        """An informational (1xx) head before the final one."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """A part of the body, in a chunk or DATA frame of its own unless it is large. Returns when it is on its way."""

    @abstractmethod
    async def end(self, trailers: Fields = ()) -> None:
        """The body's end."""

    async def say(self, *events: Event) -> None:
        """Send these events by one `send`."""
        await self.send(self.encode(*events))

    def encode(self, *events: Event) -> bytes:
        """These events as this API writes them."""
        return b"".join(map(self.spelling.encode, events))

    async def whole(self, status: int, content_type: str, body: bytes, fields: Fields = ()) -> None:
        """An answer that is no stream."""
        await self.head(status, [("content-type", content_type), ("content-length", str(len(body))), *fields])
        if body:
            await self.send(body)
        await self.end()

    async def raw(self, data: bytes) -> None:
        """Bytes on the connection itself, whatever the protocol makes of them."""
        self.pipe.write(data)
        await self._drain()

    async def gate(self) -> None:
        """Wait until the test lets us go on."""
        await self.api.gate.passing()

    async def forever(self) -> NoReturn:
        """Wait until the client gives up."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("unreachable")

    def cut(self) -> None:
        """Reset the whole connection (RST)."""
        self.pipe.reset()

    def hang_up(self) -> None:
        """Close the whole connection in order, here and now."""
        self.pipe.close()

    def _headed(self) -> None:
        self.seen.head_sent_at = time.monotonic()
        self.api.changed()

    async def _drain(self) -> None:
        self.seen.stalled_since = time.monotonic()
        try:
            await self.pipe.drain()
        finally:
            self.seen.stalled_since = None
