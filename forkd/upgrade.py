"""A new master from new code, on the same sockets (SIGUSR2).

The promise: no handoff finds nobody listening, and no stream is cut. The old master starts the same command line again
and gives it the listening sockets, their locks and the metrics port. From then on both accept. When every worker of the
new one is ready, it says so; then the old one stops accepting, lets its streams finish, and goes. If the new one ends
before that, or is not ready within READY_SECS, it is killed and the old one carries on as if nothing had been. Only one
upgrade at a time: while the old master still drains, the new one refuses another.

What is passed, by inherited fds named in one environment variable: `Heritage`. Both count in the same metrics
directory, in files of their own (`side`), so that no counter falls; the sides take turns.
"""

import json
import os
import selectors
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from logging import Logger
from typing import Final, NamedTuple

from forkd import process, systemd

VARIABLE: Final = "FORKD_UPGRADE"
READY_SECS: Final = 60.0
SIDES: Final = ("", "b-")
_READY: Final = b"ready"


class Heritage(NamedTuple):
    """What a new master is born with."""

    listeners: dict[str, tuple[int, int]]
    """The socket and its lock, by path."""
    metrics_fd: int
    """The metrics port, or -1."""
    metrics_dir: str | None
    side: str
    """Of the new master."""
    ready_fd: int
    """Where the new master says that it is ready."""
    old_fd: int
    """Reads end of file when the old master is gone."""


def take(environ: MutableMapping[str, str]) -> Heritage | None:
    """What was passed to this process, None if nothing was. The variable is removed. ValueError if it is not whole."""
    written = environ.pop(VARIABLE, None)
    if written is None:
        return None
    try:
        passed = json.loads(written)
        heritage = Heritage(
            {str(path): (int(sock), int(lock)) for path, (sock, lock) in passed["listeners"].items()},
            int(passed["metrics_fd"]),
            passed["metrics_dir"],
            str(passed["side"]),
            int(passed["ready_fd"]),
            int(passed["old_fd"]),
        )
        for sock, lock in heritage.listeners.values():
            if not stat.S_ISSOCK(os.fstat(sock).st_mode) or not stat.S_ISREG(os.fstat(lock).st_mode):
                raise ValueError("an inherited fd is not what it should be")
        for fd in _fds(heritage):
            os.set_inheritable(fd, False)
    except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE} is not set by forkd: {error}") from error
    return heritage


def tell_ready(heritage: Heritage) -> None:
    """The new master is ready. One that has lost its parent meanwhile need not tell."""
    try:
        os.write(heritage.ready_fd, _READY)
    except OSError:
        pass
    os.close(heritage.ready_fd)


def _fds(heritage: Heritage) -> list[int]:
    fds = [fd for pair in heritage.listeners.values() for fd in pair]
    return [fd for fd in (*fds, heritage.metrics_fd, heritage.ready_fd, heritage.old_fd) if fd >= 0]


class Upgrade:
    """One attempt, seen by the old master. `succeeded` or `failed` (with the reason) is called once."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        log: Logger,
        succeeded: Callable[[int], None],
        failed: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._log = log
        self._succeeded = succeeded
        self._failed = failed
        self._ready = -1
        self._alive = -1
        """Closed when this process ends: the new master's `old_fd` then reads end of file."""
        self._deadline = 0.0
        self.pid = 0
        """Of the new master while it is watched, 0 otherwise."""

    @property
    def under_way(self) -> bool:
        """A new master is starting."""
        return self.pid > 0

    def start(
        self,
        listeners: Mapping[str, tuple[socket.socket, int]],
        metrics: socket.socket | None,
        metrics_dir: str | None,
        side: str,
    ) -> None:
        """Start the new master. Raises OSError when that is not possible."""
        ready, ready_theirs = os.pipe2(os.O_CLOEXEC)
        old_theirs, alive = os.pipe2(os.O_CLOEXEC)
        heritage = Heritage(
            {path: (sock.fileno(), lock) for path, (sock, lock) in listeners.items()},
            metrics.fileno() if metrics is not None else -1,
            metrics_dir,
            SIDES[1 - SIDES.index(side)],
            ready_theirs,
            old_theirs,
        )
        environ = {**systemd.for_successor(os.environ), VARIABLE: json.dumps(heritage._asdict())}
        fds = _fds(heritage)
        try:
            for fd in fds:
                os.set_inheritable(fd, True)
            try:
                pid = os.posix_spawn(
                    sys.executable,
                    [sys.executable, *sys.orig_argv[1:]],
                    environ,
                    setsigmask=[],
                    setsigdef=[signal.SIGPIPE, signal.SIGUSR2],
                )
            finally:
                for fd in fds:
                    os.set_inheritable(fd, False)
        except BaseException:
            os.close(ready)
            os.close(alive)
            raise
        finally:
            os.close(ready_theirs)
            os.close(old_theirs)
        self.pid = pid
        self._ready, self._alive = ready, alive
        self._deadline = time.monotonic() + READY_SECS
        self._selector.register(ready, selectors.EVENT_READ, self)
        self._log.info("upgrade: started a new master (pid %d)", pid)

    def on_ready(self, _mask: int) -> None:
        """The new master said that it is ready, or is gone: nobody else has the other end."""
        said = os.read(self._ready, len(_READY))
        self._selector.unregister(self._ready)
        os.close(self._ready)
        pid, self.pid = self.pid, 0
        if said == _READY:
            self._succeeded(pid)
            return
        os.close(self._alive)
        self._kill(pid)
        _, status = os.waitpid(pid, 0)
        self._failed(f"the new master (pid {pid}) {process.how_it_ended(os.waitstatus_to_exitcode(status))}")

    def tick(self, now: float) -> None:
        """Called now and then: give up on one that takes too long. Its end is then seen as any other."""
        if self.pid and now >= self._deadline:
            self._log.error("upgrade: the new master is not ready after %.0f s: ending it", READY_SECS)
            self._deadline = now + READY_SECS
            self._kill(self.pid)

    def cancel(self) -> None:
        """The old master has to stop: so has the new one."""
        if self.pid:
            self._kill(self.pid)

    @staticmethod
    def _kill(pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is its own
        except ProcessLookupError:
            pass
