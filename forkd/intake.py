"""From a listener's backlog to whole handoffs: the senders' connections, their patience and ours.

A sender connects, sends one message (SEQPACKET; perhaps more, later) or bytes up to the end of file (STREAM), and
closes. Nearly always all of it is there when we accept, so a connection is read at once and only those that keep us
waiting are watched. Silent ones are dropped after `handoff_timeout_secs`, and the oldest of them at once when there
are more than `max_pending_handoffs`: a real sender writes right after connecting, so the oldest silent one is the
least likely to.

mod_proxy_fdpass sends one byte with the fd over a STREAM. Its first piece is all there is, and is not made to wait for
the end of file.

Closing without loss: whatever lies unread in a socket when it is closed is lost without its sender knowing. So a
connection is first made to refuse (SHUT_RD: the sender's next send fails with EPIPE and it can act), then read empty,
then closed; and a listener likewise. A STREAM sender cannot be cut like that, because our own SHUT_RD looks like its
end of file: it gets its time.

Out of fds: a message that is read without room for its fds has lost its client for good. So before that nothing more is
accepted or read until streams end; and connections that only idle are closed to make room, since their senders can
connect again.

fds: a Sender owns its connection and what it has received so far; `deliver` takes over the fds of a whole handoff.
"""

import errno
import os
import socket
from collections.abc import Callable
from logging import Logger
from selectors import EVENT_READ
from socket import SocketType
from typing import Final, Protocol

from forkd import handoff
from forkd.board import Kind
from forkd.channel import DATA_FD, PAYLOAD_IN_MEMFD
from forkd.listener import Listener
from forkd.metrics import Metrics
from forkd.selector import Ready, Selector
from forkd.settings import Server

_AF_UNIX: Final = int(socket.AF_UNIX)
ACCEPTS_PER_TURN: Final = 64
MESSAGES_PER_TURN: Final = 64
"""From one sender, so that a busy one keeps nobody else waiting."""
FDS_MAX: Final = 2
"""What the largest handoff carries."""


class Deliver(Protocol):
    """Where whole handoffs go (see `dispatcher.Dispatcher.receive`)."""

    def __call__(
        self, fd: int, data_fd: int, payload: bytes, flags: int, listener: int, now: float, code: str, kind: Kind
    ) -> None: ...


class OutOfFds(Exception):
    """accept(2) found no room for another fd."""


class Sender:
    """One connection from Apache."""

    __slots__ = (
        "_bytes",
        "_chunks",
        "_fds",
        "_intake",
        "_silence",
        "closed",
        "idle",
        "listener",
        "served",
        "since",
        "sock",
        "watched",
    )

    def __init__(self, intake: "Intake", listener: Listener, sock: SocketType, now: float) -> None:
        self._intake = intake
        self.listener = listener
        self.sock = sock
        self.since = now
        self.served = False
        """It has handed over at least once."""
        self.idle = False
        """It may keep its connection and say nothing."""
        self.closed = False
        self.watched = False
        """Its socket is registered, except while the intake is paused."""
        self._chunks: list[bytes] = []
        self._bytes = 0
        self._fds: tuple[int, ...] = ()
        self._silence = ""
        """Why it was told to stop; a sender that comes and goes by itself (a health check does) is no failure."""

    def on_ready(self, _mask: int = 0) -> None:
        """Read a message, or while the master is busy what is there, a bounded number; as long as there is room for
        their fds.

        Behind the one message of an Apache child there is hardly ever another, unless it had time to send some while
        the master paused; and what waits keeps the socket readable.
        """
        if self.closed:  # earlier in the same turn
            return
        intake = self._intake
        # Of what is left for each message one or two are taken, so the fds need be counted but once.
        for _ in range(min(MESSAGES_PER_TURN, intake.room_for_more())):
            if not self._read_one() or not (self.listener.is_stream or (intake.busy and handoff.more_waits(self.sock))):
                break
        if not self.closed and not self.idle:
            intake.keep(self)

    def _read_one(self) -> bool:
        """Read one message; False when there is none just now, or when the last one was read and the sender dropped."""
        intake = self._intake
        try:
            message = handoff.receive(self.sock, intake.room)
        except BlockingIOError:
            return False
        except OSError as error:
            intake.log.debug("a sender failed: %s", error)
            intake.metrics.handoff_failed("sender_failed")
            intake.drop(self)
            return False
        if message is None:
            if self.listener.is_stream and (self._chunks or self._fds):
                self._finish(b"".join(self._chunks))
            elif self._silence and not self.served:
                intake.metrics.handoff_failed(self._silence)
        elif not self.listener.is_stream:
            self.served = True
            intake.accept_message(self.listener, message)
            return True
        elif self.listener.is_bare:
            self.served = True
            intake.accept_message(self.listener, message)
        elif self._gather(message):
            return True
        intake.drop(self)
        return False

    def _gather(self, message: handoff.Message) -> bool:
        """Add a piece of a STREAM handoff; False when there is too much of it."""
        self._fds += message.fds
        self._intake.gathered += len(message.fds)
        self._chunks.append(message.payload)
        self._bytes += len(message.payload)
        if message.fds_truncated or len(self._fds) > FDS_MAX:
            self._finish(b"".join(self._chunks), fds_truncated=True)
            return False
        if self._bytes > self._intake.max_bytes:
            self._finish(b"", truncated=True)
            return False
        return True

    def _finish(self, payload: bytes, *, truncated: bool = False, fds_truncated: bool = False) -> None:
        fds, self._fds = self._fds, ()
        self._intake.gathered -= len(fds)
        self._chunks = []
        self.served = True
        self._intake.accept_message(self.listener, handoff.Message(payload, fds, truncated, fds_truncated))

    def refuse_rest(self, code: str) -> None:
        """No more from this sender; what it has sent is read. Not for a STREAM that is read up to its end.
        `code`: why, if it sent nothing.
        """
        self._silence = code
        try:
            self.sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass
        while self._read_one():
            pass
        if not self.closed:
            self._intake.drop(self)

    def has_message(self) -> bool:
        """Whether a message lies unread."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection and whatever of a handoff was incomplete: the sender still has that client."""
        for fd in self._fds:
            os.close(fd)
        self._intake.gathered -= len(self._fds)
        self._fds = ()
        self.closed = True
        self.sock.close()


