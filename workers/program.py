"""One running program: its stderr, its end, and how it is made to come to one.

Theory of operation. `launch` starts it, in a thread (see `workers.spawn`). From then on it is a process group, whose
leader is our child. Its pidfd becomes readable when the leader has exited: whatever of the group is left is killed,
because the answer ends with the program; then, and not before, it is waited for. As long as it was not, its number is
nobody else's, so that no signal of ours can hit a stranger. Who has left the group (setsid) has left us.

`end` sends SIGTERM to the group, and SIGKILL after a time. Both are followed by SIGCONT, or a stopped program would
never see the first.

Its stderr is a pipe that we read. The program itself holds a reading end too: if this worker dies it is to go on with
its client, and not to be killed by SIGPIPE for a word to a log that nobody reads any more.
"""

import contextlib
import fcntl
import os
import signal
from selectors import EVENT_READ
from typing import Final, NamedTuple, Protocol

from workers.context import Context
from workers.loop import TICKS_PER_SEC, to_ticks
from workers.spawn import FDS_FROM, Command, spawn
from workers.stderr import Lines

_READ_BYTES: Final = 65536
READS_PER_SEC: Final = 16
"""Of _READ_BYTES each. A program that writes more than that to its stderr waits, and not the streams beside it."""


class Launched(NamedTuple):
    """A program that runs. Its owner owns both fds, and waits for the pid."""

    pid: int
    pidfd: int
    stderr_fd: int


class Unwatched(OSError):
    """The program was started, and killed at once because it could not be watched: there are no fds, or no memory."""


