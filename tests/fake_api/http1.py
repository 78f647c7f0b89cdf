"""HTTP/1.1, the server's side: requests one after the other, and answers in chunks."""

import asyncio
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import httptools

from tests.fake_api.exchange import SSE_FIELDS, Exchange, Fields
from tests.fake_api.pipe import PIECE, Pipe
from tests.fake_api.records import Connection, Seen

if TYPE_CHECKING:
    from tests.fake_api.server import FakeApi

_BODILESS: Final = (204, 304)


class Http1Exchange(Exchange):
    """One request on an HTTP/1.1 connection."""

    keep_alive = True
    """If not, the answer says so and the connection is closed behind it."""
    close_after = False
    """Close it behind the answer, which does not say so: the peer's pool holds a dead connection then."""
    until_close = False
    """The body has no framing: it ends with the connection."""
    _chunked = False

    async def head(self, status: int = 200, fields: Fields = SSE_FIELDS) -> None:
        named = {name for name, _ in fields}
        own: list[tuple[str, str]] = []
        self._chunked = not (self.until_close or "content-length" in named or status in _BODILESS)
        if self._chunked:
            own.append(("transfer-encoding", "chunked"))
        if self.until_close or not self.keep_alive:
            own.append(("connection", "close"))
            self.close_after = True
        await self.raw(head(status, [*fields, *own]))
        self._headed()

    async def inform(self, status: int, fields: Fields = ()) -> None:
        await self.raw(head(status, fields))

    async def send(self, data: bytes) -> None:
        for piece in _pieces(data):
            await self.raw(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
            self.seen.body_sent += len(piece)
            self.api.changed()

    async def end(self, trailers: Fields = ()) -> None:
        if self._chunked:
            await self.raw(b"0\r\n" + _lines(trailers) + b"\r\n")


class Http1Connection:
    """Reads requests and has each answered by a task, which dies with the client."""

    def __init__(self, api: "FakeApi", record: Connection, reader: asyncio.StreamReader, pipe: Pipe) -> None:
        self._api = api
        self._record = record
        self._reader = reader
        self._pipe = pipe
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Http1Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self.on_message_begin()

    async def serve(self, data: bytes) -> None:
        """Go on, from the bytes already read, until the connection's end."""
        try:
            while data:
                self._parser.feed_data(data)
                data = await self._reader.read(PIECE)
        except httptools.HttpParserError as error:
            self._record.fault = self._record.fault or str(error)
            self._pipe.write(head(400, [("content-length", "0"), ("connection", "close")]))
            self._pipe.close()
        except OSError:  # a reset, or TLS that ended badly
            pass
        finally:
            self._gone()

    def on_message_begin(self) -> None:
        self._path = b""
        self._fields: list[tuple[str, str]] = []
        self._body = bytearray()

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        if dict(self._fields).get("expect", "").lower() == "100-continue":
            self._pipe.write(head(100, []))

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._task is not None:
            self._record.fault = "a request before the answer to the last one"
            self._pipe.reset()
            return
        seen = Seen(
            len(self._api.requests),
            self._record,
            self._parser.get_method().decode(),
            self._path.decode("latin-1"),
            self._fields,
            bytes(self._body),
            time.monotonic(),
        )
        self._api.asked(seen)
        self._record.streams_open = self._record.streams_peak = 1
        self._exchange = Http1Exchange(self._api, seen, self._pipe)
        self._exchange.keep_alive = self._parser.should_keep_alive()
        self._task = asyncio.create_task(self._api.answer(self._exchange))
        self._task.add_done_callback(self._answered)

    def _answered(self, _task: "asyncio.Task[None]") -> None:
        self._record.streams_open = 0
        if self._exchange is not None and (self._exchange.close_after or not self._exchange.keep_alive):
            self._pipe.close()
        self._task = self._exchange = None
        self._api.changed()

    def _gone(self) -> None:
        """The connection's end, by whomever."""
        if self._task is not None and self._exchange is not None:
            if not self._pipe.closed and not self._exchange.seen.over:
                self._exchange.seen.cancelled_at = time.monotonic()
            self._task.cancel()


def head(status: int, fields: Fields) -> bytes:
    """A response's head."""
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = "Overloaded"
    return f"HTTP/1.1 {status} {reason}\r\n".encode() + _lines(fields) + b"\r\n"


def _lines(fields: Fields) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in fields).encode("latin-1")


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[start : start + PIECE] for start in range(0, len(data), PIECE))