class Intake:
    """All listeners and all senders."""

    def __init__(
        self,
        selector: Selector[Ready],
        listeners: list[Listener],
        server: Server,
        deliver: Deliver,
        fds_left: Callable[[], int],
        metrics: Metrics,
        log: Logger,
        clock: Callable[[], float],
        *,
        begun: bool = True,
    ) -> None:
        """Accepts at once, or with `begun` False when `begin` says so."""
        self.metrics = metrics
        self.log = log
        self.configure(server)
        self.room = memoryview(bytearray(handoff.MAX_MESSAGE_BYTES))
        self._selector = selector
        self._listeners = listeners
        self._deliver = deliver
        self._fds_left = fds_left
        self._clock = clock
        self._silent: dict[Sender, None] = {}
        self._idle: set[Sender] = set()
        self.gathered = 0
        self.busy = False
        """The master pauses before each turn, so that senders may have more than one message: see `Moderation`."""
        self._may_yield = False
        self._begun = begun
        self._paused = True
        self._stopped = False
        self._to_empty: list[Listener] = []
        self.resume()

    def begin(self) -> None:
        """Accept from now on. Until then what comes waits in the backlogs, or is for whoever shares them."""
        self._begun = True
        self.resume()

    def configure(self, server: Server) -> None:
        """Live by these settings from now on."""
        self.max_bytes = server.max_data_bytes + handoff.ENVELOPE_MAX_BYTES
        self._max_pending = server.max_pending_handoffs
        self._patience = server.handoff_timeout_secs

    @property
    def senders(self) -> int:
        """Open connections from senders, and fds of handoffs that are not whole yet."""
        return len(self._silent) + len(self._idle) + self.gathered

    @property
    def stopped(self) -> bool:
        """`stop` was called, and nothing can come any more."""
        return self._stopped and not self._silent and not self._to_empty

    def fds(self) -> list[int]:
        """Every fd it holds."""
        return [listener.sock.fileno() for listener in self._listeners]

    def resume(self) -> None:
        """Accept and read again, if there is room; called each tick."""
        if not self._paused or not self._begun:
            return
        if self._fds_left() <= 0:
            self._close_idle()
        if self._fds_left() <= 0:
            return
        self._paused = False
        if not self._stopped:
            for listener in self._listeners:
                self._selector.register(listener.sock.fileno(), EVENT_READ, _Acceptor(self, listener))
        for sender in (*self._silent, *self._idle):
            self._selector.register(sender.sock.fileno(), EVENT_READ, sender)

    def room_for_more(self) -> int:
        """For how many more handoffs there are fds. If for none, nothing is accepted or read until `resume` finds some:
        whatever waits in a backlog or a socket is safe there.
        """
        if self._paused:
            return 0
        left = self._fds_left()
        if left <= 0:
            self._pause("out of file descriptors")
        return max(left, 0)

    def _pause(self, why: str) -> None:
        self.log.warning("not accepting handoffs for a moment: %s", why)
        self.metrics.handoff_failed("out_of_fds")
        self._paused = True
        if not self._stopped:
            for listener in self._listeners:
                self._selector.unregister(listener.sock.fileno())
        for sender in (*self._silent, *self._idle):
            if sender.watched:
                self._selector.unregister(sender.sock.fileno())

    def _close_idle(self) -> None:
        """Close connections that are kept for later handoffs; whoever wants to send by one gets EPIPE and connects
        anew.

        Those with an unread message only if there are no others, because to close them is to take in their clients.
        """
        idle = [sender for sender in self._idle if not sender.has_message()]
        for sender in idle or [*self._idle][:1]:
            sender.refuse_rest("shutdown")

    def accept(self, listener: Listener) -> None:
        """Accept what waits, a bounded number, and read it."""
        self._may_yield = True
        for _ in range(ACCEPTS_PER_TURN):
            try:
                if not self.room_for_more() or not self.accept_one(listener) or not listener.waits():
                    return
            except OutOfFds as error:
                self._pause(str(error))
                return

    def accept_one(self, listener: Listener) -> bool:
        """Accept one connection and read it; False when there is none. Raises OutOfFds."""
        try:
            # socket.accept would ask the kernel for the family, the type and the protocol, all of which we know.
            fd, _ = listener.sock._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise OutOfFds(error.strerror) from error
            return error.errno == errno.ECONNABORTED
        sock = SocketType(_AF_UNIX, listener.type, 0, fd)
        if not listener.allows(sock):
            self.log.warning("a sender on %s is not allowed to hand over", listener.path)
            self.metrics.handoff_failed("sender_forbidden")
            sock.close()
            return True
        if listener.is_stream:
            Sender(self, listener, sock, self._clock()).on_ready()
        else:
            self._read_at_once(listener, sock)
        return True

    def _read_at_once(self, listener: Listener, sock: SocketType) -> None:
        """The usual case without a Sender: the one message is there, and the end of file behind it."""
        served = False
        if self._may_yield and not handoff.more_waits(sock):
            # It connected a moment ago, and waking us may have cost it its CPU: half of them, on a machine with two.
            # Once a turn: all who connected by then have their chance, and others wait for us, too.
            self._may_yield = False
            os.sched_yield()
        try:
            message = handoff.receive(sock, self.room)
            if message is not None:
                self.accept_message(listener, message)
                served = True
                message = handoff.receive(sock, self.room)
            if message is None:
                sock.close()
                return
            self.accept_message(listener, message)
        except BlockingIOError:
            pass
        except OSError as error:
            self.log.debug("a sender failed: %s", error)
            self.metrics.handoff_failed("sender_failed")
            sock.close()
            return
        sender = Sender(self, listener, sock, self._clock())
        sender.served = served
        self.keep(sender)

    def empty_backlogs(self) -> None:
        """After `stop`: accept what still waits; called each tick, because fds may be short."""
        while self._to_empty:
            try:
                while self._fds_left() > 0:
                    if not self.accept_one(self._to_empty[0]):
                        break
                else:
                    return
            except OutOfFds:
                return
            self._to_empty.pop(0).close()

    def accept_message(self, listener: Listener, message: handoff.Message) -> None:
        """One whole handoff, of which only the number of fds is judged here."""
        now = self._clock()
        payload, fds = message.payload, message.fds
        envelopes = listener.takes_envelopes
        data_follows = handoff.expects_data_fd(payload, envelopes=envelopes)
        expected = 2 if data_follows else 1
        code = ""
        if not fds:
            code = "out_of_fds" if message.fds_truncated else "no_fd"
            self.log.warning("a handoff on %s lost its client: %s", listener.path, code)
            self.metrics.handoff_failed(code)
            return
        if not handoff.understands_flags(payload, envelopes=envelopes):
            # Under TLS, or something newer than we are: whatever we said to this client could be taken for garbage.
            self.log.warning("a handoff on %s needs what this version does not have: refused", listener.path)
            self.metrics.handoff_failed("unsupported_flags")
            for fd in fds:
                os.close(fd)
            return
        if handoff.is_relayed(payload, envelopes=envelopes):
            self.metrics.count("forkd_handoffs_relayed_total")
        if len(fds) != expected:
            code = "out_of_fds" if message.fds_truncated and len(fds) < expected else "bad_handoff"
        elif message.fds_truncated:
            code = "bad_handoff"
        elif message.truncated:
            code = "payload_too_large"
        elif not payload:
            code = "bad_handoff"
        elif listener.is_bare:
            code = self._judge_bare(listener, payload)
            payload = b""
        for fd in fds[expected:] if not code else fds[1:]:
            os.close(fd)
        data_fd = fds[1] if data_follows and not code else -1
        flags = DATA_FD if data_fd >= 0 else 0
        if len(payload) > handoff.MAX_INLINE_BYTES:
            if data_fd >= 0:  # an envelope of over 64 KB beside its data: nobody's response headers
                os.close(data_fd)
                data_fd, flags, code = -1, 0, "bad_handoff"
            elif not code:
                try:
                    data_fd, flags = handoff.sealed_memfd(payload), PAYLOAD_IN_MEMFD
                except OSError:
                    code = "out_of_fds"
            payload = b""
        self._deliver(fds[0], data_fd, payload, flags, listener.index, now, code, listener.kind)

    def _judge_bare(self, listener: Listener, payload: bytes) -> str:
        """The code to refuse a handoff from mod_proxy_fdpass with, or "". It sends one byte, which means nothing."""
        if len(payload) == 1:
            return ""
        self.log.warning(
            "a handoff on %s carries %d bytes, and mod_proxy_fdpass sends one: refused. X-Socket-Handoff needs a "
            "listener with protocol handoff",
            listener.path,
            len(payload),
        )
        return "bad_handoff"

    def keep(self, sender: Sender) -> None:
        """Watch a sender that has no more for now. One that was accepted after `stop` has said all it may."""
        if self._stopped and not sender.listener.is_stream:
            sender.refuse_rest("shutdown")
            return
        if sender.served and not sender.listener.is_stream:
            self._silent.pop(sender, None)
            self._idle.add(sender)
            sender.idle = True
        elif sender not in self._silent:
            if len(self._silent) >= self._max_pending:
                self._evict(next(iter(self._silent)), "sender_evicted")
            self._silent[sender] = None
        if not sender.watched:
            sender.watched = True
            if not self._paused:
                self._selector.register(sender.sock.fileno(), EVENT_READ, sender)

    def drop(self, sender: Sender) -> None:
        """Done with a sender."""
        self._silent.pop(sender, None)
        self._idle.discard(sender)
        if sender.watched and not self._paused:
            self._selector.unregister(sender.sock.fileno())
        sender.watched = False
        sender.close()

    def _evict(self, sender: Sender, code: str) -> None:
        """Drop a silent sender, but take what it may have sent this instant."""
        if sender.listener.is_stream and not sender.listener.is_bare:
            self.metrics.handoff_failed(code)
            self.drop(sender)
            return
        sender.refuse_rest(code)

    def expire(self, now: float) -> None:
        """Drop senders that were silent for too long; called each tick."""
        while self._silent:
            oldest = next(iter(self._silent))
            if now - oldest.since < self._patience:
                return
            self._evict(oldest, "sender_timeout")

    def stop(self) -> None:
        """Refuse new connections and close what there is without losing a handoff. STREAM senders get their time."""
        if self._stopped:
            return
        if not self._paused:
            for listener in self._listeners:
                self._selector.unregister(listener.sock.fileno())
        self._stopped = True
        for listener in self._listeners:
            if listener.shared:  # what waits there is for whoever has it too
                listener.close()
            else:
                listener.refuse_connections()
                self._to_empty.append(listener)
        self.empty_backlogs()
        for sender in [*self._idle, *self._silent]:
            if not sender.listener.is_stream:
                sender.refuse_rest("shutdown")


class _Acceptor:
    """What the selector calls for a listener."""

    __slots__ = ("_intake", "_listener")

    def __init__(self, intake: Intake, listener: Listener) -> None:
        self._intake = intake
        self._listener = listener

    def on_ready(self, _mask: int = 0) -> None:
        self._intake.accept(self._listener)
