"""What a process does to itself: limits, user, title, signals, and the cleaning after a fork."""

import fcntl
import gc
import grp
import os
import pwd
import resource
import signal
import stat
import time
from collections import deque
from collections.abc import Iterable
from types import FrameType
from typing import Final

import setproctitle

TITLE_INTERVAL_SECS: Final = 1.0
COLLECT_SECS: Final = 60.0


def raise_open_files_limit(wanted: int) -> int:
    """Raise RLIMIT_NOFILE towards `wanted` as far as allowed and return the limit in force (getrlimit(2)).

    Root may raise the hard limit too; others only the soft one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        for limits in ((wanted, max(hard, wanted)), (min(wanted, hard), hard)):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                break
            except (ValueError, OSError):
                continue
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else soft


def make_room_for_fds(count: int) -> None:
    """Have the kernel's table of this process's fds be large enough for `count` of them, as far as the limit allows.

    It grows by doubling, and in a process with threads each time waits until no CPU looks at the old one any more
    (synchronize_rcu in fs/file.c): 10 to 20 ms, in which a loop stands still. So it is grown before there are any.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY:
        count = min(count, limit)
    read_end, write_end = os.pipe()
    try:
        os.close(fcntl.fcntl(read_end, fcntl.F_DUPFD_CLOEXEC, count - 1))
    except OSError:  # nothing is lost but those moments
        pass
    finally:
        os.close(read_end)
        os.close(write_end)


class Collector:
    """Garbage collection at times of our choosing: whenever there is nothing to do, else once in COLLECT_SECS.

    Python's own comes after so many new objects, in the middle of the rush that made them, and goes through all of
    them in vain, since nothing here makes cycles on purpose: tens of milliseconds in which no stream moves.
    """

    def __init__(self) -> None:
        """What is there stays: gc.freeze, so that a collection does not unshare pages after a fork."""
        gc.collect()
        gc.freeze()
        gc.disable()
        self._collected = 0.0
        self._dirty = False

    def tidy(self, now: float, *, idle: bool) -> None:
        """Called about once a second."""
        if not idle:
            self._dirty = True
        if self._dirty and (idle or now - self._collected >= COLLECT_SECS):
            self._dirty = not idle
            self._collected = now
            gc.collect(2 if idle else 0)


def drop_privileges(user: str | int | None, group: str | int | None, own_fds: Iterable[int] = ()) -> None:
    """Become `user` and `group` (names or numbers) for good, with that user's supplementary groups.

    The files behind `own_fds` are given to them first, so that they can be opened again. Does nothing unless started as
    root. Raises OSError for a user or group that does not exist, and if it is not allowed.
    """
    if os.geteuid() != 0 or (user is None and group is None):
        return
    try:
        gid = None if group is None else group if isinstance(group, int) else grp.getgrnam(group).gr_gid
        entry = None if user is None else pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError as error:
        if not isinstance(user, int) or gid is None:
            raise OSError(f"server.user or server.group does not exist, or has no group: {error.args[0]}") from error
        entry = None  # a number without a name, but with a group: containers have such
    uid = user if isinstance(user, int) else entry.pw_uid if entry is not None else -1
    gid = entry.pw_gid if gid is None and entry is not None else gid
    assert gid is not None
    for fd in own_fds:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.fchown(fd, uid, gid)
    if entry is not None:
        os.initgroups(entry.pw_name, gid)
    else:
        os.setgroups([gid])
    os.setgid(gid)
    if uid >= 0:
        os.setuid(uid)


def runs_as(user: str | int) -> bool:
    """Whether this process is that user's (a name or a number)."""
    try:
        return os.geteuid() == (user if isinstance(user, int) else pwd.getpwnam(user).pw_uid)
    except KeyError:
        return False


def own_user() -> str:
    """Whose process this is, by name if it has one."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def forbid_core_dumps() -> None:
    """No core files: prompts and keys are in memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def close_all_but(keep: Iterable[int]) -> None:
    """Close every fd from 3 on that is not in `keep`: after a fork, all that is the master's and not ours.

    Python objects that wrap the closed fds must never be finalised in this process, or they would close whoever got
    the number next. They are not: the child runs inside the frames that hold them and leaves by os._exit.
    """
    low = 3
    for fd in sorted(fd for fd in set(keep) if fd >= low):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 2**31 - 1)


class Title:
    """The process's title in ps(1), set at most once a second however often it changes."""

    def __init__(self) -> None:
        self._shown = ""
        self._due = 0.0

    def show(self, text: str, now: float) -> None:
        """Show `text` unless the last change was under a second ago. `now` is monotonic time in seconds."""
        if now >= self._due and text != self._shown:
            setproctitle.setproctitle(text)
            self._shown = text
            self._due = now + TITLE_INTERVAL_SECS


class Usage:
    """What this process uses of the machine. Asking takes some ten microseconds and no fd that could be missing."""

    def __init__(self) -> None:
        """Made in the process it is about, after the fork: /proc/self is whoever opens it."""
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no /proc
            self._statm = -1

    def rss_bytes(self) -> int:
        """Resident memory, what is shared with others included; 0 where the kernel does not tell (proc(5), statm)."""
        try:
            return int(os.pread(self._statm, 256, 0).split()[1]) * resource.getpagesize()
        except OSError:
            return 0

    @staticmethod
    def cpu_secs() -> float:
        """CPU time since the start of the process, user and system, all threads."""
        return time.process_time()


class Signals:
    """Signals as a queue that wakes a loop: a handler does nothing else.

    `wakeup_fd` becomes readable when one came (signal.set_wakeup_fd: the C handler writes to it even while Python is
    busy). The names come out of `take`, in order. The pipe may overflow in a storm; the queue does not.
    """

    def __init__(self, handled: Iterable[signal.Signals], ignored: Iterable[signal.Signals]) -> None:
        self.wakeup_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._queue: deque[signal.Signals] = deque()
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        for number in handled:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._queue.append(signal.Signals(number))

    @property
    def fds(self) -> tuple[int, int]:
        """Both ends, for those who close everything else."""
        return self.wakeup_fd, self._write_fd

    def take(self) -> list[signal.Signals]:
        """Empty the pipe, then the queue (in this order, so that a signal between the two wakes us again)."""
        try:
            while len(os.read(self.wakeup_fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass
        taken = []
        while self._queue:
            taken.append(self._queue.popleft())
        return taken


def block_signals() -> set[signal.Signals]:
    """Block every signal, for the moment around a fork; returns what was blocked before, for `restore_signals`."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))  # type: ignore[arg-type]


def restore_signals(before: set[signal.Signals]) -> None:
    """Undo `block_signals`."""
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def how_it_ended(code: int) -> str:
    """An exit code (os.waitstatus_to_exitcode) in words."""
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}  # real-time signals have none
        return f"was killed by {names.get(-code, f'signal {-code}')}"
    return f"exited with status {code}"


def set_cloexec(fd: int) -> None:
    """Close `fd` when this process becomes another program."""
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
