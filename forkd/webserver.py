"""A small HTTP server for a few computed pages, which no client can keep busy or block.

Theory of operation. One thread, one selector, never blocking. A connection is one request and one answer, and has
LIFETIME_SECS for both; there are at most `max_connections`, and when one more comes the oldest goes: whoever means it
sends its request right after connecting and takes its answer at once, so the oldest is the one that does neither.

    reading   until the head is whole, too long, or plainly no HTTP
    writing   until the answer has left
    closing   we have said FIN; what the client still sends is discarded, so that no RST destroys the answer

With no connection there is no deadline and no wake-up.

http.server's request handler does the parsing, on bytes: it never sees a socket.
"""

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from logging import Logger
from typing import Any, Final, NamedTuple

LIFETIME_SECS: Final = 10.0
MAX_HEAD_BYTES: Final = 16384
ACCEPTS_PER_TURN: Final = 16
PAUSE_SECS: Final = 1.0
"""How long nothing is accepted when there is no fd to accept it with."""
_ALLOWED: Final = ("GET", "HEAD")


class Reply(NamedTuple):
    """What a page answers."""

    status: int
    content_type: str
    body: bytes


Answer = Callable[[str, str], Reply]
"""Path (without the query) and Accept header to the answer. May raise: that is logged, and a 500."""


class WebServer:
    """Serves `answer` on `listener`, which is bound, non-blocking and stays the caller's."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        answer: Answer,
        log: Logger,
        *,
        max_connections: int = 128,
        lifetime_secs: float = LIFETIME_SECS,
    ) -> None:
        self.selector = selector
        self.answer = answer
        self.log = log
        self.lifetime_secs = lifetime_secs
        self._listener = listener
        self._max = max_connections
        self._connections: dict[Connection, None] = {}
        self._accepts_at = 0.0
        self._accepting = False
        self._resume()

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def timeout(self, now: float) -> float | None:
        """How long select may wait for something to happen; None: for ever."""
        due = [next(iter(self._connections)).deadline] if self._connections else []
        if not self._accepting:
            due.append(self._accepts_at)
        return max(0.0, min(due) - now) if due else None

    def expire(self, now: float) -> None:
        """End connections whose time is up; called after each select."""
        while self._connections and (oldest := next(iter(self._connections))).deadline <= now:
            oldest.give_up()
        if not self._accepting and now >= self._accepts_at:
            self._resume()

    def on_ready(self, _mask: int) -> None:
        """Somebody connects. What it sends is usually there already, so it is read at once."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:  # EMFILE and its like: the next select would only tell the same
                self._pause(error)
                return
            if len(self._connections) >= self._max:
                next(iter(self._connections)).close()
            connection = Connection(self, sock, time.monotonic() + self.lifetime_secs)
            self._connections[connection] = None
            connection.on_ready(selectors.EVENT_READ)

    def forget(self, connection: "Connection") -> None:
        """A connection is closed."""
        self._connections.pop(connection, None)

    def _pause(self, error: OSError) -> None:
        self.log.warning("not accepting HTTP connections for a moment: %s", error.strerror)
        self._accepting = False
        self._accepts_at = time.monotonic() + PAUSE_SECS
        self.selector.unregister(self._listener)

    def _resume(self) -> None:
        self._accepting = True
        self.selector.register(self._listener, selectors.EVENT_READ, self)


