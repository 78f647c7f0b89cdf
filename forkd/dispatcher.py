"""Which worker gets this handoff; the queue; when to refuse.

A handoff goes to the ready worker of its listener's pool with the fewest active streams (ties rotate; of those that
arrive in the same turn two of the common pool may go to the same worker, because to wake one worker is cheaper than
two), past those whose channel is full and those whose heartbeat is late. When none can take it, it waits in that pool's
queue, in order; what finds the queue full, waits too long in it, or comes when every slot is taken, gets a 503. That
503 is the one thing the master writes to a client, by one send that cannot block, and only to a client to whom nothing
has been said. A client whose body is bare (`forkd.board.Kind`) has its head from Apache: all that can still be said to
it is a reset.

Which pool serves a handoff is asked anew each time it is given: what waits, or is left behind by a dead worker, goes to
the pool that its listener has then, so a reload that changes the pools leaves nobody waiting for one that is gone.
"""

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from logging import Logger
from typing import Final

from forkd import handoff
from forkd.board import Board, Kind, State
from forkd.channel import PAYLOAD_IN_MEMFD, Assignment, Down, end_body, send_down
from forkd.ledger import InFlight, Ledger, Verdict
from forkd.metrics import Metrics
from forkd.peer import Life, Peer
from forkd.reasons import REASONS
from forkd.settings import COMMON, Server

DISCARD_BYTES: Final = 65536
_BODY: Final = b'{"error":"%b","code":"%b","request_id":""}'
TELLING_PATIENCE_SECS: Final = 60.0
"""How long a client whose answer has begun waits for a worker to tell it: past the longest pause of a crash loop,
because all that the master could do for it is to close without a word."""
_ASSIGN: Final = int(Down.ASSIGN)
_END: Final = int(Down.END)
_FULL: Final = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)


def refusal(code: str) -> bytes:
    """The whole 503 for a code."""
    body = _BODY % (REASONS[code].text.encode(), code.encode())
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
        b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )


