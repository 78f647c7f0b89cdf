"""Fork, reap, heartbeat, backoff: keeping the wanted number of workers alive. Which they are says `forkd.generations`.

A worker is born by fork from the master, which has no threads, with all signals blocked: a signal between the fork
and the child's own handlers would run the master's. The child closes everything that is not its own (the ledger's
clients, the listeners, the other channels) before anything else, makes its own selector and leaves by os._exit, so
that no object of the master's is ever finalised in it.

A worker's death is seen by its pidfd. Then, in this order: wait for it (now nobody else writes to the board), read its
channel to the end (reports of finished slots may still lie there), and only then decide about its clients.

A worker that was ready once is replaced at once. Deaths before that are a crash loop, and back off, doubling to 30 s,
each generation by itself.

The heartbeat is judged by the master's own ticks, not by the clock: when the whole machine was frozen, nobody is late.
"""

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE
from typing import Final

from forkd import channel, cpus, handoff, process
from forkd.board import WORKERS_MAX, Board
from forkd.boot import UNFIT, Boot, Unfit
from forkd.channel import Down, Up
from forkd.dispatcher import Dispatcher
from forkd.generations import Generation, Generations
from forkd.logs import Logs
from forkd.metrics import Metrics
from forkd.peer import Life, Peer
from forkd.selector import Ready, Selector
from forkd.settings import COMMON, Settings

TICK_SECS: Final = 0.25
LATE_SECS: Final = 3.0
ABORT_GRACE_SECS: Final = 1.0
MESSAGES_PER_TURN: Final = 64
_FINISHED: Final = int(Up.FINISHED)
"""A member of an enum is looked up each time, in compiled code too."""

Run = Callable[[Boot], None]


