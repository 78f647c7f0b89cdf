"""One connection to an upstream, without blocking: TCP or Unix, plain or under TLS.

Theory of operation. A Transport owns its fd from `open` until `lost` is said or `close` is called, and tells its owner:

    connected(protocol)   once: bytes may be sent. `protocol` is what TLS negotiated (ALPN), or ""
    received(data)        bytes came
    lost(code, detail)    once, and then nothing more: the connection is no more. `code` is one of `forkd.reasons`, or
                          "" when the upstream closed it in order

It tries the addresses one after the other, each for `connect_secs` with its TLS handshake, and the last fault is told.
A failed handshake for want of trust is final: another address of the same name would have the same certificate.

TLS runs between two memory buffers (`ssl.MemoryBIO`): one large recv for many records, where a TLS socket takes two
system calls for each.
"""

import errno
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from os import read
from selectors import EVENT_READ, EVENT_WRITE
from socket import SocketType
from typing import Final, NamedTuple, Protocol

from forkd.selector import EDGE
from workers.loop import Loop, to_ticks
from workers.upstream.dns import Address

READ_BYTES: Final = 16384
"""A token is a few hundred bytes, and room is made for this many at each read."""
_TLS_READ_BYTES: Final = 16384  # no record holds more: RFC 8446, 5.1
_STREAM: Final = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
_CONNECT_AGAIN: Final = {errno.EALREADY: errno.EINPROGRESS, errno.EISCONN: 0}
"""What a second connect(2) says, in the words of the first."""
_BACKLOG_FULL: Final = errno.EAGAIN  # what connect says of a Unix socket whose backlog is full: unix(7)


class Sessions:
    """What TLS needs to take up a session with one place again (RFC 8446, 2.2): it spares both sides the certificates,
    which cost more than a thousand tokens. All under one SSLContext, which judged them.

    Each is taken up once (C.4), and what is learned on that connection is the next: one that an upstream fails over
    does no harm twice.
    """

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: ssl.SSLSession | None = None


class Route(NamedTuple):
    """How to get there."""

    addresses: Sequence[Address]
    tls: ssl.SSLContext | None
    server_name: str
    connect_secs: float
    sessions: Sessions | None = None


class Owner(Protocol):
    """Who is told about a connection."""

    def connected(self, protocol: str) -> None: ...
    def received(self, data: bytes) -> None: ...
    def lost(self, code: str, detail: str) -> None: ...
    def crashed(self, error: Exception) -> None: ...