def launch(command: Command, client_fd: int, data_fd: int = -1) -> Launched:
    """Start a program whose stdin and stdout are `client_fd`; `data_fd` becomes its 3. Both stay the caller's.

    Blocks until it is executed. Raises OSError, and then there never was a process, or Unwatched; no fd is left.
    """
    with contextlib.ExitStack() as borrowed:

        def lent(fd: int) -> int:
            high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FDS_FROM)
            borrowed.callback(os.close, high)
            return int(high)

        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            borrowed.callback(os.close, write_end)
            os.set_blocking(read_end, False)
            client = lent(client_fd)
            fds = [client, client, lent(_with_reader(write_end, borrowed))]
            if data_fd >= 0:
                fds.append(lent(data_fd))
            pid = spawn(command, fds)
            try:
                return Launched(pid, os.pidfd_open(pid), read_end)
            except OSError as error:  # no fd left: a program that we could not watch must not be
                kill_group(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Unwatched(error.errno, error.strerror) from error
        except BaseException:
            os.close(read_end)
            raise


def _with_reader(write_end: int, borrowed: contextlib.ExitStack) -> int:
    """The pipe opened for reading too, where there is a /proc to do it by."""
    try:
        fd = os.open(f"/proc/self/fd/{write_end}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return write_end
    borrowed.callback(os.close, fd)
    return fd


def kill_group(pid: int, number: signal.Signals) -> None:
    """Signal all of the group that `pid` leads; it must not have been waited for yet. A group that is gone is fine."""
    try:
        os.killpg(pid, number)
        os.killpg(pid, signal.SIGCONT)
    except (ProcessLookupError, PermissionError):  # the latter where it has become another user (sudo)
        pass


class Owner(Protocol):
    """Who is told."""

    slot: int
    request_id: str

    def program_ended(self, code: int) -> None:
        """It has exited and was waited for: an exit code, or a signal's number below 0. Called once."""

    def crashed(self, error: Exception) -> None: ...


class Program:
    """A program that runs. Owns its fds."""

    __slots__ = ("_context", "_kill_at", "_launched", "_owner", "_stderr")

    def __init__(self, context: Context, owner: Owner, launched: Launched) -> None:
        """Takes `launched` over. Raises Unwatched (too many epoll watches): then the program is dead and all closed."""
        self._context = context
        self._owner: Owner | None = owner
        self._launched = launched
        self._kill_at = float("inf")
        """When the group is sent SIGKILL; once `end` was called."""
        selector = context.loop.selector
        self._stderr = _Stderr(context, owner, launched.stderr_fd)
        try:
            selector.register(launched.pidfd, EVENT_READ, self)
            try:
                self._stderr.watch()
            except OSError:
                selector.unregister(launched.pidfd)
                raise
        except OSError as error:
            os.close(launched.pidfd)
            os.close(launched.stderr_fd)
            kill_group(launched.pid, signal.SIGKILL)
            os.waitpid(launched.pid, 0)
            raise Unwatched(error.errno, error.strerror) from error

    def end(self, patience_secs: float) -> None:
        """Have it end: SIGTERM now, SIGKILL after `patience_secs`. May be called again with less patience."""
        if self._owner is None:
            return
        now = self._context.loop.now
        if self._kill_at == float("inf"):
            kill_group(self._launched.pid, signal.SIGTERM)
        self._kill_at = min(self._kill_at, now + patience_secs)
        self._context.loop.after(int(max(0.0, self._kill_at - now) * TICKS_PER_SEC) + 1, self)

    def tick(self) -> None:
        """Called by the loop."""
        if self._owner is None:
            return
        left = self._kill_at - self._context.loop.now
        if left > 0:  # a loop that was held up counts from when it should have been called, and so comes too soon
            self._context.loop.after(int(left * TICKS_PER_SEC) + 1, self)
        else:
            kill_group(self._launched.pid, signal.SIGKILL)

    def on_ready(self, _mask: int) -> None:
        """The leader has exited."""
        owner = self._owner
        if owner is None:
            return
        context = self._context
        context.words[context.current] = owner.slot + 1
        pid, pidfd, _ = self._launched
        kill_group(pid, signal.SIGKILL)
        self._owner = None
        context.loop.selector.unregister(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        self._stderr.close()
        owner.program_ended(os.waitstatus_to_exitcode(status))

    def crashed(self, error: Exception) -> None:
        """Called by the loop."""
        if self._owner is not None:
            self._owner.crashed(error)
        else:
            self._context.log.error("error after a program's end", exc_info=error)


class _Stderr:
    """The reading end of a program's stderr, and the way into the log."""

    __slots__ = ("_context", "_fd", "_lines", "_owner", "_reads", "_second", "_watched")

    def __init__(self, context: Context, owner: Owner, fd: int) -> None:
        self._context = context
        self._owner = owner
        self._fd = fd
        self._lines = Lines()
        self._second = -1
        self._reads = 0
        self._watched = False

    def watch(self) -> None:
        self._context.loop.selector.register(self._fd, EVENT_READ, self)
        self._watched = True

    def close(self) -> None:
        """The program is dead: read what lies there, and close."""
        self._unwatch()
        for _ in range(READS_PER_SEC):
            if not self._read():
                break
        self._tell(self._lines.close())
        os.close(self._fd)
        self._fd = -1

    def on_ready(self, _mask: int) -> None:
        """Called by the loop."""
        if self._fd < 0:
            return
        context = self._context
        context.words[context.current] = self._owner.slot + 1
        second = int(context.loop.now)
        if second != self._second:
            self._second, self._reads = second, 0
        self._reads += 1
        if not self._read():
            self._unwatch()
        elif self._reads >= READS_PER_SEC:
            self._unwatch()
            context.loop.after(to_ticks(1.0), self)

    def tick(self) -> None:
        """The second is over."""
        if self._fd >= 0 and not self._watched:
            self.watch()

    def crashed(self, error: Exception) -> None:
        """Called by the loop. A log is not worth a stream."""
        self._context.log.error("stream %s: cannot read its program's stderr", self._owner.request_id, exc_info=error)
        self._unwatch()

    def _read(self) -> bool:
        """Take in some; False if nothing will come any more (or, for a program that is dead, nothing is there)."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return self._watched
        if data:
            self._tell(self._lines.feed(data, self._context.loop.now))
        return bool(data)

    def _tell(self, lines: list[str]) -> None:
        for line in lines:
            self._context.log.info("stream %s: program: %s", self._owner.request_id, line)

    def _unwatch(self) -> None:
        if self._watched:
            self._context.loop.selector.unregister(self._fd)
            self._watched = False