class Dispatcher:
    """Gives clients to workers. `peers` is the supervisor's list; `watch_full` asks for a call of `writable`."""

    def __init__(
        self,
        ledger: Ledger,
        board: Board,
        metrics: Metrics,
        log: Logger,
        server: Server,
        watch_full: Callable[[Peer], None],
        pools: Sequence[str] = (COMMON,),
    ) -> None:
        """`server`, `pools`: see `configure`."""
        self._ledger = ledger
        self._board = board
        self._metrics = metrics
        self._log = log
        self._watch_full = watch_full
        self._queues: dict[str, deque[InFlight]] = {}
        self.configure(server, pools)
        self._arrived: list[InFlight] = []
        self._favourite: Peer | None = None
        self._refused: dict[str, int] = {}
        self._turn = 0
        self.received = 0
        """How many handoffs there ever were."""
        self._counted = 0
        self.peers: list[Peer] = []

    def configure(self, server: Server, pools: Sequence[str]) -> None:
        """Live by these settings from now on. `pools` is which pool serves each listener, by the listener's index."""
        self._queue_size = server.queue_size
        self._queue_timeout = server.queue_timeout_secs
        self._pools = tuple(pools)
        waiting = [entry for queue in self._queues.values() for entry in queue]
        self._queues = {pool: deque() for pool in pools}
        for entry in waiting:
            self._queues[self._pools[entry.listener]].append(entry)

    @property
    def queued(self) -> int:
        """How many clients wait for a worker."""
        return sum(map(len, self._queues.values())) + len(self._arrived)

    @property
    def full(self) -> bool:
        """A pool's queue takes no more."""
        return bool(self._queue_size) and any(len(queue) >= self._queue_size for queue in self._queues.values())

    def queued_in(self, pool: str) -> int:
        """How many of them wait for a worker of this pool."""
        return len(self._queues.get(pool, ()))

    def pools_waited_for(self) -> list[str]:
        """The pools for whose workers somebody waits."""
        return [pool for pool, queue in self._queues.items() if queue]

    def receive(
        self,
        fd: int,
        data_fd: int,
        payload: bytes,
        flags: int,
        listener: int,
        now: float,
        code: str = "",
        kind: Kind = Kind.PLAIN,
    ) -> None:
        """A handoff arrived. Takes over `fd` and `data_fd` (-1: none). With `code` the client is only to be told."""
        self.received += 1
        entry = self._ledger.admit(fd, data_fd, payload, flags, listener, now, kind)
        if entry is None:
            self._refuse(fd, "no_capacity", kind)
            os.close(fd)
            if data_fd >= 0:
                os.close(data_fd)
            return
        if code:
            self._metrics.handoff_failed(code)
            entry.verdict = Verdict(State.GIVEN, code)
        self._arrived.append(entry)

    def count(self) -> None:
        """Count what came since the last time; called before the counts are written."""
        new, self._counted = self.received - self._counted, self.received
        if new:
            self._metrics.count("daemon_connections_total", amount=new)
            self._metrics.count("daemon_handoffs_total", amount=new)

    def dispatch(self) -> None:
        """Give out what `receive` took in; called once per turn, when all that was there is received.

        Not at once, because while fds are on their way in any Unix socket, each closing of one makes the kernel look
        for cycles of them (unix_gc), which costs more than the handoff: so all senders are closed first.
        """
        if not self._arrived:
            return
        arrived, self._arrived = self._arrived, []
        self._favourite = None
        for entry in arrived:
            if self._queues[self._pools[entry.listener]] or not self._give(entry):
                self._enqueue(entry)

    def finished(self, peer: Peer, slot: int, attempt: int) -> None:
        """A worker is done with a slot; ignored when the slot is not its own any more."""
        entry = self._owned(peer, slot, attempt)
        if entry is not None:
            peer.active -= 1
            self._ledger.release(entry)

    def returned(self, peer: Peer, slot: int, attempt: int) -> None:
        """A worker had no fd to receive this client with: it is full until one of its streams ends."""
        entry = self._owned(peer, slot, attempt)
        if entry is None:
            return
        peer.active -= 1
        entry.peer = None
        if entry.fd < 0:  # no ledger: nobody has this client any more
            self._metrics.handoff_failed("out_of_fds")
            self._ledger.release(entry)
            return
        peer.full = True
        self._log.warning("worker %d is out of file descriptors", peer.index)
        if not self._give(entry):
            self._enqueue(entry)

    def writable(self, peer: Peer) -> None:
        """There is room again in a channel, or a fd in a worker."""
        peer.full = False
        self.pump()

    def take_refused(self) -> dict[str, int]:
        """How many clients got a 503 since the last time, by code."""
        refused, self._refused = self._refused, {}
        return refused

    def pump(self) -> None:
        """Give what waits to whoever can take it."""
        for queue in self._queues.values():
            while queue and self._give(queue[0]):
                queue.popleft()

    def expire(self, now: float) -> None:
        """Refuse what has waited too long; called each tick."""
        for pool, queue in self._queues.items():
            if not queue:
                continue
            waiting: deque[InFlight] = deque()
            for entry in queue:
                patience = self._queue_timeout if self._unbegun(entry) else TELLING_PATIENCE_SECS
                if now - entry.waits_since < patience:
                    waiting.append(entry)
                else:
                    self._give_up(entry, "queue_timeout")
            self._queues[pool] = waiting

    def give_up_all(self, code: str) -> None:
        """Refuse all that waits."""
        self.dispatch()
        for queue in self._queues.values():
            while queue:
                self._give_up(queue.popleft(), code)

    def recover(self, peer: Peer, now: float) -> dict[str, int]:
        """Decide about every client of a dead worker, and count the decisions."""
        outcomes: dict[str, int] = {}
        suspect = peer.row.current - 1
        waiting: dict[str, deque[InFlight]] = {pool: deque() for pool in self._queues}
        for entry in self._ledger.orphans(peer):
            outcome = self._ledger.judge(entry, killer=entry.slot == suspect)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            lent = self._board.programs[entry.slot]
            self._board.programs[entry.slot] = 0
            if outcome == "closed":
                if not lent:  # to a program, which goes on without us: an end from here would be the end of its answer
                    self._close(entry)
                self._ledger.release(entry)
            else:
                entry.waits_since = now
                orphans = waiting[self._pools[entry.listener]]
                if entry.slot == suspect:  # first, so that if it kills again, the others behind it have not begun
                    orphans.appendleft(entry)
                else:
                    orphans.append(entry)
        for pool, orphans in waiting.items():
            self._queues[pool] = orphans + self._queues[pool]  # they were here before whoever came since the death
        for outcome, count in outcomes.items():
            self._metrics.count("forkd_streams_recovered_total", outcome, amount=count)
        self.pump()
        return outcomes

    def _owned(self, peer: Peer, slot: int, attempt: int) -> InFlight | None:
        entry = self._ledger.get(slot)
        return entry if entry is not None and entry.peer is peer and entry.attempt == attempt else None

    def _choose(self, pool: str) -> Peer | None:
        peers = self.peers
        count = len(peers)
        best: Peer | None = None
        for step in range(count):
            peer = peers[(self._turn + step) % count]
            if (
                peer.life is Life.READY
                and peer.pool == pool
                and not peer.full
                and not peer.late
                and (best is None or peer.active < best.active)
            ):
                best = peer
        self._turn += 1
        if pool != COMMON:  # for what costs so much that waking one more worker is nothing beside it
            return best
        favourite = self._favourite
        if (
            best is not None
            and favourite is not None
            and favourite.active <= best.active + 1
            and favourite.life is Life.READY
            and not favourite.full
            and not favourite.late
        ):
            return favourite
        self._favourite = best
        return best

    def _give(self, entry: InFlight) -> bool:
        """Send a client to a worker; False when none can take it now."""
        pool = self._pools[entry.listener]
        while (peer := self._choose(pool)) is not None:
            verdict = entry.verdict
            entry.attempt += 1
            if verdict is None:
                kind, flags, body = _ASSIGN, entry.flags, entry.payload or b""
            else:
                kind, flags = _END, 0
                inline = entry.payload if entry.payload and not entry.flags & PAYLOAD_IN_MEMFD else b""
                body = end_body(verdict.state, verdict.code, inline)
            head = Assignment(entry.slot, entry.attempt, kind, flags, entry.listener, entry.received_at)
            fds = (entry.fd,) if verdict is not None or entry.data_fd < 0 else (entry.fd, entry.data_fd)
            try:
                send_down(peer.channel, head, body, fds)
            except OSError as error:
                peer.full = True
                if error.errno in _FULL:
                    self._watch_full(peer)
                # Anything else: it is dying, and its end is on the way.
                continue
            peer.active += 1
            peer.given += 1
            entry.peer = peer
            self._ledger.given(entry)
            return True
        return False

    @staticmethod
    def _unbegun(entry: InFlight) -> bool:
        """Whether nothing was said to a waiting client yet, so that the master may answer it."""
        return entry.verdict is None or entry.verdict.state in (State.GIVEN, State.COMMITTED)

    def _enqueue(self, entry: InFlight) -> None:
        queue = self._queues[self._pools[entry.listener]]
        if len(queue) >= self._queue_size:
            self._give_up(entry, "no_capacity")
        else:
            queue.append(entry)

    def _give_up(self, entry: InFlight, code: str) -> None:
        """No worker will see this client."""
        kind = Kind(self._board.kinds[entry.slot])
        if self._unbegun(entry):
            self._refuse(entry.fd, code, kind)
        else:
            self._hang_up(entry.fd)
            self._metrics.stream_failed("worker_lost")
        self._ledger.release(entry)

    def _close(self, entry: InFlight) -> None:
        """End a dead worker's client to which nothing can be said; its fds are still to be released."""
        if self._board.kinds[entry.slot] == Kind.BARE and self._board.states[entry.slot] != State.ENDED:
            self._metrics.stream_failed("worker_lost")
            self._cut(entry.fd)
        else:
            self._hang_up(entry.fd)

    def _refuse(self, fd: int, code: str, kind: Kind) -> None:
        """The prepared 503, where a client can be told; `fd` stays the caller's, who closes it."""
        self._metrics.count("daemon_connections_rejected_total")
        self._refused[code] = self._refused.get(code, 0) + 1
        self._metrics.handoff_failed(code)
        if kind == Kind.PLAIN:
            self._hang_up(fd, refusal(code))
        else:
            self._cut(fd)

    @staticmethod
    def _cut(fd: int) -> None:
        """Have the last close of a bare body reset the connection: an end in order would say that it is whole."""
        if fd >= 0:
            with contextlib.suppress(OSError):  # no socket at all
                handoff.reset_on_close(fd)

    @staticmethod
    def _hang_up(fd: int, last_words: bytes = b"") -> None:
        """End a connection in order, without waiting for anything; `fd` stays the caller's."""
        if fd < 0:
            return
        try:
            sock = socket.socket(fileno=fd)
        except OSError:  # no socket at all
            return
        try:
            if last_words:
                sock.send(last_words, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(DISCARD_BYTES, socket.MSG_DONTWAIT)  # to close with input unread would reset the connection
        except OSError:
            pass
        finally:
            sock.detach()