class Transport:
    """A connection. `owner` may be replaced at any time. After `close` and `lost` all methods do nothing."""

    __slots__ = (
        "_attempt",
        "_connecting",
        "_loop",
        "_plain",
        "_reached",
        "_reading",
        "_route",
        "_tls",
        "_unsent",
        "fd",
        "owner",
    )

    def __init__(self, loop: Loop, owner: Owner, reached: Callable[[Address], None] | None = None) -> None:
        """`reached` is told the address that answered."""
        self._loop = loop
        self.owner = owner
        self._reached = reached
        self.fd = -1
        self._reading = True
        self._connecting = True
        self._plain = False
        """Connected, and not under TLS."""
        self._attempt = 0
        self._route: Route | None = None
        self._tls: _Tls | None = None
        self._unsent: bytearray | None = None

    def open(self, route: Route) -> None:
        """Connect. A failure is told later, never from within this call; a success may be told at once."""
        self._route = route
        self._try("there is no address")

    def write(self, data: bytes) -> None:
        """Send, now or as the upstream takes it."""
        if self._tls is not None:
            self._tls.session.write(data)
            data = self._tls.outgoing.read()
        self._send(data)

    @property
    def unsent_bytes(self) -> int:
        """What `write` was given and the kernel has not taken."""
        return len(self._unsent) if self._unsent is not None else 0

    def pause(self) -> None:
        """Read nothing, so that the upstream is held up by its window."""
        self._reading = False
        self._watch()

    def resume(self) -> None:
        """Read again."""
        self._reading = True
        self._watch()

    def close(self) -> None:
        """Close now, saying nothing to the owner."""
        fd, self.fd = self.fd, -1
        self.owner = _NOBODY  # who owns us, too: left in a circle, thousands would wait for the garbage collector
        self._plain = False
        self._route = None
        self._tls = None  # holds the session, which holds the buffers: megabytes over thousands of connections
        self._unsent = None
        if fd >= 0:
            self._loop.selector.watch(fd, 0, self)
            os.close(fd)

    def on_ready(self, mask: int) -> None:
        """Called by the loop."""
        if mask == EVENT_READ and self._plain:  # nearly always, over HTTP/1.1
            try:
                data = read(self.fd, READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._broke(error)
                return
            if data:
                self.owner.received(data)
                if len(data) == READ_BYTES:
                    self._look_again()
            else:
                self._ended()
            return
        if self.fd < 0:
            return
        if self._connecting and self._tls is None:
            self._connect_ended()
            return
        if mask & EVENT_WRITE:
            self._flush()
        if mask & EVENT_READ and self.fd >= 0:
            self._read()
            if mask & EDGE:  # its end may be behind what was read
                self._look_again()

    def crashed(self, error: Exception) -> None:
        """Called by the loop: a bug of ours or of the owner."""
        self.owner.crashed(error)

    # Connecting.

    def _try(self, fault: str) -> None:
        """Connect to the next address; `fault` is what became of the last one."""
        route = self._route
        assert route is not None
        while self._attempt < len(route.addresses):
            address = route.addresses[self._attempt]
            try:
                sock = SocketType(address.family, _STREAM, 0)
            except OSError as error:  # no fds left, or a family that this machine does not have
                fault = error.strerror or str(error)
                self._attempt += 1
                continue
            try:
                if address.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                code = sock.connect_ex(address.sockaddr)
                if code == errno.EINPROGRESS:
                    # To this machine itself the handshake is over by now, and there is no need to wait for word of it.
                    code = _CONNECT_AGAIN.get(again := sock.connect_ex(address.sockaddr), again)
            except OSError as error:
                code = error.errno or errno.EINVAL
            if code in (0, errno.EINPROGRESS, _BACKLOG_FULL):
                self.fd = sock.detach()
                if code == 0 and route.tls is None:
                    self._established("")
                    return
                self._loop.after(to_ticks(route.connect_secs), _Deadline(self, self._attempt))
                if code == _BACKLOG_FULL:
                    self._loop.after(1, _Again(self, self._attempt))
                else:
                    self._watch()
                return
            sock.close()
            fault = os.strerror(code)
            self._attempt += 1
        self._loop.after(1, _Lost(self, fault))

    def _connect_ended(self) -> None:
        """The kernel has an outcome: connect(2)."""
        route = self._route
        assert route is not None
        sock = SocketType(route.addresses[self._attempt].family, _STREAM, 0, self.fd)
        try:
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        finally:
            sock.detach()
        if code:
            self._try_next(os.strerror(code))
            return
        if route.tls is None:
            self._established("")
            return
        try:
            self._tls = _Tls(route.tls, route.server_name, route.sessions)
        except (ssl.SSLError, ValueError) as error:  # a name that cannot be one
            self._lost("backend_untrusted", str(error))
            return
        self._watch()
        self._shake_hands()

    def connect_again(self, attempt: int) -> None:
        """The Unix socket's backlog was full; `_Again` calls this."""
        if self.fd < 0 or not self._connecting or attempt != self._attempt:
            return
        route = self._route
        assert route is not None
        sock = socket.socket(fileno=self.fd)
        try:
            code = sock.connect_ex(route.addresses[self._attempt].sockaddr)
        finally:
            sock.detach()
        if code == _BACKLOG_FULL:
            self._loop.after(1, _Again(self, attempt))
        elif code in (0, errno.EINPROGRESS):
            self._watch()
        else:
            self._try_next(os.strerror(code))

    def connect_timed_out(self, attempt: int) -> None:
        """The time for one address is up; `_Deadline` calls this."""
        if self.fd >= 0 and self._connecting and attempt == self._attempt:
            self._try_next("no answer in time")

    def _try_next(self, fault: str) -> None:
        route, owner = self._route, self.owner
        self.close()
        self._route, self.owner = route, owner
        self._attempt += 1
        self._try(fault)

    def _established(self, protocol: str) -> None:
        route = self._route
        assert route is not None
        if self._reached is not None:
            self._reached(route.addresses[self._attempt])
        self._connecting = False
        self._plain = self._tls is None
        self._route = None
        self._watch()
        self.owner.connected(protocol)

    def _shake_hands(self) -> None:
        tls = self._tls
        assert tls is not None
        fault: tuple[str, str] | None = None
        done = True
        try:
            tls.session.do_handshake()
        except ssl.SSLWantReadError:
            done = False
        except ssl.SSLCertVerificationError as error:
            fault = "backend_untrusted", f"its certificate: {error.verify_message}"
        except ssl.SSLError as error:
            fault = "backend_garbled", f"TLS: {error.reason or error}"
        out = tls.outgoing.read()
        if out:  # an alert too: the upstream's operator may want to know
            self._send(out)
        if self.fd < 0:
            return
        if fault is not None:
            self._lost(*fault)
        elif done:
            self._established(tls.session.selected_alpn_protocol() or "")
            if self.fd >= 0 and self._tls is not None:
                self._decrypt()

    # Reading.

    def _read(self) -> None:
        try:
            data = read(self.fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._broke(error)
            return
        tls = self._tls
        if not data:
            self._ended()
            return
        if tls is None:
            self.owner.received(data)
        else:
            tls.incoming.write(data)
            if self._connecting:
                self._shake_hands()
            else:
                self._decrypt()
        if len(data) == READ_BYTES:
            self._look_again()

    def _ended(self) -> None:
        """The upstream closed its side."""
        if self._connecting:
            self._try_next("it closed the connection")
        else:
            self._lost("", "it closed the connection")

    def _decrypt(self) -> None:
        """Give the owner what is whole by now, in one piece."""
        tls = self._tls
        assert tls is not None
        read, incoming = tls.session.read, tls.incoming
        pieces: list[bytes] = []
        lost: tuple[str, str] | None = None
        try:
            # One read gives one record, which is never more than it asks for, so that nothing is left inside the
            # session when the buffer is empty; asking once more would raise, which costs more than the decryption.
            while incoming.pending:
                piece = read(_TLS_READ_BYTES)
                if not piece:
                    lost = "", "it closed the connection"
                    break
                pieces.append(piece)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            lost = "", "it closed the connection"
        except ssl.SSLError as error:
            lost = "backend_garbled", f"TLS: {error.reason or error}"
        out = tls.outgoing.read() if tls.outgoing.pending else b""
        if out:
            self._send(out)
        if tls.sessions is not None and pieces:  # the tickets came before
            tls.sessions.last = tls.session.session
            tls.sessions = None
        if pieces and self.fd >= 0:
            self.owner.received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if lost is not None and self.fd >= 0:
            self._lost(*lost)

    # Writing.

    def _send(self, data: bytes) -> None:
        if self._unsent is not None:
            self._unsent += data
            return
        if self.fd < 0:
            return
        try:
            sent = os.write(self.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # Told by the loop, not from within the owner's call. What the upstream said before it broke comes first.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                self._loop.after(1, _Lost(self, error.strerror or str(error), "backend_reset"))
            return
        if sent != len(data):
            self._unsent = bytearray(memoryview(data)[sent:])
            self._watch()

    def _flush(self) -> None:
        unsent = self._unsent
        if unsent is None:
            return
        try:
            sent = os.write(self.fd, unsent)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET) and self._reading:
                self._unsent = None  # it may have said why: reading tells, and then that it is gone
                self._watch()
            else:
                self._broke(error)
            return
        if sent != len(unsent):
            del unsent[:sent]
            return
        self._unsent = None
        self._watch()

    # Inside.

    def _watch(self) -> None:
        if self.fd < 0:
            return
        if self._connecting and self._tls is None:
            events = EVENT_WRITE
        else:
            events = (EVENT_READ if self._reading else 0) | (EVENT_WRITE if self._unsent is not None else 0)
            if events == EVENT_READ and not self._connecting:
                events |= EDGE
        self._loop.selector.watch(self.fd, events, self)

    def _look_again(self) -> None:
        """More may be there than was read."""
        if self.fd >= 0:
            self._loop.selector.repeat(self.fd)

    def _broke(self, error: OSError) -> None:
        detail = error.strerror or str(error)
        if self._connecting:
            self._try_next(detail)
        else:
            self._lost("backend_reset", detail)

    def _lost(self, code: str, detail: str) -> None:
        owner = self.owner
        self.close()
        owner.lost(code, detail)

    def give_up(self, code: str, detail: str) -> None:
        """No address is left, or writing failed; `_Lost` calls this."""
        if self.fd >= 0 or self._route is not None:
            self._lost(code, detail)


class _Nobody:
    """The owner of a closed connection."""

    def connected(self, protocol: str) -> None: ...
    def received(self, data: bytes) -> None: ...
    def lost(self, code: str, detail: str) -> None: ...
    def crashed(self, error: Exception) -> None: ...


_NOBODY: Final = _Nobody()


class _Tls:
    """A TLS session between two buffers."""

    __slots__ = ("incoming", "outgoing", "session", "sessions")

    def __init__(self, context: ssl.SSLContext, server_name: str, sessions: Sessions | None) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.sessions = sessions
        """Where this one is to be kept, until it is."""
        before = None
        if sessions is not None:
            before, sessions.last = sessions.last, None
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_hostname=server_name, session=before)


class _Timed:
    """A deadline of one attempt to connect."""

    __slots__ = ("_attempt", "_transport")

    def __init__(self, transport: Transport, attempt: int) -> None:
        self._transport = transport
        self._attempt = attempt

    def crashed(self, error: Exception) -> None:
        self._transport.crashed(error)


class _Deadline(_Timed):
    __slots__ = ()

    def tick(self) -> None:
        self._transport.connect_timed_out(self._attempt)


class _Again(_Timed):
    __slots__ = ()

    def tick(self) -> None:
        self._transport.connect_again(self._attempt)


class _Lost:
    __slots__ = ("_code", "_detail", "_transport")

    def __init__(self, transport: Transport, detail: str, code: str = "backend_unavailable") -> None:
        self._transport = transport
        self._detail = detail
        self._code = code

    def tick(self) -> None:
        self._transport.give_up(self._code, self._detail)

    def crashed(self, error: Exception) -> None:
        self._transport.crashed(error)
