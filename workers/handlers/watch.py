"""All handlers of one worker: who runs them, and what becomes of those that do not end.

A handler whose stream is over should end at its next `yield` or `await`. One that has not after CLOSE_SECS is stuck: it
blocks for ever, or for long. Nothing can end it but the end of its process. So it is counted and named (in the log, on
the board and so in `forkd status`), its place is given to another, and when as many are stuck as there are places, the
worker asks to be replaced.
"""

import gc
import logging
import sys
from typing import TYPE_CHECKING, Any, Final

from workers.backends.base import Backend
from workers.backends.handler import HandlerBackend
from workers.context import Context
from workers.handlers.mailbox import Mailbox
from workers.handlers.source import HandlerSource, Runner
from workers.handlers.threads import Threads
from workers.loop import Loop
from workers.request import Request
from workers.stream import Stream

if TYPE_CHECKING:
    from workers.handlers import tasks

CLOSE_SECS: Final = 3.0
SWITCH_SECS: Final = 0.001
"""For how long a thread that computes keeps the worker's loop waiting each time. Python's own default is 5 ms."""


class Handlers:
    """Made in the worker, after the fork and after the handlers were imported. For the loop's thread."""

    def __init__(self, loop: Loop, log: logging.Logger, backends: dict[str, Backend]) -> None:
        self._log = log
        self._loop = loop
        self._runners: dict[str, Runner] = {}
        self._threads: list[Threads] = []
        self._tasks: tasks.Tasks | None = None
        self._closing: dict[HandlerSource, None] = {}
        self._stuck: dict[HandlerSource, None] = {}
        own = [backend for backend in backends.values() if isinstance(backend, HandlerBackend)]
        self._mailbox = Mailbox(loop) if own else None
        for backend in own:
            assert self._mailbox is not None
            if backend.target.is_async:
                if self._tasks is None:
                    from workers.handlers.tasks import Tasks  # noqa: PLC0415 (asyncio is large, and few need it)

                    self._tasks = Tasks(self._mailbox)
                self._runners[backend.name] = self._tasks
            else:
                threads = Threads(backend.name, backend.settings.threads, backend.settings.queue_size)
                self._threads.append(threads)
                self._runners[backend.name] = threads
        if own:
            sys.setswitchinterval(SWITCH_SECS)
            _Forwarder(self._mailbox, log).install()

    def begin(self) -> None:
        """Called when the rest of the worker is made; its `process.Collector` has turned Python's own off."""
        if self._mailbox is not None:
            gc.enable()  # forkd makes no cycles, and collects at quiet times; nobody knows what others' code does

    def source(self, context: Context, stream: Stream, backend: HandlerBackend, request: Request) -> HandlerSource:
        """What feeds `stream` from the backend's handler."""
        assert self._mailbox is not None
        handoff = backend.handoff(request, stream.request_id)
        runner = self._runners[backend.name]
        return HandlerSource(context, stream, backend, handoff, runner, self._mailbox, self)

    @property
    def unfinished(self) -> bool:
        """Some handlers whose stream is over have not ended, and may yet."""
        return bool(self._closing)

    @property
    def stuck(self) -> int:
        """How many handlers go on though nobody listens."""
        return len(self._stuck)

    @property
    def exhausted(self) -> bool:
        """So much is stuck that another worker would do better."""
        return any(threads.exhausted for threads in self._threads) or (
            self._tasks is not None and self._tasks.exhausted
        )

    def note(self) -> str:
        """Who is stuck, in a line; "" if nobody is."""
        now = self._loop.now
        notes = self._tasks.blocked(now) if self._tasks is not None else []
        for source in self._stuck:
            more = f", and {len(self._stuck) - 1} more" if len(self._stuck) > 1 else ""
            notes.append(f"{source.label} goes on after its end, for {now - source.over_at:.0f} s{more}")
            break
        return "; ".join(notes)

    def look(self) -> None:
        """Called each second, from the start."""
        now = self._loop.now
        self._log.disabled = False  # as logging.config.dictConfig leaves it, in a module or in a handler
        for source in [source for source in self._closing if now - source.over_at >= CLOSE_SECS]:
            del self._closing[source]
            self._stuck[source] = None
            source.stuck = True
            self._log.error(
                "%s: stuck: it has neither yielded nor ended in the %.0f s since its stream was over",
                source.label,
                now - source.over_at,
            )
            source.lose()
        if self._tasks is not None:
            late = len(self._tasks.blocked(now))
            self._tasks.look(now)
            blocked = self._tasks.blocked(now)
            for who in blocked[late:]:
                self._log.error("%s: new streams go to another", who)

    def close(self) -> None:
        """End what can be ended, and hear no more of it."""
        for threads in self._threads:
            threads.close()
        if self._tasks is not None:
            self._tasks.close()
        if self._mailbox is not None:
            self._mailbox.close()

    def closing(self, source: HandlerSource) -> None:
        """Its stream is over, and it was told."""
        self._closing[source] = None

    def closed(self, source: HandlerSource) -> None:
        """It has ended."""
        self._closing.pop(source, None)
        if self._stuck.pop(source, False) is None:
            self._log.info("%s: ended after all", source.label)


class _Forwarder(logging.Handler):
    """Brings what handlers write with `logging` into forkd's log, by the loop: its sink is for one thread.

    It sits at the root of all loggers, where the level is Python's own, WARNING, until somebody sets another.
    """

    def __init__(self, mailbox: Mailbox | None, log: logging.Logger) -> None:
        super().__init__()
        self._mailbox = mailbox
        self._log = log

    def install(self) -> None:
        """In the place of whatever the module that was imported may have put there."""
        logging.getLogger().handlers[:] = [self]

    def emit(self, record: logging.LogRecord) -> None:
        """In any thread. All that takes time, or the sources of a stack, is done here."""
        assert self._mailbox is not None
        try:
            text = f"{record.name}: {self.format(record)}"
            plain = logging.LogRecord("forkd", record.levelno, record.pathname, record.lineno, "%s", (text,), None)
            self._mailbox.put(self, plain)
        except Exception:
            self.handleError(record)

    def take(self, piece: Any) -> None:
        """On the loop's turn."""
        self._log.handle(piece)

    def crashed(self, error: Exception) -> None:
        """Whatever it is, it can be logged no better."""
