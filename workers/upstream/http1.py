"""HTTP/1.1 (RFC 9112): one connection, one exchange at a time.

Theory of operation. The connection is IDLE (no exchange; kept by the pool) or BUSY. httptools takes the answer apart
and calls the `on_...` methods; what they leave behind says how the connection may go on:

    the message ended, keep-alive, nothing behind it    IDLE again
    the message ended otherwise                          closed
    the connection ended first                           the end of the message if its head gave no length, else a fault
    bytes came while IDLE                                closed: some servers say farewell that way

An answer's heads (interim ones, too) and trailers are bounded here (the parser has no bound), its body by whoever
takes it.
"""

from collections.abc import Callable
from typing import Final, Protocol

import httptools

from workers.loop import Loop, to_ticks
from workers.upstream.exchange import NOBODY, Exchange, Failure, ReleaseEnd
from workers.upstream.message import HttpRequest
from workers.upstream.transport import Transport

HEAD_MAX_BYTES: Final = 65536
REQUEST_TIMEOUT: Final = 408
RELEASE_TICKS: Final = to_ticks(1.0)
"""How long a released exchange may take to end."""


class Owner(Protocol):
    """The pool."""

    def idle(self, connection: "Http1") -> None:
        """It may carry another exchange."""

    def closed(self, connection: "Http1") -> None:
        """It is no more. Said once."""


