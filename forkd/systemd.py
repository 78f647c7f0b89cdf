"""What systemd and forkd say to each other: notifications out, the watchdog's interval and listening sockets in.

All of it is environment variables and one datagram at a time, and all of it is optional: without the variables nothing
happens, so the callers need not ask whether there is a systemd. Nothing here has state, waits or touches the
environment that it is given.

A service of Type=notify is told of by `notify`, in this order:

    READY=1                       handoffs are served; also the end of a reload
    RELOADING=1, MONOTONIC_USEC=  a reload has begun (`reloading()`); READY=1 must follow, whatever came of it
    MAINPID=pid                   an upgrade: from now on this process is the service. systemd 252 lets a process of
                                  the unit say so (NotifyAccess=all)
    STOPPING=1                    no new handoffs; the streams are being finished
    STATUS=text                   what `systemctl status` shows; at any time
    WATCHDOG=1                    alive; at least twice in each `watchdog_secs`

After an upgrade the watchdog's variables must still hold, and they name the old master's pid: pass the environment on
through `for_successor`. A program that is no part of forkd must not speak for it: give it `for_program`'s.

References: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3), systemd.service(5).
"""

import os
import socket
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""
_FDS_MAX: Final = 1024
"""More sockets than anybody configures: a larger number is a mistake, not a count."""
_LISTEN: Final = frozenset({"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"})
_WATCHDOG: Final = frozenset({"WATCHDOG_USEC", "WATCHDOG_PID"})
_TYPES: Final = {int(socket.SOCK_SEQPACKET): "seqpacket", int(socket.SOCK_STREAM): "stream"}


class Passed(NamedTuple):
    """A listening Unix socket from systemd; the fd is the caller's.

    path: `@` stands for the NUL of an abstract address. type: `seqpacket` or `stream`, as the configuration names them.
    name: the socket unit's FileDescriptorName=, "" if there is none.
    """

    fd: int
    path: str
    type: str
    name: str


def notify(state: str | Mapping[str, object], environ: Mapping[str, str] = os.environ) -> bool:
    """Tell systemd: lines of `KEY=value`, or a mapping of them, as one datagram. Never blocks and never raises.

    Returns whether it went out: False also without a systemd. Only READY=1 matters so much that a False, where
    NOTIFY_SOCKET is set, is worth another try a moment later.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):  # unset, or a vsock: for virtual machines
        return False
    if not isinstance(state, str):
        # A line feed in a value would begin another variable.
        state = "\n".join(f"{key}={str(value).replace(chr(10), ' ')}" for key, value in state.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            to = os.fsencode(address)
            sock.sendto(
                state.encode("utf-8", "replace"),
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
                b"\0" + to[1:] if to.startswith(b"@") else to,
            )
    except (OSError, ValueError):  # nobody there, queue full, no fd left; an address that cannot be one
        return False
    return True


def reloading() -> dict[str, object]:
    """The state that says a reload begins now. systemd 253's Type=notify-reload wants the time, to the microsecond."""
    return {"RELOADING": 1, "MONOTONIC_USEC": time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}


def watchdog_secs(environ: Mapping[str, str], pid: int) -> float | None:
    """How long the process `pid` may be silent before systemd kills the service; None: for ever."""
    if environ.get("WATCHDOG_PID") not in (None, "", str(pid)):
        return None
    usec = environ.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isascii() and usec.isdigit() and int(usec) else None


def listen_fds(environ: Mapping[str, str], pid: int) -> list[Passed]:
    """The listening sockets that systemd opened for the process `pid` (socket activation), in the unit's order.

    Each is made to close at exec. Raises ValueError, every fault in one text, if one of them is not what forkd can
    listen on; then none is to be used.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not count.isascii() or not count.isdigit() or int(count) > _FDS_MAX:
        raise ValueError(f"LISTEN_FDS: expected a number up to {_FDS_MAX}, got {count!r}")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    passed, faults = [], []
    for index, fd in enumerate(range(FIRST_FD, FIRST_FD + int(count))):
        name = names[index] if index < len(names) else ""
        try:
            os.set_inheritable(fd, False)
            passed.append(_examine(fd, name))
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else error
            faults.append(f"fd {fd}{f' ({name})' if name else ''} from systemd: {text}")
    if faults:
        raise ValueError("; ".join(faults))
    return passed


def _examine(fd: int, name: str) -> Passed:
    """Raises OSError or ValueError. The fd stays open in either case."""
    sock = socket.socket(fileno=fd)
    try:
        if sock.family != socket.AF_UNIX:
            raise ValueError("is no Unix socket (ListenSequentialPacket= or ListenStream= takes a path)")
        kind = _TYPES.get(sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE))
        if kind is None:
            raise ValueError("has neither of the types SOCK_SEQPACKET and SOCK_STREAM")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError("does not listen (forkd needs Accept=no)")
        address = sock.getsockname()
    finally:
        sock.detach()
    path = "@" + os.fsdecode(address[1:]) if isinstance(address, bytes) else address
    return Passed(fd, path, kind, name)


def for_successor(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a new master that takes over from this one.

    It reports to the same systemd. WATCHDOG_PID would tell it that it is not watched, and without it, it is; which fds
    it inherits is told in another way than LISTEN_FDS.
    """
    return {key: value for key, value in environ.items() if key not in _LISTEN and key != "WATCHDOG_PID"}


def for_program(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that is no part of forkd: nothing in it lets that speak to systemd in our name."""
    return {key: value for key, value in environ.items() if key not in _LISTEN | _WATCHDOG | {"NOTIFY_SOCKET"}}
