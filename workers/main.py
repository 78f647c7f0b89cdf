"""A worker's life: boot, take clients in, stream, drain, go.

It hears from the master by the channel alone, tells it what is done at the end of a loop's turn, though only once in a
tick, and shows on the board that it lives. It goes when it was told to (DRAIN, SIGTERM, or the master is gone) and its
last client is closed; STOP ends the clients first. Signals that a terminal sends to the whole group are the master's
business and ignored here.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from selectors import EVENT_READ
from typing import Final

from forkd import channel, handoff, process
from forkd.boot import Boot
from forkd.channel import Down, Up
from forkd.metrics import Metrics
from forkd.settings import COMMON
from workers.attachments import Attachments
from workers.backends import registry
from workers.backends.base import HttpBackend
from workers.context import Context, Timings
from workers.figures import Measure
from workers.handlers.watch import Handlers
from workers.loop import Loop, to_ticks
from workers.offload import Offload
from workers.reception import Reception
from workers.starters import Starters
from workers.upstream.dns import Resolver
from workers.upstream.origin import Origin
from workers.upstream.pool import Pool

MESSAGES_PER_TURN: Final = 64
PAIRS_PER_MESSAGE: Final = 4096
HOUSEKEEPING_TICKS: Final = to_ticks(1.0)
SWEEP_TICKS: Final = to_ticks(60.0)
FDS_AT_ONCE: Final = 65536
"""Half a megabyte in the kernel."""
LAST_SECS: Final = 1.0
"""How long the end waits for the last attachments to be deleted, and the last handlers to be closed: threads do it,
which end with the process.
"""

_ASSIGN: Final = int(Down.ASSIGN)
_END: Final = int(Down.END)
_HANDLED: Final = (signal.SIGTERM, signal.SIGUSR1)
_IGNORED: Final = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGPIPE)


class Worker:
    """One worker process."""

    def __init__(self, boot: Boot, signals: process.Signals) -> None:
        self._boot = boot
        self._channel = boot.channel
        self._signals = signals
        self._loop = Loop()
        words, current = boot.board.row(boot.index).cell_of_current()
        self._row = boot.board.row(boot.index)
        settings = boot.settings
        backends = dict(registry.build(settings))
        metrics = Metrics(boot.metrics_dir, f"{boot.side}worker-{boot.index}")
        names = Offload(self._loop)
        resolver = Resolver(self._loop, names)
        self._context = Context(
            index=boot.index,
            loop=self._loop,
            states=boot.board.states,
            words=words,
            current=current,
            settings=boot.settings,
            timings=Timings.of(boot.settings),
            backends=backends,
            logs=boot.logs,
            log=boot.logs.logger,
            metrics=metrics,
            pools={
                name: Pool(
                    self._loop,
                    boot.logs.logger,
                    metrics,
                    name,
                    backend.settings,
                    Origin(backend.settings, resolver, names),
                )
                for name, backend in backends.items()
                if isinstance(backend, HttpBackend)
            },
            attachments=Attachments(settings.server.data_dir),
            files=Offload(self._loop),
            starters=Starters(self._loop, boot.board.programs, settings),
        )
        if self._context.metrics.fault is not None:
            boot.logs.logger.error("going on without metrics: %s", self._context.metrics.fault)
        self._handlers = Handlers(self._loop, boot.logs.logger, backends)
        self._reception = Reception(self._context, self._handlers)
        self._room = memoryview(bytearray(channel.HEAD_BYTES + channel.MAX_BODY_BYTES))
        self._title = process.Title()
        self._collector = process.Collector()
        self._handlers.begin()
        self._measure = Measure()
        self._returned: list[tuple[int, int]] = []
        self._told_at = 0
        self._telling = False
        """`_tell` is called at the next tick."""
        self._draining = False
        self._replaced = False
        """Another worker was asked for."""
        self._note = ""
        self._hears = True
        self._speaks = True
        selector = self._loop.selector
        selector.register(self._channel.fileno(), EVENT_READ, _Callback(self._on_channel))
        self._loop.hurry(self._channel.fileno())
        selector.register(signals.wakeup_fd, EVENT_READ, _Callback(self._on_signal))

    def run(self) -> None:
        """Live. Returns when it is time to exit."""
        context = self._context
        loop = self._loop
        row = self._row
        words, current = context.words, context.current
        beat = 0
        self._housekeeping()  # first: whoever hears that it is ready finds it in ps
        self._say(Up.READY)
        settings, sink = context.settings, context.logs.sink
        for name in {settings.default_backend, *(listener.backend for listener in settings.all_listeners())}:
            if name in context.pools:
                context.pools[name].prepare()
        self._sweep()
        while not self._draining or context.streams or context.finished or self._returned:
            loop.turn()
            words[current] = 0
            beat += 1
            row.store_beat(beat)
            if context.finished or self._returned:
                if self._told_at != loop.at or self._returned:
                    self._tell()
                else:  # a thousand times a second it would cost more than what is told; the clients have their end
                    self._tell_soon()
            sink.flush()
        given_up_at = loop.now + LAST_SECS
        while (context.files.pending or self._handlers.unfinished) and loop.now < given_up_at:
            loop.turn()
        self._store_totals()
        context.metrics.flush()

    def _store_totals(self) -> None:
        context = self._context
        self._row.store_totals(context.started, context.completed, context.failed, context.sent_bytes)

    def _on_channel(self) -> None:
        """Take in what the master sent, a bounded number of messages, so that streams get their turn too."""
        for _ in range(MESSAGES_PER_TURN):
            try:
                message = handoff.receive(self._channel, self._room)
            except BlockingIOError:
                return
            except ConnectionResetError:  # said once of a master that died with messages unread; its own come behind
                continue
            except OSError:
                message = None
            if message is None:  # the master is gone, or has no more to say
                self._hears = self._speaks = False
                self._loop.selector.unregister(self._channel.fileno())
                self._loop.hurry_no_more(self._channel.fileno())
                self._drain()
                return
            self._obey(message)
            if not handoff.more_waits(self._channel):
                return

    def _obey(self, message: handoff.Message) -> None:
        head, body = channel.parse_down(message.payload)
        if head.kind in (_ASSIGN, _END):
            if message.fds_truncated or not message.fds:
                for fd in message.fds:
                    os.close(fd)
                self._returned.append((head.slot, head.attempt))
            elif head.kind == _ASSIGN:
                self._reception.assign(head, body, message.fds)
            else:
                self._reception.end(head, body, message.fds)
            self._context.words[self._context.current] = 0
        elif head.kind == Down.DRAIN:
            self._drain()
        elif head.kind == Down.STOP:
            self._drain()
            for stream in list(self._context.streams):
                stream.fail("shutdown")

    def _on_signal(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGUSR1:
                self._reopen_logs()
            elif not self._draining:
                self._ask_to_go()

    def _reopen_logs(self) -> None:
        sink = self._context.logs.sink
        try:
            sink.reopen()
        except OSError as error:
            self._context.log.error("cannot reopen %s: %s", sink.path, error.strerror)

    def _ask_to_go(self) -> None:
        """The master is to send nothing more, then DRAIN."""
        if not self._say(Up.DRAINING):
            self._loop.after(1, _Callback(self._ask_to_go))

    def _drain(self) -> None:
        """Take no more; `run` ends with the last stream."""
        self._draining = True

    def _say(self, kind: Up, pairs: list[tuple[int, int]] | None = None) -> bool:
        """Tell the master; False when the channel is full. A master that is gone need not be told."""
        if not self._speaks:
            return True
        try:
            self._channel.send(channel.pack_up(kind, pairs or ()), channel.SEND_FLAGS)
        except BlockingIOError:
            return False
        except OSError:
            self._speaks = False
        return True

    def _tell(self) -> None:
        self._told_at = self._loop.at
        self._report()

    def _tell_soon(self) -> None:
        if not self._telling:
            self._telling = True
            self._loop.after(1, _Callback(self._tell_now))

    def _tell_now(self) -> None:
        self._telling = False
        self._tell()

    def _report(self) -> None:
        """Tell the master which slots are free: one message, or a few after a storm; what does not go waits a tick."""
        for kind, pairs in ((Up.FINISHED, self._context.finished), (Up.RETURNED, self._returned)):
            while pairs:
                if not self._say(kind, pairs[:PAIRS_PER_MESSAGE]):
                    self._tell_soon()
                    return
                del pairs[:PAIRS_PER_MESSAGE]

    def _housekeeping(self) -> None:
        """Once a second: what need not be exact."""
        context = self._context
        live = len(context.streams)
        self._collector.tidy(self._loop.now, idle=not live)
        self._row.store_streams(live)
        self._store_totals()
        self._look_after_handlers()
        self._row.store_figures(self._measure.take(context.started, context.streams, self._handlers.stuck))
        context.logs.tell_repeats()
        dropped = context.logs.sink.take_dropped()
        if dropped:
            context.metrics.count("forkd_log_lines_dropped_total", amount=dropped)
        context.metrics.flush()
        boot = self._boot
        pool = f" ({boot.pool})" if boot.pool != COMMON else ""
        state = " draining" if self._draining else ""
        self._title.show(
            f"forkd: worker {boot.index}{pool} [gen {boot.generation}]{state} streams={live}", self._loop.now
        )
        self._loop.after(HOUSEKEEPING_TICKS, _Callback(self._housekeeping))

    def _look_after_handlers(self) -> None:
        handlers = self._handlers
        handlers.look()
        if (note := handlers.note()) != self._note:
            self._row.store_note(note)
            self._note = note
        if handlers.exhausted and not self._replaced and not self._draining:
            self._replaced = True
            self._context.log.error("too many handlers are stuck: asking to be replaced by another worker")
            self._ask_to_go()

    def _sweep(self) -> None:
        """Attachments that no stream came for, or whose worker died."""
        context = self._context
        server = context.settings.server
        if server.data_dir is not None and server.attachments_max_age_secs:
            max_age = server.attachments_max_age_secs
            context.files.run(lambda: context.attachments.sweep(max_age), self._swept)

    def _swept(self, outcome: int | Exception) -> None:
        log = self._context.log
        if isinstance(outcome, Exception):
            log.warning("old attachments could not be swept: %s", outcome)
        elif outcome:
            log.info("%d old attachments deleted", outcome)
        self._loop.after(SWEEP_TICKS, _Callback(self._sweep))


class _Callback:
    """A callback of the worker itself. One that crashes is a bug that no single stream can pay for."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_ready(self, _mask: int) -> None:
        self._function()

    def tick(self) -> None:
        self._function()

    def crashed(self, error: Exception) -> None:
        raise error


def run(boot: Boot) -> None:
    """The child's main function: everything between the fork and the exit. The master's fds are closed already.

    Raises Unfit.
    """
    # A client and a connection to its API for each stream; what is beyond FDS_AT_ONCE is made room for when it comes.
    process.make_room_for_fds(min(2 * boot.settings.server.max_connections, FDS_AT_ONCE))
    signals = process.Signals(_HANDLED, _IGNORED)
    faulthandler.enable(file=boot.logs.sink.fd, all_threads=True)
    boot.logs.rename(f"worker {boot.index}")
    process.restore_signals(set())
    started = time.monotonic()
    worker = Worker(boot, signals)
    boot.logs.logger.debug("ready after %.0f ms", (time.monotonic() - started) * 1000)
    worker.run()