def head(request: HttpRequest, authority: str, base_path: str) -> bytes:
    """The request up to the body. The pool has looked at the fields."""
    lines = [f"POST {base_path}{request.path} HTTP/1.1", f"host: {authority}"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    lines += ["accept-encoding: identity", f"content-length: {len(request.body)}", "", ""]
    return "\r\n".join(lines).encode("ascii")


class Http1:
    """One connection. It takes over `transport`, which is connected."""

    __slots__ = (
        "_answered",
        "_authority",
        "_base_path",
        "_exchange",
        "_feed",
        "_fields",
        "_keep",
        "_loop",
        "_owner",
        "_parser",
        "_quiet_bytes",
        "_to_eof",
        "_transport",
        "_uses",
        "idle_since",
    )

    def __init__(self, loop: Loop, owner: Owner, transport: Transport, authority: str, base_path: str) -> None:
        self._loop = loop
        self._owner = owner
        self._transport = transport
        self._authority = authority
        self._base_path = base_path
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._feed: Callable[[bytes], None] | None = None
        """The parser's `feed_data` while there is an exchange."""
        self._fields: dict[str, str] | None = None
        self._quiet_bytes = 0
        """What came since the last piece of the body, or before the first: heads, trailers, the chunks' own lines.
        Below 0: a piece came just now.
        """
        self._answered = False
        """A byte of the answer has come."""
        self._keep = False
        self._to_eof = False
        """The message ends where the connection ends: its head gave no length (RFC 9112, 6.3)."""
        self._uses = 0
        self.idle_since = loop.now
        transport.owner = self

    def send(self, exchange: Exchange) -> None:
        """Carry `exchange`. The connection must be idle."""
        request, exchange.request = exchange.request, None  # thousands wait for their answers: let go of the body
        assert request is not None
        exchange.carrier = self
        self._exchange = exchange
        self._answered = self._keep = self._to_eof = False
        self._quiet_bytes = 0
        self._uses += 1
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._transport.write(head(request, self._authority, self._base_path) + request.body)

    def pause(self, _exchange: Exchange) -> None:
        """Read nothing."""
        self._transport.pause()

    def resume(self, _exchange: Exchange) -> None:
        """Read again."""
        self._transport.resume()

    def cancel(self, exchange: Exchange) -> None:
        """HTTP/1.1 has no other way to end an answer than to close the connection."""
        if exchange is self._exchange:
            self._close()

    def release(self, exchange: Exchange) -> None:
        """Read on to the end of the message, for a moment."""
        if exchange is self._exchange:
            self._transport.resume()
            self._loop.after(RELEASE_TICKS, ReleaseEnd(self, exchange))

    def release_ended(self, exchange: Exchange) -> None:
        """The moment is over."""
        if exchange is self._exchange:
            self._close()

    def close(self) -> None:
        """Close an idle connection; nothing is told."""
        self._let_go()
        self._transport.close()

    def _let_go(self) -> None:
        """Of the parser, which holds our bound methods: a circle."""
        self._parser = self._feed = None

    def _close(self) -> None:
        self._exchange = None
        self.close()
        self._owner.closed(self)

    # The transport's.

    def connected(self, protocol: str) -> None:
        """Never: the transport was connected before."""

    def received(self, data: bytes) -> None:
        """Bytes of the answer."""
        feed = self._feed
        if feed is None:
            self._close()
            return
        try:
            feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._faulty(error)
            return
        if self._quiet_bytes < 0:  # nearly always
            self._quiet_bytes = 0
            return
        self._answered = True
        if self._exchange is None:
            if self._transport.fd >= 0:
                self._ended()
            return
        self._quiet_bytes += len(data)
        if self._quiet_bytes > HEAD_MAX_BYTES:
            self._fail("backend_head_too_large", f"a head or trailers of more than {HEAD_MAX_BYTES} bytes")

    def _faulty(self, error: Exception) -> None:
        """A message that ended before the fault is whole: its length was a lie, and the connection is closed."""
        if self._exchange is not None:
            upgrade = isinstance(error, httptools.HttpParserUpgrade)
            self._fail("backend_garbled", "it wants another protocol" if upgrade else f"HTTP/1.1: {error}")
        elif self._transport.fd >= 0:
            self._close()

    def lost(self, code: str, detail: str) -> None:
        """The transport is closed."""
        exchange = self._exchange
        if exchange is not None and not code and self._to_eof:
            self._exchange = None
            self._complete(exchange)
            exchange = None
        self._exchange = None
        self._let_go()
        self._owner.closed(self)
        if exchange is not None:
            stale = self._uses > 1 and not self._answered
            exchange.fail(Failure(code or "backend_reset", detail, stale=stale))

    def crashed(self, error: Exception) -> None:
        """A bug, ours or the receiver's."""
        exchange = self._exchange
        if exchange is not None:
            exchange.receiver.crashed(error)
        if self._transport.fd >= 0:
            self._close()

    # The parser's.

    def on_message_begin(self) -> None:
        """A head begins."""
        self._fields = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field."""
        if self._fields is not None:
            self._fields[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is whole. An interim one (1xx) is passed over."""
        exchange, parser, fields = self._exchange, self._parser, self._fields
        if exchange is None or parser is None or fields is None:
            return
        self._fields = None
        status = parser.get_status_code()
        if status < 200:
            return
        if status == REQUEST_TIMEOUT and self._uses > 1 and fields.get("connection", "").lower() == "close":
            # RFC 9110, 15.5.9: said of a connection on which no request came in time, while ours was on its way.
            # Most likely: some say it of a model that took too long, so it is no proof that nothing was done.
            self._fail("backend_reset", "it gave up waiting for a request (408)", stale=True)
            return
        exchange.status = status
        self._answered = True
        self._to_eof = "content-length" not in fields and "transfer-encoding" not in fields
        try:
            exchange.receiver.response(status, fields)
        except Exception as error:
            exchange.receiver.crashed(error)

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._quiet_bytes = -1
        exchange = self._exchange
        if exchange is not None:
            try:
                exchange.receiver.body(data)
            except Exception as error:
                exchange.receiver.crashed(error)

    def on_message_complete(self) -> None:
        """The message is whole."""
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None or not exchange.status:
            return
        self._exchange = self._feed = None
        self._quiet_bytes = 0
        self._keep = parser.should_keep_alive()
        self._complete(exchange)

    # Inside.

    def _complete(self, exchange: Exchange) -> None:
        receiver, exchange.receiver = exchange.receiver, NOBODY
        exchange.carrier = None
        try:
            receiver.complete()
        except Exception as error:
            receiver.crashed(error)

    def _ended(self) -> None:
        """The message is whole and nothing came behind it."""
        if self._keep and self._fields is None and not self._transport.unsent_bytes:
            self._transport.resume()
            self.idle_since = self._loop.now
            self._owner.idle(self)
        else:
            self._close()

    def _fail(self, code: str, detail: str, *, stale: bool = False) -> None:
        exchange, self._exchange = self._exchange, None
        if self._transport.fd >= 0:
            self._close()
        if exchange is not None:
            exchange.fail(Failure(code, detail, stale=stale))
