"""Feeds a stream from a handler: the loop's side of a run.

A source first waits for its turn (the runner may have no thread free), runs, and ends; its stream may be over before
any of these. A handler whose stream is over is *closing*: it was told, and comes to an end when it next yields or, if
it is async, awaits. What does not within CLOSE_SECS is *stuck*, which `workers.handlers.watch` sees.
"""

from typing import Final, Protocol

from forkd.board import State
from forkd.handler import Handoff
from workers.backends.handler import HandlerBackend
from workers.context import Context
from workers.handlers.mailbox import Mailbox
from workers.handlers.run import AHEAD_MAX, Ended, Run
from workers.stream import Stream

_WAKE_AT: Final = AHEAD_MAX // 2
"""A handler that was ahead goes on when so few of its pieces are left."""
_GIVEN: Final = int(State.GIVEN)
_COMMITTED: Final = int(State.COMMITTED)


class Runner(Protocol):
    """Runs handlers in a certain way. For the loop's thread."""

    def make(
        self, backend: HandlerBackend, handoff: Handoff, label: str, mailbox: Mailbox, source: "HandlerSource"
    ) -> Run:
        """A run, of which nothing has happened yet."""

    def begin(self, source: "HandlerSource") -> None:
        """Run it (`source.begins`), keep it until there is room, or refuse it (`source.refuse`)."""

    def withdraw(self, source: "HandlerSource") -> None:
        """It is over before it began."""

    def wake(self, run: Run) -> None:
        """It waits, and need not any more."""

    def cancel(self, run: Run) -> None:
        """Its stream is over: have it end."""

    def ended(self, source: "HandlerSource", run: Run) -> None:
        """It has."""

    def lose(self, source: "HandlerSource") -> None:
        """It is stuck: do without what it holds, until it has `ended` after all."""


class Watch(Protocol):
    """Who looks after handlers whose stream is over."""

    def closing(self, source: "HandlerSource") -> None: ...
    def closed(self, source: "HandlerSource") -> None: ...


class HandlerSource:
    """The source for handlers. `run` is None when it has ended, `over_at` says since when it should have."""

    __slots__ = (
        "_backend",
        "_context",
        "_heard_at",
        "_runner",
        "_running",
        "_stream",
        "_watch",
        "label",
        "over_at",
        "run",
        "stuck",
    )

    def __init__(
        self,
        context: Context,
        stream: Stream,
        backend: HandlerBackend,
        handoff: Handoff,
        runner: Runner,
        mailbox: Mailbox,
        watch: Watch,
    ) -> None:
        self._context = context
        self._stream: Stream | None = stream
        self._backend = backend
        self._runner = runner
        self._watch = watch
        self._running = False
        self._heard_at = context.loop.now
        self.label = f"{backend.label}, stream {stream.request_id}"
        self.over_at = 0.0
        self.stuck = False
        self.run: Run | None = runner.make(backend, handoff, self.label, mailbox, self)

    # The stream's.

    def start(self) -> None:
        """Have it run, now or when there is room."""
        self._runner.begin(self)

    def pause(self) -> None:
        """The client is slow: the handler waits at its next `yield`."""
        if self.run is not None:
            self.run.paused = True

    def resume(self) -> None:
        """The client has caught up."""
        self._heard_at = self._context.loop.now
        run = self.run
        if run is not None:
            run.paused = False
            if run.waits:
                self._runner.wake(run)

    def cancel(self) -> None:
        """The stream has its outcome: a handler that still runs is to end."""
        self._stream = None
        run = self.run
        if run is None:
            return
        run.cancelled = run.handoff.gone = True
        if not self._running:
            self.run = None
            self._runner.withdraw(self)
            return
        self.over_at = self._context.loop.now
        self._watch.closing(self)
        self._runner.cancel(run)

    def check(self, now: float) -> float:
        """End a stream that waits for a thread, or for a `yield`, for too long."""
        run, stream, settings = self.run, self._stream, self._backend.settings
        if run is None or stream is None or run.paused:
            return float("inf")
        if self._running:
            left = self._heard_at + settings.idle_timeout_secs - now
            if left <= 0:
                self._fail("handler_timeout", f"it has yielded nothing for {now - self._heard_at:.1f} s")
        else:
            left = self._heard_at + settings.queue_timeout_secs - now
            if left <= 0:
                self.refuse(f"no thread was free for {now - self._heard_at:.1f} s")
        return max(left, 0.0)

    # The runner's.

    def begins(self) -> None:
        """It is about to run: what it does to the world must not be done again, whatever happens to this worker."""
        self._running = True
        context = self._context
        self._heard_at = context.loop.now
        if self._stream is not None and context.states[self._stream.slot] == _GIVEN:
            context.states[self._stream.slot] = _COMMITTED

    def lose(self) -> None:
        """It is stuck."""
        self._runner.lose(self)

    def refuse(self, why: str) -> None:
        """There is no room for it."""
        self._fail("handler_busy", why)

    # The mailbox's.

    def take(self, piece: str | bytes | Ended) -> None:
        """What the handler yielded (text, or a whole event), or that it has ended."""
        run, stream = self.run, self._stream
        if run is None:
            return
        if stream is not None:
            context = self._context
            context.words[context.current] = stream.slot + 1
        if isinstance(piece, Ended):
            self._ended(piece)
            return
        run.taken += 1
        if stream is not None:
            self._heard_at = self._context.loop.now
            if isinstance(piece, str):
                stream.text(piece)
            else:
                stream.event(piece)
        if run.waits and not run.paused and run.given - run.taken <= _WAKE_AT:
            self._runner.wake(run)

    def crashed(self, error: Exception) -> None:
        """Called by the mailbox."""
        if self._stream is not None:
            self._stream.crashed(error)
        else:
            self._context.log.error("%s crashed", self.label, exc_info=error)

    def _ended(self, ended: Ended) -> None:
        run, self.run = self.run, None
        assert run is not None
        self._runner.ended(self, run)
        del run.receiver  # which is us: left in a circle, thousands would wait for the garbage collector
        stream = self._stream
        if stream is None:
            self._watch.closed(self)
            if ended.code:
                self._context.log.warning("%s, after its stream was over: %s", self.label, ended.said)
        elif ended.code:
            self._fail(ended.code, ended.said)
        else:
            stream.done()

    def _fail(self, code: str, said: str) -> None:
        stream, context = self._stream, self._context
        if stream is None:
            return
        context.log.error("%s: %s: %s", self.label, code, said)
        context.metrics.count("forkd_backend_errors_total", self._backend.name, code)
        context.metrics.count("daemon_backend_errors_total", self._backend.name)
        stream.fail(code)