class Supervisor:
    """The workers. `run` is the worker's main function; it is called in the child and returns when it may exit, or
    raises Unfit.
    """

    def __init__(
        self,
        selector: Selector[Ready],
        board: Board,
        settings: Settings,
        logs: Logs,
        metrics: Metrics,
        metrics_dir: str | None,
        run: Run,
        changed: Callable[[Settings, bool], None] = lambda _settings, _succeeded: None,
        side: str = "",
    ) -> None:
        """`changed`: see `forkd.generations.Generations`."""
        self._selector = selector
        self._board = board
        self._logs = logs
        self._log = logs.logger
        self._metrics = metrics
        self._metrics_dir = metrics_dir
        self._side = side
        self._run = run
        self._room = bytearray(65536)
        self._ticks = 0
        self._draining = False
        self._stopping = False
        self._killing = False
        self.dispatcher: Dispatcher
        self.peers: list[Peer] = []
        births_at_once = max(1, cpus.available() // 2)
        self.generations = Generations(settings, self.peers, self._log, self._kill, changed, births_at_once)
        self.totals = [0, 0, 0, 0]
        """Started, completed, failed, bytes sent, of all workers that are gone."""

    @property
    def ready(self) -> int:
        """How many workers take handoffs."""
        return sum(peer.life is Life.READY and not peer.late for peer in self.peers)

    def ready_in(self, pool: str) -> int:
        """How many of them there are in one pool."""
        return sum(peer.life is Life.READY and not peer.late for peer in self.peers if peer.pool == pool)

    @property
    def wanted(self) -> int:
        """How many workers the current generation is to have."""
        return self.generations.current.size

    @property
    def complete(self) -> bool:
        """All of those are ready, in every pool."""
        return all(self.ready_in(pool) >= wanted for pool, wanted in self.generations.current.wanted.items())

    def maintain(self, now: float) -> None:
        """Start what is missing; called each tick and after each death."""
        while (missing := self._missing(now)) is not None:
            generation, pool = missing
            try:
                self._spawn(generation, pool)
            except OSError as error:  # EAGAIN, ENOMEM, EMFILE: the machine is full, not we are broken
                self._log.error("cannot start a worker: %s", error.strerror)
                generation.back_off(now)

    def _missing(self, now: float) -> tuple[Generation, str] | None:
        if self._killing:
            return None
        if not self._draining:
            return self.generations.missing(now)
        # During a drain a worker is wanted only where clients wait for one: those of a worker that died.
        current = self.generations.current
        serving = {peer.pool for peer in self.peers if peer.life in (Life.STARTING, Life.READY)}
        if now >= current.next_birth:
            for pool in self.dispatcher.pools_waited_for():
                if pool not in serving:
                    return current, pool
        return None

    def drain(self) -> None:
        """Let every worker finish and go, once nothing waits for one; called each tick of a shutdown.

        Those that never had a client have nothing to finish, and might never be ready to hear it.
        """
        self._draining = True
        self.generations.forget()
        if not self.dispatcher.queued:
            for peer in self.peers:
                if peer.life in (Life.STARTING, Life.STANDBY):
                    peer.unwanted = True
                    self._kill(peer)
                peer.tell(Down.STOP if self._stopping else Down.DRAIN)

    def stop(self) -> None:
        """Have every worker end its streams now."""
        self._stopping = True
        self.drain()
        for peer in self.peers:
            peer.tell(Down.STOP)

    def kill(self) -> None:
        """SIGKILL to every worker that is left. None is started any more: its clients had their time."""
        self._killing = True
        for peer in self.peers:
            self._kill(peer)

    def reload(self, settings: Settings, now: float) -> None:
        """Replace all workers by others that live by `settings`."""
        if not self._draining:
            self.generations.ask(settings, now)
            self.maintain(now)

    def resize(self, step: int, now: float) -> None:
        """One worker more in the common pool, or one fewer (the least busy drains), but at least one."""
        self._log.info("%d workers wanted", self.generations.resize(step, now))
        self.dispatcher.pump()
        self.maintain(now)

    def signal_all(self, number: signal.Signals) -> None:
        """Pass a signal on to every worker."""
        for peer in self.peers:
            self._signal(peer, number)

    def tick(self, now: float) -> None:
        """Judge every heartbeat and every deadline; called every TICK_SECS of the master's own life."""
        self._ticks += 1
        timeout = self.generations.current.settings.workers.timeout_secs
        for peer in self.peers:
            peer.tell_again()
            if (
                peer.full
                and not self._selector.watched(peer.channel.fileno()) & EVENT_WRITE
                and peer.life is Life.READY
            ):
                peer.full = False  # fds, or memory, may be there again, and nothing would tell us: try
                self.dispatcher.pump()
            beat = peer.row.beat
            if beat != peer.seen_beat:
                peer.seen_beat = beat
                peer.silent_ticks = 0
                if peer.late:
                    peer.late = False
                    self.dispatcher.pump()
                continue
            peer.silent_ticks += 1
            silent = peer.silent_ticks * TICK_SECS
            peer.late = silent >= LATE_SECS
            if peer.killed_at_tick:
                if (self._ticks - peer.killed_at_tick) * TICK_SECS >= ABORT_GRACE_SECS:
                    self._signal(peer, signal.SIGKILL)
            elif silent >= timeout:
                self._log.error("worker %d (pid %d) is silent for %.0f s: ending it", peer.index, peer.pid, silent)
                peer.killed_at_tick = self._ticks
                self._signal(peer, signal.SIGABRT)  # faulthandler writes all stacks to the log
        if not self._draining:
            self.generations.tick(now)
            self.dispatcher.pump()
        self._publish()

    def _publish(self) -> None:
        """Show on the board how every worker is."""
        for peer in self.peers:
            self._board.peer_row(peer.index).store(peer.life.value, peer.active, late=peer.late)

    def close(self) -> None:
        """Give back the fds of workers that are still there; for a master that leaves."""
        for peer in self.peers:
            peer.channel.close()
            os.close(peer.pidfd)

    def _spawn(self, generation: Generation, pool: str) -> None:
        index = self._free_index()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        row = self._board.row(index)
        row.clear()
        before = process.block_signals()
        try:
            pid = os.fork()
            if pid == 0:
                self._child(index, theirs, generation, pool)
        except BaseException:
            ours.close()
            raise
        finally:
            process.restore_signals(before)
            theirs.close()
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # no fd left: a worker that we could not watch must not be
            ours.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        peer = Peer(index, generation.number, pid, pidfd, ours, row, pool)
        peer.stream_limit = self.generations.limit_of(generation)
        self._board.peer_row(index).store_born(pid, generation.number, pool)
        self.peers.append(peer)
        self._selector.register(peer.pidfd, EVENT_READ, _OnDeath(self, peer))
        self._selector.register(ours.fileno(), EVENT_READ, _OnChannel(self, peer))
        self._log.debug("worker %d started (pid %d)", index, pid)

    def _child(self, index: int, theirs: socket.socket, generation: Generation, pool: str) -> None:
        """Become a worker. Never returns."""
        code = 1
        try:
            process.close_all_but([theirs.fileno(), self._logs.sink.fd])
            settings = generation.settings
            self._logs.configure(settings.logging)
            self._run(
                Boot(
                    index,
                    generation.number,
                    theirs,
                    self._board,
                    settings,
                    self._logs,
                    self._metrics_dir,
                    self._side,
                    pool,
                )
            )
            code = 0
        except Unfit as unfit:
            code = UNFIT
            for fault in unfit.faults:
                self._log.error("%s", fault)
        except BaseException:
            self._log.exception("worker %d broke", index)
        finally:
            try:
                self._logs.sink.flush()
            finally:
                os._exit(code)

    def _free_index(self) -> int:
        used = {peer.index for peer in self.peers}
        for index in range(1, WORKERS_MAX):
            if index not in used:
                return index
        raise OSError(errno.EAGAIN, f"there are {len(used)} already")

    def watch_full(self, peer: Peer) -> None:
        """Call the dispatcher when this worker's channel takes messages again."""
        self._selector.modify(peer.channel.fileno(), EVENT_READ | EVENT_WRITE)

    def on_channel(self, peer: Peer, mask: int) -> None:
        """A channel is readable or writable."""
        if peer.life is Life.DEAD:
            return
        if mask & EVENT_WRITE:
            self._selector.modify(peer.channel.fileno(), EVENT_READ)
            self.dispatcher.writable(peer)
        if mask & EVENT_READ and not self._hear(peer, MESSAGES_PER_TURN):
            # The worker closed its end: its death is on the way, and the pidfd tells it.
            self._selector.unregister(peer.channel.fileno())
            peer.full = True

    def _hear(self, peer: Peer, messages: int) -> bool:
        """Take in up to so many messages; False at the end of file."""
        for _ in range(messages):
            try:
                message = channel.receive_up(peer.channel, self._room)
            except BlockingIOError:
                return True
            except ConnectionResetError:  # said once of a worker that died with messages unread; its own come behind
                continue
            except OSError:
                return False
            if not message:
                return False
            self._obey(peer, message)
            if not handoff.more_waits(peer.channel):
                break
        return True

    def _obey(self, peer: Peer, message: bytes) -> None:
        kind, pairs = channel.parse_up(message)
        dispatcher = self.dispatcher
        if kind == _FINISHED:
            for slot, attempt in pairs:
                dispatcher.finished(peer, slot, attempt)
            if peer.full and not self._selector.watched(peer.channel.fileno()) & EVENT_WRITE:
                peer.full = False
            dispatcher.pump()
        elif kind == Up.READY:
            pool = f", pool {peer.pool}" if peer.pool != COMMON else ""
            self._log.info("worker %d ready (pid %d, generation %d%s)", peer.index, peer.pid, peer.generation, pool)
            if peer.life is Life.STARTING:
                self.generations.ready(peer, time.monotonic())
                self.maintain(time.monotonic())
            dispatcher.pump()
        elif kind == Up.RETURNED:
            for slot, attempt in pairs:
                dispatcher.returned(peer, slot, attempt)
        elif kind == Up.DRAINING:
            self._log.info("worker %d drains: it was sent SIGTERM, or asks to be replaced", peer.index)
            self.generations.retire(peer, time.monotonic())
            self.maintain(time.monotonic())
        else:
            self._log.error("worker %d says what is not known here: %d", peer.index, kind)

    def on_death(self, peer: Peer) -> None:
        """A worker's pidfd is readable."""
        self._selector.unregister(peer.pidfd)  # first: whatever goes wrong below must not come again each turn
        _, status = os.waitpid(peer.pid, 0)
        was, peer.life = peer.life, Life.DEAD
        while self._hear(peer, MESSAGES_PER_TURN) and _readable(peer.channel):
            pass
        os.close(peer.pidfd)
        if self._selector.watched(peer.channel.fileno()):
            self._selector.unregister(peer.channel.fileno())
        peer.channel.close()
        self.peers.remove(peer)
        self.totals = [sum(pair) for pair in zip(self.totals, peer.row.totals, strict=True)]
        now = time.monotonic()
        outcomes = self.dispatcher.recover(peer, now)
        code = os.waitstatus_to_exitcode(status)
        asked = peer.unwanted or (was is Life.DRAINING and code == 0)
        self._board.peer_row(peer.index).store_gone(asked=asked)
        if not asked:
            self._metrics.count("forkd_worker_deaths_total")
            what = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "none in flight"
            self._log.error(
                "worker %d (pid %d) %s; streams: %s", peer.index, peer.pid, process.how_it_ended(code), what
            )
        self.generations.died(peer, was, now, unfit=code == UNFIT)
        self.maintain(now)

    def _kill(self, peer: Peer) -> None:
        self._signal(peer, signal.SIGKILL)

    @staticmethod
    def _signal(peer: Peer, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(peer.pidfd, number)
        except ProcessLookupError:
            pass


class _OnDeath:
    """What the selector calls for a pidfd."""

    __slots__ = ("_peer", "_supervisor")

    def __init__(self, supervisor: Supervisor, peer: Peer) -> None:
        self._supervisor = supervisor
        self._peer = peer

    def on_ready(self, _mask: int) -> None:
        self._supervisor.on_death(self._peer)


class _OnChannel:
    """What the selector calls for a channel."""

    __slots__ = ("_peer", "_supervisor")

    def __init__(self, supervisor: Supervisor, peer: Peer) -> None:
        self._supervisor = supervisor
        self._peer = peer

    def on_ready(self, mask: int) -> None:
        self._supervisor.on_channel(self._peer, mask)


def _readable(sock: socket.socket) -> bool:
    """Whether a message lies in a channel."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
