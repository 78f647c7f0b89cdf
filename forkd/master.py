"""The master: the loop that ties listeners, ledger, dispatcher and supervisor together, and the signals.

It stays small on purpose, because nothing takes over when it crashes: it parses no JSON, runs no backend and never
blocks. Its life is RUNNING, then DRAINING (TERM or INT: nothing new is accepted, streams finish), then over. A second
TERM or INT, or the end of `shutdown_timeout_secs`, ends the streams that are left with `code: shutdown`; QUIT does so
at once. After an upgrade it drains too, but what is new goes to its successor: see `forkd.upgrade`.
"""

import logging
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from enum import Enum
from selectors import EVENT_READ
from typing import Final

from forkd import process, systemd, upgrade
from forkd.auxiliary import Auxiliary
from forkd.board import Board
from forkd.config import Loaded
from forkd.dispatcher import Dispatcher
from forkd.generations import DEATHS_MAX, END_GRACE_SECS
from forkd.intake import Intake, Sender
from forkd.ledger import Ledger
from forkd.listener import Listener, ListenError
from forkd.logs import Logs
from forkd.metrics import Metrics
from forkd.moderation import Moderation
from forkd.reload import Reader, settle
from forkd.selector import EVENTS_MAX, Ready, Selector
from forkd.settings import Server, Settings, worker_counts
from forkd.supervisor import TICK_SECS, Run, Supervisor
from forkd.upgrade import SIDES, Heritage, Upgrade

PAUSE_SECS: Final = 0.001
"""Two thousand handoffs a second or more are taken in small batches; none waits longer than this."""
FDS_PER_WORKER: Final = 4
FDS_BASE: Final = 48

_HANDLED: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)
_IGNORED: Final = (signal.SIGPIPE,)


class Stage(Enum):
    """Where the master is in its life."""

    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"


_RUNNING: Final = Stage.RUNNING
"""A member of an enum is looked up each time, in compiled code too."""


