"""The fake API's loop: one epoll, one queue of what is due, precise to the wake-up.

All delays are equal, so what is due next is always at the head of one FIFO. It stays sorted because a turn takes one
look at the clock, sends all that was due by then, and only then starts new answers, whose next chunk is due one delay
after that same look.

The waiting is done by select on the epoll's own fd: it takes microseconds, where Python's epoll rounds up to whole
milliseconds, and would send everything in batches that a real API does not send. The kernel's own timer slack (50 µs)
is turned off for the same reason.
"""

import ctypes
import select
import socket
import ssl
import time
from abc import ABC, abstractmethod
from array import array
from collections import deque
from typing import Final, Protocol

_PR_SET_TIMERSLACK: Final = 29
EVENTS_PER_TURN: Final = 16
"""Reads before the clock is looked at again."""


class Stream(Protocol):
    """An answer under way."""

    due: float

    def step(self) -> bool:
        """Send what is due. False: that was the end, or nobody is there any more."""


class Totals:
    """What the API saw and did, trials not counted."""

    def __init__(self) -> None:
        self.streams = 0
        self.whole = 0
        self.chunks = 0
        self.connections = 0
        self.connections_open = 0
        self.connections_peak = 0
        self.late = array("d")  # from when a chunk was due to its being written, seconds
        self.first = array("d")  # from the wake-up for a request to its first chunk being written, seconds

    def connected(self) -> None:
        """A connection has carried its first request."""
        self.connections += 1
        self.connections_open += 1
        self.connections_peak = max(self.connections_peak, self.connections_open)


class Connection(ABC):
    """One accepted connection, plain or under TLS. Each `send` is one write and, under TLS, one record."""

    __slots__ = ("_counted", "_loop", "_socket", "_unsent", "alive", "fd")

    def __init__(self, loop: "Loop", sock: socket.socket) -> None:
        self._loop = loop
        self._socket = sock
        self._unsent: deque[bytes] = deque()
        self._counted = False
        self.fd = sock.fileno()
        self.alive = True

    def opened(self) -> None:  # noqa: B027 - most protocols let the client speak first
        """The connection is there and watched."""

    @abstractmethod
    def received(self, data: bytes) -> None:
        """Bytes of the client."""

    def count(self) -> None:
        """Count this connection, once."""
        if not self._counted:
            self._counted = True
            self._loop.totals.connected()

    def send(self, data: bytes) -> None:
        """Write now, or as soon as the client reads on; a connection that breaks is closed."""
        if self._unsent:
            self._unsent.append(data)
            return
        try:
            sent = self._socket.send(data)
        except ssl.SSLWantReadError:  # amid the handshake: until the client's next word there is nothing to do
            self._unsent.append(data)
            return
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._unsent.append(data[sent:])
            self._loop.epoll.modify(self.fd, select.EPOLLIN | select.EPOLLOUT)

    def on_event(self, mask: int) -> None:
        """The socket is readable, writable, or broken."""
        self._read()  # before writing: it may have been all that a TLS handshake lacked
        if self._unsent and self.alive:
            unsent, self._unsent = self._unsent, deque()
            if mask & select.EPOLLOUT:
                self._loop.epoll.modify(self.fd, select.EPOLLIN)
            for data in unsent:
                self.send(data)

    def _read(self) -> None:
        try:
            while self.alive and (data := self._socket.recv(65536)):
                self.received(data)
                if len(data) < 65536 and not isinstance(self._socket, ssl.SSLSocket):
                    return
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Done with it; its answers find `alive` false when they are due."""
        if self.alive:
            self.alive = False
            self._loop.forget(self.fd)
            self._loop.totals.connections_open -= self._counted
            self._socket.close()


class Acceptor(Protocol):
    """Makes the connection of a protocol from an accepted socket."""

    def __call__(self, loop: "Loop", sock: socket.socket, /) -> Connection: ...


class Loop:
    """The loop. `now` is what the clock said at the start of this turn."""

    def __init__(self, listener: socket.socket, accept: Acceptor, tls: ssl.SSLContext | None, delay: float) -> None:
        self._listener = listener
        self._accept_as = accept
        self._tls = tls
        self._delay = delay
        self._connections: dict[int, Connection] = {}
        self._queue: deque[Stream] = deque()
        self.epoll = select.epoll()
        self.totals = Totals()
        self.now = time.monotonic()
        self.stopped = False
        self.epoll.register(listener.fileno(), select.EPOLLIN)
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

    def begin(self, stream: Stream) -> None:
        """The stream has sent its first chunk; it steps one delay from now."""
        stream.due = self.now + self._delay
        self._queue.append(stream)

    def forget(self, fd: int) -> None:
        """The connection is being closed."""
        del self._connections[fd]
        self.epoll.unregister(fd)

    def run(self) -> None:
        """Serve until `stopped`."""
        epoll, queue, delay, late = self.epoll, self._queue, self._delay, self.totals.late
        watched, connections = [epoll.fileno()], self._connections
        listening = self._listener.fileno()
        while not self.stopped:
            wait = max(0.0, queue[0].due - time.monotonic()) if queue else 0.5
            readable = select.select(watched, (), (), wait)[0]
            now = self.now = time.monotonic()
            while queue and (due := queue[0].due) <= now:
                stream = queue.popleft()
                goes_on = stream.step()
                late.append(time.monotonic() - due)
                if goes_on:
                    stream.due = due + delay
                    queue.append(stream)
            if readable:
                for fd, mask in epoll.poll(0, EVENTS_PER_TURN):
                    connection = connections.get(fd)
                    if connection is not None:
                        connection.on_event(mask)
                    elif fd == listening:
                        self._accept()

    def _accept(self) -> None:
        for _ in range(EVENTS_PER_TURN):
            try:
                sock = self._listener.accept()[0]
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            connection = self._accept_as(self, sock)
            self._connections[connection.fd] = connection
            self.epoll.register(connection.fd, select.EPOLLIN)
            connection.opened()
