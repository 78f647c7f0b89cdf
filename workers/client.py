"""The client's socket: write, backpressure, disconnect, end.

Theory of operation. A Client owns its fd from its making until `closed`, which is called exactly once, and tells its
owner four things: `client_slow` (something queued had to be held back), `client_drained` (all that was held back is
written), `client_gone` (it disconnected, or broke), `client_closed` (the fd is closed; nothing more comes). Its life:

    OPEN      written to at once; what the kernel does not take is held, and then everything behind it is, in order
    ENDING    `end` was called with bytes held: as OPEN, and when they are written on to LINGERING
    LINGERING SHUT_WR is done (other copies of the fd, in the master, would otherwise withhold the FIN); what the client
              still sends is read and discarded until it closes its side or the time is up, because closing a socket
              with unread input sends an RST that can destroy what the client has not read yet. Nothing waits for
              this, so it is looked at by the loop's ticks, ever more rarely, and not by the selector: a wake-up costs
              more
    CLOSED

A client that reads nothing is noticed by its owner (`stalled_secs`), one that vanished by TCP_USER_TIMEOUT. An end of
file from the client is a disconnect, also when it closed one half only: no browser does that to a stream it still
reads. What a client sends is discarded, DISCARD_BYTES in all; then nobody reads it any more, so that a client which
sends for ever is held up by its own window and costs nothing.

The fd is unregistered before it is closed: with a duplicate open in the master, closing alone would leave it in epoll.
"""

import contextlib
import errno
import os
import socket
from os import write
from selectors import EVENT_READ, EVENT_WRITE
from socket import SocketType
from typing import Final, Protocol

from forkd.board import State
from forkd.handoff import reset_on_close
from workers.context import Context

DISCARD_BYTES: Final = 65536
QUEUE_BYTES: Final = 16384
"""More than this does not wait for the turn's end."""
LINGER_MAX_TICKS: Final = 16
LINGER_READS: Final = 16
"""Of DISCARD_BYTES, each tick: a client still sending megabytes is to get to the end of them, and to what it was
told.
"""
_READ_BYTES: Final = 4096
_AF_UNIX: Final = int(socket.AF_UNIX)
_SOCK_STREAM: Final = int(socket.SOCK_STREAM)
_SHUT_WR: Final = int(socket.SHUT_WR)
_OPEN: Final = int(State.OPEN)
_PARTIAL: Final = int(State.PARTIAL)
_ENDED: Final = int(State.ENDED)


class Owner(Protocol):
    """Who is told about a client."""

    def client_slow(self) -> None: ...
    def client_drained(self) -> None: ...
    def client_gone(self, code: str) -> None: ...
    def client_closed(self) -> None: ...
    def crashed(self, error: Exception) -> None: ...


class _Nobody:
    """The owner of a client that is no more."""

    def client_slow(self) -> None: ...
    def client_drained(self) -> None: ...
    def client_gone(self, code: str) -> None: ...
    def client_closed(self) -> None: ...
    def crashed(self, error: Exception) -> None: ...


_NOBODY: Final = _Nobody()


