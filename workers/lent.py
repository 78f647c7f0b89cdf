"""A client's socket that a program has: seen from outside while it lasts, and ended in order afterwards.

Theory of operation. O_NONBLOCK belongs to the open file description, which the master's copy, ours and the program's
share, and a program expects to be made to wait. So from `lend` on the socket blocks, and nobody may read or write it
but with MSG_DONTWAIT, neither here nor in the master; also after the program's end, since what it left behind may set
the flag as it likes. That is why this is not `workers.client`, whose reads and writes rely on it.

What the client sends is the program's to read: only its hang-up is watched for (EPOLLRDHUP).

Whether the program has said anything is asked of the connection. TCP counts what was written to it (tcp_info: sent,
less what was sent again, plus what is not sent yet), so two readings tell. A Unix socket counts nothing, and its reader
may have emptied it long since: there the answer is None, "nobody knows", and nothing of ours may be added to what may
be the program's. Behind a Unix socket is not a browser but a server (Apache's relay, a proxy), which has an answer of
its own for one that is empty.
"""

import contextlib
import errno
import os
import socket
import struct
from typing import Final, Protocol

from forkd.board import State
from forkd.handoff import reset_on_close
from workers.context import Context

DISCARD_BYTES: Final = 65536
LINGER_READS: Final = 16
LINGER_MAX_TICKS: Final = 16
_NOTSENT_AT: Final = struct.Struct("=144xI")
_SENT_AT: Final = struct.Struct("=200xQQ")
"""tcpi_notsent_bytes; tcpi_bytes_sent and tcpi_bytes_retrans (since Linux 4.19): linux/tcp.h, struct tcp_info."""


class Owner(Protocol):
    """Who is told."""

    slot: int

    def client_gone(self, code: str) -> None:
        """It hung up, or broke, while the program had it. Called once."""

    def client_closed(self) -> None:
        """Our fd is closed."""

    def crashed(self, error: Exception) -> None: ...


class Lent:
    """One client's socket. Owns its fd until `client_closed`."""

    __slots__ = ("_before", "_context", "_linger_ticks", "_linger_until", "_owner", "_sock", "_wait_ticks", "_watched")

    def __init__(self, context: Context, owner: Owner, fd: int, *, relayed: bool = False) -> None:
        """Takes over `fd`, which must be in no selector. `relayed`: as in `workers.client.RelayedClient`."""
        self._context = context
        self._owner = owner
        self._sock = socket.socket(fileno=fd)
        # Or, where a handler's module called socket.setdefaulttimeout, recv would wait for so long, flags or not.
        self._sock.settimeout(None)
        self._linger_ticks = context.timings.relayed_linger_ticks if relayed else context.timings.linger_ticks
        self._before: int | None = None
        self._linger_until = 0
        self._wait_ticks = 1
        self._watched = False

    def watch(self) -> None:
        """Look out for its hang-up. Raises OSError: too many epoll watches."""
        self._context.loop.selector.watch_hangup(self._sock.fileno(), self)
        self._watched = True

    def lend(self) -> int:
        """Make it what a program expects, and return the fd, which stays ours. May be called in any thread."""
        fd = self._sock.fileno()
        os.set_blocking(fd, True)
        self._before = self._counted()
        return fd

    def written_bytes(self) -> int | None:
        """How much was written to it since `lend`; None if nobody knows."""
        now = self._counted()
        return None if now is None or self._before is None else now - self._before

    def hung_up(self) -> str:
        """The code for a client that is gone by now, or ""."""
        try:
            if self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return ""
        except BlockingIOError:
            return ""
        except OSError as error:
            return "write_timeout" if error.errno == errno.ETIMEDOUT else "client_disconnected"
        return "client_disconnected"

    def on_ready(self, _mask: int) -> None:
        """Called by the loop."""
        if not self._watched:
            return
        context = self._context
        context.words[context.current] = self._owner.slot + 1
        error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._unwatch()  # it stays as it is, and would be told again each turn
        self._owner.client_gone("write_timeout" if error == errno.ETIMEDOUT else "client_disconnected")

    def end(self, last_words: bytes = b"") -> None:
        """Nobody will write to it any more: say the last words, if any, and close it in order."""
        self._unwatch()
        try:
            if last_words:
                self._sock.send(last_words, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            context = self._context
            context.states[self._owner.slot] = State.ENDED
            self._sock.shutdown(socket.SHUT_WR)  # other copies, in the master or with a program's children, withhold it
        except OSError:
            self.close()
            return
        self._linger_until = context.loop.at + self._linger_ticks
        context.loop.after(1, self)

    def reset(self) -> None:
        """Nobody will write to it any more, and what was written is not to be taken for whole: reset the connection."""
        with contextlib.suppress(OSError):
            reset_on_close(self._sock.fileno())
        self.close()

    def close(self) -> None:
        """Close now."""
        if self._sock.fileno() < 0:
            return
        self._unwatch()
        self._context.states[self._owner.slot] = State.ENDED
        self._sock.close()
        self._owner.client_closed()

    def tick(self) -> None:
        """Called by the loop while lingering, as in `workers.client`: discard until it closes, or the time is up."""
        if self._sock.fileno() < 0:
            return
        context = self._context
        context.words[context.current] = self._owner.slot + 1
        wait_ticks = min(self._wait_ticks * 2, LINGER_MAX_TICKS)
        try:
            for _ in range(LINGER_READS):
                if not self._sock.recv(DISCARD_BYTES, socket.MSG_DONTWAIT):
                    self.close()
                    return
                wait_ticks = 1
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if context.loop.at >= self._linger_until:
            self.close()
            return
        self._wait_ticks = wait_ticks
        context.loop.after(wait_ticks, self)

    def crashed(self, error: Exception) -> None:
        """Called by the loop."""
        self._owner.crashed(error)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._context.loop.selector.unregister(self._sock.fileno())

    def _counted(self) -> int | None:
        """All that was ever written to the connection; None where it is not counted."""
        if self._sock.family == socket.AF_UNIX:
            return None
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # TCP over something else
            return None
        if len(info) < _SENT_AT.size:
            return None
        sent, again = _SENT_AT.unpack_from(info)
        return int(sent - again + _NOTSENT_AT.unpack_from(info)[0])
