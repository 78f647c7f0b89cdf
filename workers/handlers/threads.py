"""Plain generators, each in a thread of its own from its first line to its last.

The loop decides who runs: it counts the threads that are taken, starts one when there is more to do than there are, and
lets streams wait in a queue of its own meanwhile. So what waits has not begun, and can still be given to another
worker, and a client that goes while it waits costs no thread.

A thread whose handler is stuck cannot be ended, only be done without: another is started in its place. Threads are
daemons, so that none of them keeps a worker from exiting. Signals are not blocked in them: whoever starts a program
there would pass that on to it. The loop hears of signals by its wakeup fd, whichever thread the kernel chose.
"""

import threading
from collections.abc import Generator
from queue import SimpleQueue

from forkd.handler import Handoff
from workers.backends.handler import HandlerBackend
from workers.handlers.mailbox import Mailbox
from workers.handlers.run import BadYield, Run
from workers.handlers.source import HandlerSource


class ThreadRun(Run):
    """A run in a thread."""

    __slots__ = ("condition",)

    condition: threading.Condition | None
    """Made at the first wait, which most never come to, and then the same for good: the loop may be about to use it."""

    def wait(self) -> None:
        """Wait while the handler is held; in the handler's thread."""
        condition = self.condition
        if condition is None:
            condition = self.condition = threading.Condition(threading.Lock())
        with condition:
            self.waits = True
            while self.held:
                condition.wait()
            self.waits = False

    def wake(self) -> None:
        """Called by the loop's thread, if it `waits`."""
        condition = self.condition
        assert condition is not None
        with condition:
            condition.notify()

    def live(self) -> None:
        """Run the handler to its end; in a thread."""
        failure: BaseException | None = None
        generator: object = None
        try:
            if not self.cancelled:
                generator = self.function(self.handoff)
                if not isinstance(generator, Generator):
                    raise BadYield(f"it returned {type(generator).__name__} instead of a generator")
                for value in generator:
                    if self.cancelled:
                        break
                    self.give(value)
                    if self.held:
                        self.wait()
                    if self.cancelled:
                        break
        except BaseException as error:  # SystemExit too, which would end the thread and tell nobody
            failure = error
        if isinstance(generator, Generator):
            try:
                generator.close()
            except BaseException as error:
                failure = failure or error
        self.end(failure)


class Threads:
    """The threads of one backend: `most` at once, and `queue_size` streams that wait for one."""

    def __init__(self, name: str, most: int, queue_size: int) -> None:
        self._name = name
        self._most = most
        self._queue_size = queue_size
        self._jobs: SimpleQueue[ThreadRun | None] = SimpleQueue()
        self._threads = 0
        self._busy = 0
        """Runs that have begun and not ended, stuck ones included."""
        self._stuck = 0
        self._waiting: dict[HandlerSource, None] = {}

    def make(
        self, backend: HandlerBackend, handoff: Handoff, label: str, mailbox: Mailbox, source: HandlerSource
    ) -> Run:
        """See `Runner`, as the others."""
        run = ThreadRun(backend.target.function, handoff, label, mailbox, source)
        run.condition = None
        return run

    def begin(self, source: HandlerSource) -> None:
        if self._busy - self._stuck < self._most:
            self._start(source)
        elif len(self._waiting) < self._queue_size:
            self._waiting[source] = None
        else:
            source.refuse(f"all {self._most} threads are taken and {self._queue_size} streams wait already")

    def withdraw(self, source: HandlerSource) -> None:
        self._waiting.pop(source, None)

    def wake(self, run: Run) -> None:
        assert isinstance(run, ThreadRun)
        run.wake()

    def cancel(self, run: Run) -> None:
        if run.waits:
            self.wake(run)

    def ended(self, source: HandlerSource, run: Run) -> None:
        self._busy -= 1
        self._stuck -= source.stuck
        if self._threads > self._most + self._stuck:  # the place of one that was stuck is filled
            self._threads -= 1
            self._jobs.put(None)
        self._fill()

    def lose(self, source: HandlerSource) -> None:
        self._stuck += 1
        self._fill()

    @property
    def exhausted(self) -> bool:
        """As many threads are stuck as there should be in all: another worker would do better."""
        return self._stuck >= self._most

    def close(self) -> None:
        """End every thread that is free, the others when they are."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _fill(self) -> None:
        """Let those run that have waited longest."""
        while self._waiting and self._busy - self._stuck < self._most:
            source = next(iter(self._waiting))
            del self._waiting[source]
            self._start(source)

    def _start(self, source: HandlerSource) -> None:
        run = source.run
        assert isinstance(run, ThreadRun)
        if self._busy >= self._threads:
            try:
                threading.Thread(target=self._live, name=f"handler {self._name}", daemon=True).start()
            except RuntimeError as error:  # the limit on processes (pids.max, RLIMIT_NPROC)
                source.refuse(f"a thread cannot be started: {error}")
                return
            self._threads += 1
        self._busy += 1
        source.begins()
        self._jobs.put(run)

    def _live(self) -> None:
        """A thread's life."""
        while (run := self._jobs.get()) is not None:
            run.live()
            del run  # or it would keep all that its handler refers to until the next one comes