class Connection:
    """One client. It owns its socket."""

    __slots__ = ("_closing", "_in", "_out", "_server", "_sock", "deadline")

    def __init__(self, server: WebServer, sock: socket.socket, deadline: float) -> None:
        sock.setblocking(False)
        self._server = server
        self._sock = sock
        self._in = b""
        self._out = memoryview(b"")
        self._closing = False
        self.deadline = deadline
        server.selector.register(sock, selectors.EVENT_READ, self)

    def on_ready(self, _mask: int) -> None:
        """Go on as far as the socket lets us."""
        if self._sock.fileno() < 0:  # closed by an earlier event of this turn
            return
        try:
            if self._closing:
                if not self._sock.recv(65536):
                    self.close()
            elif self._out:
                self._write()
            else:
                self._read()
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def give_up(self) -> None:
        """Its time is up. Who asked for something, however badly, is told."""
        if self._in and not self._out and not self._closing:
            with contextlib.suppress(OSError):
                self._sock.send(_Exchange.refusal(HTTPStatus.REQUEST_TIMEOUT))
        self.close()

    def close(self) -> None:
        """Let go of the client."""
        self._server.selector.unregister(self._sock)
        self._sock.close()
        self._server.forget(self)

    def _read(self) -> None:
        piece = self._sock.recv(MAX_HEAD_BYTES + 1 - len(self._in))
        if not piece and not self._in:
            self.close()
            return
        # RFC 9112, 2.2: empty lines before a request are to be ignored.
        head = self._in = (self._in + piece).lstrip(b"\r\n")
        if head and not head[:1].isalpha():
            self._send(_Exchange.refusal(HTTPStatus.BAD_REQUEST))
        elif b"\r\n\r\n" in head or b"\n\n" in head:
            self._send(_Exchange(head, self._server).respond())
        elif not piece:
            self._send(_Exchange.refusal(HTTPStatus.BAD_REQUEST))
        elif len(head) > MAX_HEAD_BYTES:
            self._send(_Exchange.refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))

    def _send(self, answer: bytes) -> None:
        self._out = memoryview(answer)
        self._write()

    def _write(self) -> None:
        try:
            self._out = self._out[self._sock.send(self._out) :]
        except BlockingIOError:
            pass
        if self._out:
            self._server.selector.modify(self._sock, selectors.EVENT_WRITE, self)
        else:
            self._sock.shutdown(socket.SHUT_WR)
            self._closing = True
            self._server.selector.modify(self._sock, selectors.EVENT_READ, self)


class _Exchange(BaseHTTPRequestHandler):
    """A request's head to an answer's bytes. (The base's constructor would talk to a socket, so it is not called.)"""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # what cannot be parsed is still answered with a status line

    def __init__(self, head: bytes, server: WebServer) -> None:
        self.rfile = BytesIO(head)
        self.wfile = self._answer = BytesIO()
        self._server = server

    def respond(self) -> bytes:
        """The whole answer."""
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            if self.command not in _ALLOWED:
                self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
            else:
                self._send(self._ask())
        return self._answer.getvalue()

    def _ask(self) -> Reply:
        path = self.path.partition("?")[0]
        try:
            return self._server.answer(path, self.headers.get("Accept", ""))
        except Exception:
            self._server.log.exception("cannot answer %s", path)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _send(self, reply: Reply) -> None:
        self.wfile.write(_head(reply))
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def handle_expect_100(self) -> bool:
        """No body is wanted, so none is asked for."""
        return True

    def send_error(self, code: int, _message: str | None = None, _explain: str | None = None) -> None:
        """Called by parse_request, too: answer without repeating what the client wrote."""
        self._send(_plain(HTTPStatus(code)))

    def log_message(self, *_arguments: Any) -> None:
        """Nothing: scrapes are no news."""

    @classmethod
    def refusal(cls, status: HTTPStatus) -> bytes:
        """The whole answer to something that is no request."""
        reply = _plain(status)
        return _head(reply) + reply.body


def _plain(status: HTTPStatus) -> Reply:
    return Reply(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode())


def _head(reply: Reply) -> bytes:
    status = HTTPStatus(reply.status)
    allow = f"Allow: {', '.join(_ALLOWED)}\r\n" if status == HTTPStatus.METHOD_NOT_ALLOWED else ""
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {reply.content_type}\r\n"
        f"Content-Length: {len(reply.body)}\r\nCache-Control: no-store\r\n{allow}Connection: close\r\n\r\n"
    ).encode("ascii")
