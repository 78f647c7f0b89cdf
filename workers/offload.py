"""Blocking calls beside the loop: a function runs in a thread, and its result comes back on the loop's own turn.

For what has no non-blocking form: getaddrinfo(3), and reading files. Never for a stream's life.

Theory of operation. `run` puts a job into a queue; a thread takes it out, calls the function, puts the outcome into a
list and counts up an eventfd that the loop watches. The loop's side reads the eventfd *first* and looks at the list
*then*: whatever is put into it after that look is followed by a count of its own, so no outcome is left lying, and many
that have gathered are given back in one wake-up.

Threads are started one at a time, when there is more to do than threads to do it, and never before the first `run`: a
worker comes from a fork, and most need none. They are daemons, since nothing can end a lookup that hangs and it must
not keep a worker from exiting. Signals are blocked in them, so that those meant for the loop reach the loop.

A function that hangs holds its thread until it returns, and when it holds the last one, all that is queued waits. So
what can hang and what must not wait have an `Offload` each: one for DNS, one for files.

A thread that computes shares the GIL with the loop: a single C call over 20 MB stalls every stream meanwhile. Functions
given to `run` work in small pieces, or release the GIL.
"""

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from selectors import EVENT_READ
from typing import Any, Final, NamedTuple, TypeVar

from workers.loop import Loop

T = TypeVar("T")

THREADS: Final = 4
_BLOCKED: Final = signal.valid_signals() - {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""All but those that a thread brings upon itself: blocked, they would kill without faulthandler's word on where."""


class _Job(NamedTuple):
    function: Callable[[], Any]
    done: Callable[[Any], None]
    crashed: Callable[[Exception], None]


class Offload:
    """A few threads of one loop. All methods are for the loop's thread."""

    def __init__(self, loop: Loop, threads: int = THREADS) -> None:
        self._loop = loop
        self._most = threads
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._outcomes: deque[tuple[_Job, Any]] = deque()
        self._pending = 0
        """Jobs whose outcome has not been given back."""
        self._closed = False
        self._wakeup_fd = -1
        self._wakeup_lock = threading.Lock()
        """Held around the eventfd's use in a thread, and its end in `close`: by then the number may be another's."""

    def run(
        self,
        function: Callable[[], T],
        done: Callable[[T | Exception], None],
        crashed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Call `function` in a thread, and `done` with what it returned or raised in a later turn of the loop.

        `function` must touch nothing that the loop's thread changes. An exception that leaves `done` is a bug: it is
        given to `crashed`, or logged, and the others' outcomes are given back all the same. Functions start in the
        order of the calls; outcomes come as they come. Nothing is ever cancelled: `done` of one who no longer cares
        returns at once. Raises OSError if the first call finds no fd, or no epoll watch, to be had.
        """
        assert not self._closed, "run after close"
        if self._wakeup_fd < 0:
            self._wakeup_fd = self._watched()
        job = _Job(function, done, crashed or _log)
        self._pending += 1
        if self._pending > len(self._threads) < self._most:
            try:
                self._start_thread()
            except RuntimeError as error:  # the limit on processes (pids.max, RLIMIT_NPROC): make do with what there is
                if not self._threads:
                    self._finish(job, error)
                    return
        self._jobs.put(job)

    @property
    def pending(self) -> int:
        """Calls whose outcome has not been given back."""
        return self._pending

    def close(self) -> None:
        """Give nothing back any more, and let each thread end with what it is at. Waits for none of them."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        if self._wakeup_fd >= 0:
            self._loop.selector.unregister(self._wakeup_fd)
            with self._wakeup_lock:
                os.close(self._wakeup_fd)
                self._wakeup_fd = -1
        self._outcomes.clear()

    def on_ready(self, _mask: int) -> None:
        """Some outcomes are there. Those that come meanwhile wait for the next turn: streams want theirs too."""
        if self._closed:
            return
        os.eventfd_read(self._wakeup_fd)
        for _ in range(len(self._outcomes)):
            if not self._outcomes:  # `close` was called by one of them
                return
            job, outcome = self._outcomes.popleft()
            self._pending -= 1
            try:
                job.done(outcome)
            except Exception as error:
                try:
                    job.crashed(error)
                except Exception as another:
                    _log(another)

    def crashed(self, error: Exception) -> None:
        """Outcomes that `on_ready` left lying when it raised are given back with the next one that comes."""
        _log(error)

    def _watched(self) -> int:
        """A new eventfd in the selector. Raises OSError, and then nothing is left: the next `run` tries again."""
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._loop.selector.register(fd, EVENT_READ, self)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _start_thread(self) -> None:
        """Start one more. It inherits this thread's signal mask, so there is no instant in which it takes a signal."""
        thread = threading.Thread(target=self._live, name="offload", daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._threads.append(thread)

    def _live(self) -> None:
        """A thread's life."""
        while (job := self._jobs.get()) is not None and not self._closed:
            self._finish(job, _outcome(job.function))
            del job  # or it would keep all that its functions refer to until the next one comes

    def _finish(self, job: _Job, outcome: Any) -> None:
        self._outcomes.append((job, outcome))
        with self._wakeup_lock:
            if self._wakeup_fd >= 0:
                os.eventfd_write(self._wakeup_fd, 1)


def _outcome(function: Callable[[], Any]) -> Any:
    """What it returns or raises. A function of its own, so that no exception ends up in a cycle with its frame."""
    try:
        return function()
    except Exception as error:
        return error
    except BaseException as error:  # such as SystemExit, which would end the thread and tell nobody
        return RuntimeError(f"{type(error).__name__} in a thread")


def _log(error: Exception) -> None:
    logging.getLogger("forkd").error("error after a call beside the loop", exc_info=error)