class Master:
    """The master process. `name` is what its title says it serves: the configuration's path, or the socket's."""

    def __init__(
        self,
        settings: Settings,
        logs: Logs,
        run: Run,
        name: str,
        load: Callable[[], Loaded],
        heritage: Heritage | None = None,
        *,
        benchmark: bool = False,
    ) -> None:
        """Binds the listeners, or takes those that it inherits, then drops privileges. Raises ListenError or OSError.

        `load` reads the configuration again. It runs in a child.
        """
        self._benchmark = benchmark
        self._heritage = heritage
        self._settings = settings
        self._logs = logs
        self._log = logs.logger
        self._name = name
        server = settings.server
        workers = sum(worker_counts(settings).values())
        self._limit, capacity = self._measure_room(workers)
        self._listeners = self._listen()
        self._metrics_listener = self._bind_metrics()
        own_fds = [listener.lock_fd for listener in self._listeners] + ([logs.sink.fd] if logs.sink.path else [])
        process.drop_privileges(server.user, server.group, own_fds)
        if os.geteuid() == 0:
            self._log.warning("workers run as root: name a user (server.user; forkd fdrecv: --user)")
        elif server.user is not None and not process.runs_as(server.user):
            who = process.own_user()
            self._log.warning("server.user has no effect: forkd was not started as root, and runs as %s", who)
        self._side = heritage.side if heritage is not None else ""
        self._metrics_dir = self._make_metrics_dir()
        self._metrics = Metrics(self._metrics_dir, f"{self._side}master")
        if self._metrics.fault is not None:
            self._log.error("going on without metrics: %s", self._metrics.fault)
        self._selector: Selector[Ready] = Selector(self._crashed)
        self._board = Board(capacity)
        self._ledger = Ledger(self._board, capacity, keep=server.ledger)
        self._signals = process.Signals(_HANDLED, _IGNORED)
        self._supervisor = Supervisor(
            self._selector,
            self._board,
            settings,
            logs,
            self._metrics,
            self._metrics_dir,
            run,
            self._reloaded,
            self._side,
        )
        self._reader = Reader(self._selector, self._log, load, self._reload)
        self._upgrade = Upgrade(self._selector, self._log, self._hand_over, self._upgrade_failed)
        self._dispatcher = Dispatcher(
            self._ledger,
            self._board,
            self._metrics,
            self._log,
            server,
            self._supervisor.watch_full,
            settings.pools_of_listeners(),
        )
        self._dispatcher.peers = self._supervisor.peers
        self._supervisor.dispatcher = self._dispatcher
        self._exposition = self._make_exposition()
        self._title = process.Title()
        self._stage = Stage.RUNNING
        self._deadline = 0.0
        self._second = 0.0
        self._intake: Intake | None = None
        self._handed_over = False
        self._failed = False
        """It could not start."""
        self._hurried = False
        """After that, it was told to stop."""
        self._reported = False
        """Whoever waits for us to be ready was told."""

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        self._selector.register(self._signals.wakeup_fd, EVENT_READ, self)
        self._log.info(
            "forkd listens on %s; %d workers, room for %d streams",
            ", ".join(listener.path for listener in self._listeners),
            self._supervisor.wanted,
            self._ledger.capacity,
        )
        self._collector = process.Collector()
        now = time.monotonic()
        self._supervisor.maintain(now)
        self._publish(now)
        if self._exposition is not None and not self._is_heir:
            self._exposition.maintain(now)
        self._intake = Intake(
            self._selector,
            self._listeners,
            self._settings.server,
            self._dispatcher.receive,
            self._fds_left,
            self._metrics,
            self._log,
            time.monotonic,
            begun=not self._is_heir,
        )
        next_tick = now + TICK_SECS
        moderation = Moderation(PAUSE_SECS)
        counted = 0
        while self._stage is _RUNNING or self._supervisor.peers or self._waits() or self._upgrade.under_way:
            moderation.pause()
            events = self._selector.select(max(0.0, next_tick - now))
            now = time.monotonic()
            # One event of a listener, or of a sender, may bring many handoffs: those are counted when they are taken.
            received = self._dispatcher.received
            moderation.looked(now, max(len(events), received - counted), len(events) == EVENTS_MAX)
            counted = received
            self._intake.busy = moderation.busy
            self._selector.serve(events)
            try:
                if now >= next_tick:
                    next_tick = now + TICK_SECS
                    self._tick(now)
                if not self._reported and self._stage is _RUNNING:
                    self._report_if_ready()
                self._dispatcher.dispatch()
            except Exception:
                self._survive("the tick")
        return self._leave()

    def _crashed(self, ready: Ready, _error: Exception) -> None:
        self._survive(f"serving {type(ready).__name__}")
        if isinstance(ready, Sender) and self._intake is not None:
            self._intake.drop(ready)

    def _survive(self, what: str) -> None:
        """A bug of ours must cost no more than what it hit: every stream there is hangs on this process."""
        self._metrics.count("forkd_master_errors_total")
        self._log.exception("a bug in the master, in %s; going on", what)

    def _waits(self) -> bool:
        """Whether somebody still hands over, or waits for a worker; or the master before us still has streams, which
        systemd would kill as soon as we, the service's main process, are gone.
        """
        assert self._intake is not None
        if not self._intake.stopped or (self._stage is not Stage.STOPPING and self._dispatcher.queued > 0):
            return True
        given_up = self._stage is Stage.STOPPING and time.monotonic() >= self._deadline + END_GRACE_SECS
        return self._predecessor_lives() and not given_up

    def _predecessor_lives(self) -> bool:
        """Whether the master that we took over from still finishes its streams."""
        heritage = self._heritage
        return self._reported and heritage is not None and heritage.old_fd >= 0 and not _at_end(heritage.old_fd)

    def on_ready(self, _mask: int) -> None:
        """Signals came."""
        hangup = False
        for number in self._signals.take():
            if number in (signal.SIGTERM, signal.SIGINT):
                if self._stage is Stage.RUNNING:
                    self._drain(number)
                elif self._handed_over and not self._hurried:
                    self._hurry(number)
                else:
                    self._stop_at_once(number)
            elif number == signal.SIGQUIT:
                self._stop_at_once(number)
            elif number == signal.SIGHUP:
                if hangup:
                    continue  # several in a burst are one
                hangup = True
                self._log.info("HUP: %d streams in %d workers", self._ledger.count, len(self._supervisor.peers))
                if self._stage is Stage.RUNNING:
                    self._tell_systemd(systemd.reloading())
                    self._reader.ask()
            elif number == signal.SIGUSR2:
                self._start_upgrade()
            elif number == signal.SIGUSR1:
                self._reopen_logs()
            elif number == signal.SIGCHLD:
                self._reap_strangers()
            elif self._stage is Stage.RUNNING and number in (signal.SIGTTIN, signal.SIGTTOU):
                self._supervisor.resize(1 if number == signal.SIGTTIN else -1, time.monotonic())

    def _reap_strangers(self) -> None:
        """Wait for orphans that the kernel gave us as PID 1. Our own children are seen by their pidfds."""
        own = {peer.pid for peer in self._supervisor.peers} | {self._reader.pid, self._upgrade.pid}
        if self._exposition is not None:
            own.add(self._exposition.pid)
        try:
            while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid not in own:
                os.waitpid(dead.si_pid, 0)
        except ChildProcessError:
            pass

    def _measure_room(self, workers: int) -> tuple[int, int]:
        """The fds this process may have, and the streams that fit into them (RLIMIT_NOFILE less a reserve)."""
        server = self._settings.server
        # Three generations of workers may live at once.
        reserve = FDS_BASE + 3 * FDS_PER_WORKER * workers + server.max_pending_handoffs
        limit = process.raise_open_files_limit(server.max_connections + reserve)
        if limit < FDS_BASE + FDS_PER_WORKER * workers:
            raise OSError(f"the limit of open files is {limit}, too low for {workers} workers; raise LimitNOFILE")
        reserve = min(reserve, limit // 2)
        capacity = min(server.max_connections, limit - reserve) if server.ledger else server.max_connections
        if capacity < server.max_connections:
            chosen = server.max_connections != Server().max_connections
            self._log.log(
                logging.WARNING if chosen else logging.INFO,
                "max_connections is %d instead of %d: the limit of open files is %d, and %d are kept in reserve; raise "
                "it (ulimit -n, or LimitNOFILE under systemd) for more",
                capacity,
                server.max_connections,
                limit,
                reserve,
            )
        return limit, capacity

    def _fds_left(self) -> int:
        """How many more connections may be accepted, so that every one of them can still bring its client."""
        assert self._intake is not None or not self._ledger.count
        senders = self._intake.senders if self._intake is not None else 0
        workers = max(self._supervisor.wanted, len(self._supervisor.peers))
        return (self._limit - FDS_BASE // 2 - FDS_PER_WORKER * workers - senders - self._ledger.fds) // 3

    def _listen(self) -> list[Listener]:
        """Every listener: inherited, or bound now. What is inherited and not configured (any more) is given up."""
        inherited = dict(self._heritage.listeners if self._heritage is not None else self._activated())
        listeners: list[Listener] = []
        try:
            for index, own in enumerate(self._settings.all_listeners()):
                fd, lock, lent = inherited.pop(own.path, (-1, -1, False))
                sock = socket.socket(fileno=fd) if fd >= 0 else None
                listeners.append(Listener(index, own, sock, lock, lent=lent))
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        self._given_up = list(inherited)
        for path, (fd, lock, _) in inherited.items():
            self._log.warning("the socket %s was passed to forkd and is not in its configuration: closed", path)
            os.close(fd)
            if lock >= 0:
                os.close(lock)
        return listeners

    def _activated(self) -> dict[str, tuple[int, int, bool]]:
        """What systemd listens on for us, by path. Raises ListenError."""
        types = {own.path: own.socket_type for own in self._settings.all_listeners()}
        try:
            passed = systemd.listen_fds(os.environ, os.getpid())
        except ValueError as error:
            raise ListenError(str(error)) from error
        for one in passed:
            if types.get(one.path, one.type) != one.type:
                raise ListenError(f"{one.path} from systemd is a {one.type} socket, the configuration says otherwise")
        return {one.path: (one.fd, -1, True) for one in passed}

    def _make_metrics_dir(self) -> str | None:
        """A directory of this master's own, wiped at its start; after an upgrade, the one of the master before."""
        if not self._settings.metrics.enabled:
            return None
        if self._heritage is not None and self._heritage.metrics_dir is not None:
            return self._heritage.metrics_dir
        base = self._settings.metrics.dir
        if base is None:
            return tempfile.mkdtemp(prefix="forkd-metrics-")
        own = os.path.join(base, f"master-{os.getpid()}")
        shutil.rmtree(own, ignore_errors=True)
        os.makedirs(own)
        return own

    def _bind_metrics(self) -> socket.socket | None:
        """The port that metrics are served on, None if there is to be none or it cannot be had: streams matter more."""
        inherited = self._heritage.metrics_fd if self._heritage is not None else -1
        if not self._settings.metrics.enabled:
            if inherited >= 0:
                os.close(inherited)  # or whoever asks there would wait for ever
            return None
        # Imported late, because prometheus_client is large, and nothing of it is needed without metrics.
        from forkd import exposition  # noqa: PLC0415

        address = self._settings.metrics.listen_addr
        if inherited >= 0:
            listener = socket.socket(fileno=inherited)
            if not exposition.is_bound_to(listener, address):
                here = exposition.address_of(listener)
                self._log.warning("metrics stay on http://%s/metrics: only a restart moves them to %s", here, address)
            return listener
        try:
            listener = exposition.bind(address)
        except OSError as error:
            self._log.error(
                "cannot serve metrics on %s: %s; going on without (another address: metrics.listen_addr)",
                address,
                error.strerror,
            )
            return None
        self._log.info("metrics on http://%s/metrics", exposition.address_of(listener))
        return listener

    def _make_exposition(self) -> Auxiliary | None:
        listener = self._metrics_listener
        if listener is None or self._metrics_dir is None:
            return None
        from forkd.exposition import Exposition  # noqa: PLC0415

        own = Exposition(listener, self._board, self._settings, self._metrics_dir, self._logs)
        return Auxiliary("metrics", self._selector, self._logs, own.run, own.fds)

    def _publish(self, now: float) -> None:
        """Leave word of ourselves on the board."""
        ledger, queued = self._ledger, self._dispatcher.queued
        full = self._dispatcher.full or self._fds_left() <= 0
        pools = self._supervisor.generations.current.wanted
        for number, (pool, wanted) in enumerate(pools.items()):
            self._board.pool_row(number).store(
                pool, ready=self._supervisor.ready_in(pool), wanted=wanted, queued=self._dispatcher.queued_in(pool)
            )
        self._board.master_row().store(
            beat_ms=int(now * 1000),
            stage=self._stage.value,
            generation=self._supervisor.generations.current.number,
            ready=self._supervisor.ready,
            wanted=self._supervisor.wanted,
            pools=len(pools),
            streams=ledger.count,
            queued=queued,
            peak=ledger.peak,
            capacity=ledger.capacity,
            room=0 if full else ledger.capacity - ledger.count,
        )

    def _tick(self, now: float) -> None:
        intake = self._intake
        assert intake is not None
        self._supervisor.tick(now)
        self._supervisor.maintain(now)
        self._reader.tick(now)
        self._upgrade.tick(now)
        if self._exposition is not None and (self._reported or not self._is_heir):
            self._exposition.maintain(now)
        intake.expire(now)
        intake.resume()
        self._dispatcher.expire(now)
        if self._stage is not Stage.RUNNING:
            intake.empty_backlogs()
            if intake.stopped:
                self._supervisor.drain()
            if now >= self._deadline:
                if self._stage is Stage.STOPPING:
                    self._dispatcher.give_up_all("shutdown")
                    self._supervisor.kill()
                    self._upgrade.kill()
                else:
                    self._log.warning("%d streams did not finish in time: ending them", self._ledger.count)
                    self._stop()
        self._publish(now)
        if now >= self._second:
            self._second = now + 1
            self._each_second(now)

    def _each_second(self, now: float) -> None:
        self._reap_strangers()  # who died behind one of our own, which hides them until it is reaped
        self._collector.tidy(now, idle=not self._ledger.count)
        forgotten = self._ledger.sweep()
        if forgotten:
            self._log.warning("%d payloads forgotten: too many bytes wait for their streams to begin", forgotten)
        refused = self._dispatcher.take_refused()
        if refused:
            self._log.warning("refused with 503: %s", ", ".join(f"{count} {code}" for code, count in refused.items()))
        self._logs.tell_repeats()
        metrics = self._metrics
        dropped = self._logs.sink.take_dropped()
        if dropped:
            metrics.count("forkd_log_lines_dropped_total", amount=dropped)
        metrics.gauge("daemon_active_connections", self._ledger.count)
        metrics.gauge("daemon_active_streams", self._ledger.count - self._dispatcher.queued)
        metrics.gauge("daemon_peak_streams", self._ledger.peak)
        self._dispatcher.count()
        metrics.flush()
        if self._heritage is not None and self._heritage.old_fd >= 0 and _at_end(self._heritage.old_fd):
            self._inherit(self._heritage)
        workers = len(self._supervisor.peers)
        stage = "" if self._stage is Stage.RUNNING else f" {self._stage.value}"
        self._title.show(f"forkd: master [{self._name}]{stage} workers={workers} streams={self._ledger.count}", now)
        self._tell_systemd(f"STATUS={self._stage.value}: {self._ledger.count} streams in {workers} workers\nWATCHDOG=1")
        self._logs.sink.flush()

    def _drain(self, number: signal.Signals) -> None:
        if self._stage is Stage.RUNNING:
            timeout = self._settings.server.shutdown_timeout_secs
            self._log.info("%s: finishing %d streams, for up to %.0f s", number.name, self._ledger.count, timeout)
            self._upgrade.cancel()
            self._finish(timeout)

    def _stop_at_once(self, number: signal.Signals) -> None:
        if self._stage is not Stage.STOPPING:
            self._log.info("%s: ending %d streams", number.name, self._ledger.count)
        if self._stage is Stage.RUNNING:
            self._upgrade.cancel()
            self._finish(0)
        self._stop()

    def _hurry(self, number: signal.Signals) -> None:
        """Told to stop while it finishes what an upgrade left it: as any other, streams have the time of a stop."""
        self._hurried = True
        timeout = self._settings.server.shutdown_timeout_secs
        self._log.info("%s: finishing %d streams, for up to %.0f s", number.name, self._ledger.count, timeout)
        self._deadline = min(self._deadline, time.monotonic() + timeout)

    def _finish(self, timeout: float) -> None:
        """Take nothing new, and go when the last stream has ended."""
        assert self._intake is not None
        self._tell_systemd("STOPPING=1")
        self._stage = Stage.DRAINING
        self._deadline = time.monotonic() + timeout
        self._intake.stop()
        if self._intake.stopped:
            self._supervisor.drain()

    # Reload.

    def _reload(self, outcome: Loaded | list[str]) -> None:
        """The configuration was read again."""
        if self._stage is not Stage.RUNNING:
            return
        if isinstance(outcome, list):
            self._tell_systemd("READY=1")
            self._log.error("the configuration is not valid; nothing is changed:")
            for fault in outcome:
                self._log.error("  %s", fault)
            return
        for warning in outcome.warnings:
            self._log.warning("%s", warning)
        settings, kept = settle(self._settings, outcome.settings)
        if kept:
            self._log.warning("a reload leaves %s as it was: restart forkd to change it", ", ".join(kept))
        self._supervisor.reload(settings, time.monotonic())

    def _reloaded(self, settings: Settings, succeeded: bool) -> None:
        """Its workers serve, or never will."""
        self._tell_systemd("READY=1")
        if not succeeded:
            return
        self._settings = settings
        self._logs.configure(settings.logging)
        self._dispatcher.configure(settings.server, settings.pools_of_listeners())
        if self._intake is not None:
            self._intake.configure(settings.server)

    # Upgrade.

    def _start_upgrade(self) -> None:
        why = ""
        if os.getpid() == 1:
            why = "this master is PID 1, with which the container ends; start another container instead"
        elif self._stage is not Stage.RUNNING:
            why = "this master is about to go"
        elif self._upgrade.under_way:
            why = "one is under way"
        elif self._heritage is not None and self._heritage.old_fd >= 0:
            why = "the master of the last one still drains"
        elif not self._reported:
            why = "this master is not ready itself"
        if why:
            self._log.error("USR2: no upgrade now: %s", why)
            return
        self._log.info("USR2: upgrading; %d streams", self._ledger.count)
        try:
            self._upgrade.start(self._listeners, self._metrics_listener, self._metrics_dir, self._side)
        except OSError as error:
            self._upgrade_failed(f"cannot start a new master: {error.strerror}")

    def _upgrade_failed(self, why: str) -> None:
        if self._stage is Stage.RUNNING:
            self._log.error("the upgrade failed: %s; going on as before", why)
        else:
            self._log.info("the upgrade was called off: %s", why)

    def _hand_over(self, pid: int, given_up: list[str]) -> None:
        """The new master is ready: it has all that is new, we finish what is old, and the listeners it gave up."""
        if self._stage is not Stage.RUNNING:
            return
        timeout = self._settings.server.drain_timeout_secs
        self._log.info(
            "upgrade: the new master (pid %d) is ready; finishing %d streams, for up to %.0f s",
            pid,
            self._ledger.count,
            timeout,
        )
        self._handed_over = True
        for listener in self._listeners:
            listener.shared = listener.lent or listener.path not in given_up
        if self._exposition is not None:
            self._exposition.stop()
            self._exposition = None
        if self._metrics_listener is not None:
            self._metrics_listener.close()
            self._metrics_listener = None
        self._finish(timeout)

    def _report_if_ready(self) -> None:
        """When all workers are ready, tell systemd, and the master that started us, if one did."""
        if not self._supervisor.complete:
            current = self._supervisor.generations.current
            if current.unfit:  # to try again and again would only hide it
                self._log.error("forkd cannot start: no worker can work with this configuration (see above)")
                self._failed = True
                self._finish(0)
            elif self._is_heir and current.deaths >= DEATHS_MAX:
                self._log.error("upgrade: workers of the new master die before they are ready: giving up")
                self._finish(0)
            return
        self._reported = True
        now = time.monotonic()
        self._publish(now)  # or /readyz would deny it until the next tick
        if self._exposition is not None:
            self._exposition.maintain(now)
        state = {"READY": 1, "STATUS": "ready"}
        if self._heritage is not None:
            assert self._intake is not None
            for listener in self._listeners:
                listener.take_over()
            self._intake.begin()
            upgrade.tell_ready(self._heritage, self._given_up)
            state["MAINPID"] = os.getpid()
        self._tell_systemd(state)

    def _tell_systemd(self, state: str | Mapping[str, object]) -> None:
        """Speak for the service, if we are its main process: not before we took over, nor after we handed over."""
        if not self._handed_over and (self._reported or not self._is_heir):
            systemd.notify(state)

    @property
    def _is_heir(self) -> bool:
        """Born by an upgrade. Until such a one has reported ready, all that it has is still the old master's, too."""
        return self._heritage is not None

    def _inherit(self, heritage: Heritage) -> None:
        """The old master is gone, in order or not: tidy up after it."""
        os.close(heritage.old_fd)
        self._heritage = heritage._replace(old_fd=-1)
        if heritage.metrics_dir is not None:
            if self._metrics_dir is None:
                shutil.rmtree(heritage.metrics_dir, ignore_errors=True)
            else:
                upgrade.clear_gauges(heritage.metrics_dir, SIDES[1 - SIDES.index(heritage.side)])
        self._log.info("upgrade: the old master is gone")

    def _stop(self) -> None:
        if self._stage is Stage.STOPPING:
            return
        self._stage = Stage.STOPPING
        self._deadline = time.monotonic() + END_GRACE_SECS
        self._dispatcher.give_up_all("shutdown")
        self._supervisor.stop()
        if self._predecessor_lives():
            assert self._heritage is not None
            self._log.info("telling the master before us (pid %d) to end its streams too", self._heritage.old_pid)
            try:
                os.kill(self._heritage.old_pid, signal.SIGQUIT)  # a TERM would leave it the time of a stop
            except OSError:
                pass

    def _reopen_logs(self) -> None:
        try:
            self._logs.sink.reopen()
        except OSError as error:
            self._log.error("cannot reopen %s: %s", self._logs.sink.path, error.strerror)
        self._supervisor.signal_all(signal.SIGUSR1)
        if self._exposition is not None:
            self._exposition.signal(signal.SIGUSR1)

    def _leave(self) -> int:
        self._reader.cancel()
        self._dispatcher.give_up_all("shutdown")
        self._supervisor.close()
        if self._exposition is not None:
            self._exposition.stop()
        for gauge in ("daemon_active_connections", "daemon_active_streams"):
            self._metrics.gauge(gauge, 0)  # in files that a successor goes on with
        self._dispatcher.count()
        self._metrics.flush()
        fallen_through = self._is_heir and not self._reported
        if self._metrics_dir is not None and not self._handed_over and not fallen_through:
            shutil.rmtree(self._metrics_dir, ignore_errors=True)
        if self._benchmark:
            self._print_summary()
        self._log.info("forkd stopped")
        self._logs.sink.flush()
        return 1 if fallen_through or self._failed else 0

    def _print_summary(self) -> None:
        """The reference's summary, on standard output."""
        started, completed, failed, sent = self._supervisor.totals
        print("=== Benchmark Summary ===")
        print(f"Peak concurrent streams: {self._ledger.peak}")
        print(f"Total started: {started}")
        print(f"Total completed: {completed}")
        print(f"Total failed: {failed}")
        print(f"Total bytes sent: {sent}")
        print("=========================", flush=True)


def _at_end(fd: int) -> bool:
    """Whether a pipe to which nothing is written has lost its writer."""
    poll = select.poll()  # select(2) knows no fd above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