class Client:
    """One client's socket. All methods may be called at any time; after `fd` is -1 they do nothing."""

    __slots__ = (
        "_context",
        "_discarded",
        "_ending",
        "_linger_until",
        "_owner",
        "_queued",
        "_wait_ticks",
        "fd",
        "held",
        "progress_at",
        "sent",
        "slot",
    )

    def __init__(self, context: Context, owner: Owner, fd: int, slot: int) -> None:
        self._context = context
        self._owner = owner
        self.fd = fd
        self.slot = slot
        self.held: bytearray | None = None
        self._queued: bytes | None = None
        self.sent = 0
        self.progress_at = context.loop.now
        self._discarded = 0
        self._ending = False
        self._linger_until = 0
        self._wait_ticks = 1
        os.set_blocking(fd, False)
        context.loop.selector.register(fd, EVENT_READ, self)

    def write(self, data: bytes) -> None:
        """Send whole events (or a head), now if the kernel takes them, else as soon as it does."""
        if self._queued is not None:
            data = self._queued + data
            self._queued = None
        if self.held is not None:
            self.held += data
            return
        fd = self.fd
        if fd < 0:
            return
        try:
            sent = write(fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._broke(error)
            return
        self.progress_at = self._context.loop.now
        self.sent += sent
        if sent != len(data):
            self.held = bytearray(memoryview(data)[sent:])
            if sent and self._context.states[self.slot] == _OPEN:
                self._context.states[self.slot] = _PARTIAL
            self._watch()

    def queue(self, event: bytes) -> None:
        """Send a whole event at the end of this turn, together with all that is queued until then."""
        if self._queued is None:
            self._queued = event
            self._context.loop.queued.append(self)
        else:
            self._queued += event
            if len(self._queued) > QUEUE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Send what is queued, now."""
        if self._queued is not None:
            context = self._context
            context.words[context.current] = self.slot + 1
            self.write(b"")
            if self.held is not None:
                self._owner.client_slow()

    def stalled_secs(self, now: float) -> float:
        """For how long the client has taken nothing of what is held for it; 0 when nothing is."""
        return now - self.progress_at if self.held is not None else 0.0

    def end(self) -> None:
        """All has been said: close in order, once what is held is written."""
        if self.held is not None:
            self._ending = True
        elif self.fd >= 0:
            self._linger()

    def release(self) -> int:
        """Give the fd to the caller, who owns it from now on. Only before anything was written."""
        fd, self.fd = self.fd, -1
        self._context.loop.selector.unregister(fd)
        self._owner = _NOBODY
        return fd

    def abort(self) -> None:
        """Close now. What is held is lost."""
        fd = self.fd
        if fd < 0:
            return
        self._context.states[self.slot] = _ENDED
        self.held = self._queued = None
        self._context.loop.selector.watch(fd, 0, self)
        self.fd = -1
        os.close(fd)
        owner = self._owner
        self._owner = _NOBODY  # who holds us, too: left in a circle, thousands would wait for the garbage collector
        owner.client_closed()

    def reset_on_close(self) -> None:
        """Have the last close reset the connection, so that it does not look like an end."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                reset_on_close(self.fd)

    def on_ready(self, mask: int) -> None:
        """Called by the loop."""
        if self.fd < 0:
            return
        context = self._context
        context.words[context.current] = self.slot + 1
        if mask & EVENT_WRITE:
            self._flush()
        if mask & EVENT_READ and self.fd >= 0:
            self._discard()

    def tick(self) -> None:
        """Called by the loop while lingering: close when the client has closed its side, or the time is up."""
        fd = self.fd
        if fd < 0:
            return
        context = self._context
        context.words[context.current] = self.slot + 1
        wait_ticks = min(self._wait_ticks * 2, LINGER_MAX_TICKS)
        try:
            for _ in range(LINGER_READS):
                if not os.read(fd, DISCARD_BYTES):
                    self.abort()
                    return
                wait_ticks = 1
        except BlockingIOError:
            pass
        except OSError:
            self.abort()
            return
        if context.loop.at >= self._linger_until:
            self.abort()
            return
        self._wait_ticks = wait_ticks
        context.loop.after(wait_ticks, self)

    def crashed(self, error: Exception) -> None:
        """Called by the loop."""
        self._owner.crashed(error)

    @property
    def lingering(self) -> bool:
        """SHUT_WR is done."""
        return self.fd >= 0 and self._context.states[self.slot] == _ENDED

    def _flush(self) -> None:
        held = self.held
        if held is None:
            return
        try:
            sent = write(self.fd, held)
        except BlockingIOError:
            return
        except OSError as error:
            self._broke(error)
            return
        self.sent += sent
        self.progress_at = self._context.loop.now
        if sent != len(held):
            if self._context.states[self.slot] == _OPEN:
                self._context.states[self.slot] = _PARTIAL
            del held[:sent]
            return
        self.held = None
        self._watch()
        ending = self._ending
        self._owner.client_drained()
        if ending:
            self._linger()

    def _discard(self) -> None:
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._broke(error)
            return
        if not data:
            self._owner.client_gone("client_disconnected")
            return
        self._discarded += len(data)
        if self._discarded > DISCARD_BYTES:
            self._watch()

    def _broke(self, error: OSError) -> None:
        """The connection is no more; by TCP_USER_TIMEOUT (ETIMEDOUT) if the client took nothing for too long."""
        self._owner.client_gone("write_timeout" if error.errno == errno.ETIMEDOUT else "client_disconnected")

    def _linger(self) -> None:
        context = self._context
        # Stored after the last byte is written and before the act: between the two a death is told as an error after
        # the end, which harms nobody; the other way round the client would wait for an end that nobody sends.
        context.states[self.slot] = _ENDED
        context.loop.selector.watch(self.fd, 0, self)
        sock = SocketType(_AF_UNIX, _SOCK_STREAM, 0, self.fd)  # os has no shutdown; the family does not matter to it
        try:
            sock.shutdown(_SHUT_WR)
        except OSError:
            self.abort()
            return
        finally:
            sock.detach()
        self._linger_until = context.loop.at + self._linger_ticks()
        self._wait_ticks = 1
        context.loop.after(1, self)

    def _linger_ticks(self) -> int:
        return self._context.timings.linger_ticks

    def _watch(self) -> None:
        """Tell the selector what is waited for now."""
        events = (EVENT_READ if self._discarded <= DISCARD_BYTES else 0) | (EVENT_WRITE if self.held is not None else 0)
        self._context.loop.selector.watch(self.fd, events, self)


class RelayedClient(Client):
    """One that Apache relays: what reads our socket is the module's pump (`apache/relay.c`).

    It takes our SHUT_WR for the end of the answer, and a socket that was closed for one that was cut short, because
    that is what a daemon that was killed leaves behind. So it is given time to come to the end first: the pump closes
    its side at once then, but a slow client may have it wait.
    """

    __slots__ = ()

    def _linger_ticks(self) -> int:
        return self._context.timings.relayed_linger_ticks
