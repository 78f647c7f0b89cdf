"""A new master from new code, on the same sockets (SIGUSR2).

The promise: no handoff finds nobody listening, and no stream is cut. The old master starts the same command line again
and gives it the listening sockets, their locks and the metrics port. The new one accepts nothing until every worker of
its own is ready; then it does, and says so, and the old one stops accepting, lets its streams finish, and goes. So
whoever fails before that has no client that could be lost with it: if the new one ends, or is not ready within
READY_SECS, it is ended and the old one carries on as if nothing had been. Only one upgrade at a time: while the old
master still drains, the new one refuses another.

What is passed, by inherited fds named in one environment variable: `Heritage`. Both count in the same metrics
directory, in files of their own (`side`), so that no counter falls; the sides take turns.
"""

import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, MutableMapping
from logging import Logger
from selectors import EVENT_READ
from typing import Final, NamedTuple

from forkd import process, systemd
from forkd.listener import Listener
from forkd.selector import Ready, Selector

VARIABLE: Final = "FORKD_UPGRADE"
READY_SECS: Final = 60.0
QUIT_SECS: Final = 10.0
"""What a new master that took too long may take to end its workers."""
SIDES: Final = ("", "b-")
_READY: Final = b"ready"
_MESSAGE_BYTES: Final = 65536


class Heritage(NamedTuple):
    """What a new master is born with."""

    listeners: dict[str, tuple[int, int, bool]]
    """The socket, its lock, and whether it is lent (see `forkd.listener`), by path."""
    metrics_fd: int
    """The metrics port, or -1."""
    metrics_dir: str | None
    side: str
    """Of the new master."""
    ready_fd: int
    """Where the new master says that it is ready."""
    old_fd: int
    """Reads end of file when the old master is gone."""
    old_pid: int


def take(environ: MutableMapping[str, str]) -> Heritage | None:
    """What was passed to this process, None if nothing was. The variable is removed. ValueError if it is not whole."""
    written = environ.pop(VARIABLE, None)
    if written is None:
        return None
    try:
        passed = json.loads(written)
        heritage = Heritage(
            {path: (int(sock), int(lock), bool(lent)) for path, (sock, lock, lent) in passed["listeners"].items()},
            int(passed["metrics_fd"]),
            passed["metrics_dir"],
            passed["side"],
            int(passed["ready_fd"]),
            int(passed["old_fd"]),
            int(passed["old_pid"]),
        )
        if heritage.side not in SIDES or not isinstance(heritage.metrics_dir, str | None):
            raise ValueError("a value is not what it should be")
        for sock, lock, _ in heritage.listeners.values():
            _expect(stat.S_ISSOCK, sock)
            _expect(stat.S_ISREG, lock)
        if heritage.metrics_fd >= 0:
            _expect(stat.S_ISSOCK, heritage.metrics_fd)
        _expect(stat.S_ISFIFO, heritage.ready_fd)
        _expect(stat.S_ISFIFO, heritage.old_fd)
        for fd in _fds(heritage):
            os.set_inheritable(fd, False)
    except (KeyError, TypeError, AttributeError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{VARIABLE} is not set by forkd: {error}") from error
    return heritage


def _expect(is_kind: Callable[[int], bool], fd: int) -> None:
    if not is_kind(os.fstat(fd).st_mode):
        raise ValueError("an inherited fd is not what it should be")


def tell_ready(heritage: Heritage, given_up: Iterable[str]) -> None:
    """The new master is ready, and does not listen on these paths of the old one's any more. One that has lost its
    parent meanwhile need not tell.
    """
    try:
        os.write(heritage.ready_fd, b"\n".join([_READY, *(os.fsencode(path) for path in given_up)]))
    except OSError:
        pass
    os.close(heritage.ready_fd)


def clear_gauges(directory: str, side: str) -> None:
    """The master of that side is gone. If it was killed, it did not say that it has no streams any more."""
    from prometheus_client.mmap_dict import MmapedDict  # noqa: PLC0415 - large, and nobody else here needs it

    file = os.path.join(directory, f"gauge_sum_{side}master.db")
    if not os.path.exists(file):
        return
    values = MmapedDict(file)  # type: ignore[no-untyped-call]
    for key, *_ in list(values.read_all_values()):  # type: ignore[no-untyped-call]
        values.write_value(key, 0.0, 0.0)  # type: ignore[no-untyped-call]
    values.close()  # type: ignore[no-untyped-call]


def _fds(heritage: Heritage) -> list[int]:
    fds = [fd for sock, lock, _ in heritage.listeners.values() for fd in (sock, lock)]
    return [fd for fd in (*fds, heritage.metrics_fd, heritage.ready_fd, heritage.old_fd) if fd >= 0]


class Upgrade:
    """One attempt, seen by the old master. Either `succeeded` (with the pid of the new one and the paths that it does
    not listen on any more) or `failed` (with the reason) is called, once."""

    def __init__(
        self,
        selector: Selector[Ready],
        log: Logger,
        succeeded: Callable[[int, list[str]], None],
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
        self._quit = False
        self.pid = 0
        """Of the new master while it is watched, 0 otherwise."""

    @property
    def under_way(self) -> bool:
        """A new master is starting."""
        return self.pid > 0

    def start(
        self,
        listeners: Iterable[Listener],
        metrics: socket.socket | None,
        metrics_dir: str | None,
        side: str,
    ) -> None:
        """Start the new master. Raises OSError when that is not possible."""
        ready, ready_theirs = os.pipe2(os.O_CLOEXEC)
        old_theirs, alive = os.pipe2(os.O_CLOEXEC)
        heritage = Heritage(
            {each.path: (each.sock.fileno(), each.lock_fd, each.lent) for each in listeners},
            metrics.fileno() if metrics is not None else -1,
            metrics_dir,
            SIDES[1 - SIDES.index(side)],
            ready_theirs,
            old_theirs,
            os.getpid(),
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
        self._quit = False
        self._deadline = time.monotonic() + READY_SECS
        self._selector.register(ready, EVENT_READ, self)
        self._log.info("upgrade: started a new master (pid %d)", pid)

    def on_ready(self, _mask: int) -> None:
        """The new master said that it is ready, or is gone: nobody else has the other end."""
        said, *given_up = os.read(self._ready, _MESSAGE_BYTES).split(b"\n")
        self._selector.unregister(self._ready)
        os.close(self._ready)
        pid, self.pid = self.pid, 0
        if said == _READY:
            self._succeeded(pid, [os.fsdecode(path) for path in given_up])
            return
        os.close(self._alive)
        _signal(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self._failed(f"the new master (pid {pid}) {process.how_it_ended(os.waitstatus_to_exitcode(status))}")

    def tick(self, now: float) -> None:
        """Called now and then: give up on one that takes too long. Its end is then seen as any other."""
        if self.pid and now >= self._deadline:
            self._log.error("upgrade: the new master is not ready after %.0f s: ending it", READY_SECS)
            _signal(self.pid, signal.SIGKILL if self._quit else signal.SIGQUIT)  # by QUIT it ends its workers, too
            self._quit = True
            self._deadline = now + QUIT_SECS

    def cancel(self) -> None:
        """The old master is to stop: so is the new one, in the same way, because it may just have become ready."""
        if self.pid:
            _signal(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """The old master had its time, and so had the new one."""
        if self.pid:
            _signal(self.pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    """Signal a child that is not reaped yet, so that the pid is its own."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
