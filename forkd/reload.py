"""Reading the configuration again while the master goes on.

A file may be large, broken or on a disk that hangs, and none of that is to stop the master or to stay in its memory. So
a child reads it and sends back what came of it; a child that takes longer than TIMEOUT_SECS is killed. Several requests
in a row are one: whoever asks while a child is reading gets another reading after it. Should the master be gone, an
alarm ends the child.

What cannot change while forkd runs keeps its old value (`settle`), and its name is told.
"""

import math
import os
import pickle
import signal
import time
from collections.abc import Callable
from logging import Logger
from selectors import EVENT_READ
from typing import Any, Final

import msgspec

from forkd import process
from forkd.config import ConfigError, Loaded
from forkd.selector import Ready, Selector
from forkd.settings import ListenerSettings, Settings

TIMEOUT_SECS: Final = 30.0
NICENESS: Final = 19
"""Nobody waits for the child, so it is to leave the CPU to those who stream."""

FIXED: Final[dict[str, tuple[str, ...]]] = {
    "server": (
        "socket_path",
        "socket_type",
        "socket_mode",
        "socket_group",
        "allow_users",
        "allow_groups",
        "max_connections",
        "ledger",
        "user",
        "group",
    ),
    "metrics": ("enabled", "listen_addr", "dir"),
    "logging": ("file",),
}
"""What only a restart changes (some of it an upgrade): it belongs to what was opened at the start."""
_FIXED_OF_LISTENERS: Final = (
    "path",
    "socket_type",
    "mode",
    "group",
    "protocol",
    "envelope",
    "allow_users",
    "allow_groups",
)


def settle(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """`new` with what cannot change as it was in `old`, and the keys of which that is true."""
    kept: list[str] = []
    sections: dict[str, Any] = {}
    for section, keys in FIXED.items():
        before, after = getattr(old, section), getattr(new, section)
        changed = {key: getattr(before, key) for key in keys if getattr(before, key) != getattr(after, key)}
        kept += [f"{section}.{key}" for key in changed]
        sections[section] = msgspec.structs.replace(after, **changed)
    if [_fixed(listener) for listener in old.listeners] != [_fixed(listener) for listener in new.listeners]:
        kept.append("listeners")
        sections["listeners"] = old.listeners
        named = {name for listener in old.listeners if (name := listener.named_backend) is not None}
        # Still needed, though the new configuration, which has no such listener, may have no such backend.
        sections["backends"] = {**{name: old.backends[name] for name in named}, **new.backends}
        pools = [name for listener in old.listeners if (name := listener.pool) is not None]
        sections["pools"] = {name: new.pools.get(name, old.pools[name]) for name in pools}
    return msgspec.structs.replace(new, **sections), kept


def _fixed(listener: ListenerSettings) -> tuple[object, ...]:
    return tuple(getattr(listener, key) for key in _FIXED_OF_LISTENERS)


class Reader:
    """Reads the configuration in a child. `answer` gets what came of it: settings and warnings, or the faults."""

    def __init__(
        self,
        selector: Selector[Ready],
        log: Logger,
        load: Callable[[], Loaded],
        answer: Callable[[Loaded | list[str]], None],
    ) -> None:
        self._selector = selector
        self._log = log
        self._load = load
        self._answer = answer
        self._pipe = -1
        self._pidfd = -1
        self._started = 0.0
        self._read = bytearray()
        self._again = False
        self.pid = 0
        """Of the child, 0 while there is none."""

    def ask(self) -> None:
        """Read, now or when the present reading is over."""
        if self.pid:
            self._again = True
            return
        try:
            self._start()
        except OSError as error:
            self._answer([f"cannot start a process to read the configuration: {error.strerror}"])

    def tick(self, now: float) -> None:
        """Called now and then: end a child that takes too long."""
        if self.pid and now - self._started >= TIMEOUT_SECS:
            os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the pid is its own

    def cancel(self) -> None:
        """Nobody wants to know any more: end the child and reap it."""
        self._again = False
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._bury()

    def on_ready(self, _mask: int) -> None:
        """The child wrote something, has closed its end, or is dead."""
        if self._pidfd < 0:
            if data := os.read(self._pipe, 65536):
                self._read += data
                return
            # It is about to die, but to wait for that would keep everyone waiting: it has all its memory to give back.
            self._close_pipe()
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except OSError:
                pass
            else:
                self._selector.register(self._pidfd, EVENT_READ, self)
                return
        code = self._bury()
        data, self._read = bytes(self._read), bytearray()
        if code:
            self._answer([f"the process that reads the configuration {process.how_it_ended(code)}"])
        else:
            self._answer(pickle.loads(data))
        if self._again:
            self._again = False
            self.ask()

    def _close_pipe(self) -> None:
        self._selector.unregister(self._pipe)
        os.close(self._pipe)
        self._pipe = -1

    def _bury(self) -> int:
        if self._pipe >= 0:
            self._close_pipe()
        if self._pidfd >= 0:
            self._selector.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _start(self) -> None:
        self._pipe, theirs = os.pipe2(os.O_CLOEXEC)
        before = process.block_signals()
        try:
            pid = os.fork()
            if pid == 0:
                self._child(theirs)
        except BaseException:
            os.close(self._pipe)
            self._pipe = -1
            raise
        finally:
            process.restore_signals(before)
            os.close(theirs)
        self.pid = pid
        self._started = time.monotonic()
        self._selector.register(self._pipe, EVENT_READ, self)

    def _child(self, pipe: int) -> None:
        """Read, tell, go. Never returns."""
        code = 1
        try:
            process.close_all_but([pipe])
            os.nice(NICENESS)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            signal.alarm(math.ceil(2 * TIMEOUT_SECS))
            try:
                outcome: Loaded | list[str] = self._load()
            except ConfigError as error:
                outcome = error.faults
            except Exception as error:  # its text is not told: it may quote anything that was read
                outcome = [f"a bug in forkd keeps it from being read: {type(error).__name__}"]
            with os.fdopen(pipe, "wb") as file:
                file.write(pickle.dumps(outcome))
            code = 0
        finally:
            os._exit(code)
