"""Whether a forkd runs here: found from outside, without disturbing one.

Connecting would make us a sender that says nothing, and trying the lock could get in the way of a daemon that starts
this instant. So the kernel is asked: /proc/net/unix (proc(5)) lists every bound socket by its path, for anybody to
read. Not seen are daemons in another network namespace that share the directory with us.
"""

import os
import re
from typing import Final

_LISTENS: Final = 0x10000
"""__SO_ACCEPTCON of the kernel's linux/net.h: somebody called listen(2)."""
_BOUND = re.compile(rb"\S+ \S+ \S+ (\S+) \S+ \S+ +\d+ (.+)\n").fullmatch


def listens(path: str) -> bool:
    """Whether a Unix socket that was bound to `path`, written the same, is listened on."""
    wanted = os.fsencode(path)
    try:
        with open("/proc/net/unix", "rb") as table:
            for line in table:
                bound = _BOUND(line)
                if bound is not None and bound[2] == wanted and int(bound[1], 16) & _LISTENS:
                    return True
    except OSError:
        pass
    return False


def holder(path: str) -> int | None:
    """The pid of the forkd that listens on `path`, None if it cannot be known: the lock file is for its owner alone."""
    try:
        with open(path + ".lock", "rb") as lock:
            return int(lock.read(32))
    except (OSError, ValueError):
        return None


def described(path: str) -> str:
    """Who listens on `path`: "forkd (pid 4711)", "forkd", "another program"; "" if nobody does."""
    if not listens(path):
        return ""
    pid = holder(path)
    if pid is not None:
        return f"forkd (pid {pid})"
    return "forkd" if os.path.lexists(path + ".lock") else "another program"
