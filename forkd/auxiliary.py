"""A helper process of the master's that is no worker: born with it, started again when it dies, gone when it goes.

Forked as workers are (see `forkd.supervisor`): signals blocked, everything that is not its own closed first, left by
os._exit. It holds the reading end of a pipe, its *lifeline*, and nothing is ever written to it. The master has the
other end, so however the master goes, the lifeline then reads end of file and the helper goes too.

A helper that lived for a while is started again at once; one that dies young backs off, doubling to 30 s, because
nothing that matters waits for it.
"""

import gc
import os
import signal
import time
from collections.abc import Callable, Collection
from selectors import EVENT_READ
from typing import Final

from forkd import process
from forkd.logs import Logs
from forkd.selector import Ready, Selector

BACKOFF_FIRST_SECS: Final = 0.25
BACKOFF_MAX_SECS: Final = 30.0
OLD_ENOUGH_SECS: Final = 10.0
"""Who lived for so long did not die of being started."""

Run = Callable[[int], None]


class Auxiliary:
    """One such process. `run(lifeline)` is called in the child and returns when it may exit; `keep` says which of the
    master's fds it needs."""

    def __init__(
        self, name: str, selector: Selector[Ready], logs: Logs, run: Run, keep: Callable[[], Collection[int]]
    ) -> None:
        self._name = name
        self._selector = selector
        self._logs = logs
        self._log = logs.logger
        self._run = run
        self._keep = keep
        self._pid = 0
        self._pidfd = -1
        self._lifeline = -1
        self._born = 0.0
        self._failures = 0
        self._next_birth = 0.0

    @property
    def pid(self) -> int:
        """Of the process, 0 while there is none."""
        return self._pid

    def maintain(self, now: float) -> None:
        """Start it if it is not there; called each tick."""
        if self._pid or now < self._next_birth:
            return
        try:
            self._spawn(now)
        except OSError as error:
            self._log.error("cannot start the %s process: %s", self._name, error.strerror)
            self._backoff(now)

    def signal(self, number: signal.Signals) -> None:
        """Pass a signal on to it."""
        if self._pid:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:  # dead, and about to be reaped
                pass

    def stop(self) -> None:
        """End it now and reap it: it has nothing to finish."""
        if self._pid:
            self.signal(signal.SIGKILL)
            self._bury()

    def on_ready(self, _mask: int) -> None:
        """It is dead."""
        if not self._pid:  # ended by `stop`, earlier in the same turn
            return
        pid = self._pid
        code = self._bury()
        now = time.monotonic()
        if now - self._born >= OLD_ENOUGH_SECS:
            self._failures = 0
            self._next_birth = now
        else:
            self._backoff(now)
        self._log.error("the %s process (pid %d) %s; starting another", self._name, pid, process.how_it_ended(code))
        self.maintain(now)

    def _spawn(self, now: float) -> None:
        theirs, self._lifeline = os.pipe2(os.O_CLOEXEC)
        before = process.block_signals()
        try:
            pid = os.fork()
            if pid == 0:
                self._child(theirs)
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            process.restore_signals(before)
            os.close(theirs)
        try:
            self._pidfd = os.pidfd_open(pid)
        except BaseException:  # without it nobody would ever reap the child
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(self._lifeline)
            raise
        self._pid = pid
        self._born = now
        self._selector.register(self._pidfd, EVENT_READ, self)
        self._log.debug("%s process started (pid %d)", self._name, pid)

    def _child(self, lifeline: int) -> None:
        """Become the helper. Never returns."""
        code = 1
        try:
            process.close_all_but([lifeline, self._logs.sink.fd, *self._keep()])
            self._logs.rename(self._name)
            gc.freeze()  # a collection would unshare every page that was inherited
            gc.enable()  # nobody here knows better times for it
            self._run(lifeline)
            code = 0
        except BaseException:
            self._log.exception("the %s process broke", self._name)
        finally:
            os._exit(code)

    def _bury(self) -> int:
        """Reap it and give back its fds; returns its exit code."""
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        os.close(self._lifeline)
        return os.waitstatus_to_exitcode(status)

    def _backoff(self, now: float) -> None:
        self._next_birth = now + min(BACKOFF_FIRST_SECS * 2**self._failures, BACKOFF_MAX_SECS)
        self._failures = min(self._failures + 1, 16)
