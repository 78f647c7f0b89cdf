"""Start a program without copying this process and without holding up its other threads: posix_spawn(3).

A worker may have much memory and thousands of fds. fork(2) would copy the page tables of the one; posix_spawn shares
the memory (CLONE_VM | CLONE_VFORK) and suspends the thread that called it until the program is executed, which takes a
millisecond, or as long as it takes a busy machine to let the child run. So it is for a thread beside the loop.

Python's own os.posix_spawn keeps the GIL all that time, and cannot change the directory; a function called by ctypes
gives the GIL back. Hence this file.

A program gets the fds that are given to it, as 0, 1, 2 and so on, and no other: all of ours are close-on-exec. It is
the leader of a session of its own, without a terminal, and every signal is as a program expects it, SIGPIPE too.
"""

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

FDS_FROM: Final = 10
"""The lowest number that a fd for a program may have here, so that none is in the way of another's place there."""
_FLAGS: Final = 0x04 | 0x08 | 0x80  # POSIX_SPAWN_SETSIGDEF, _SETSIGMASK, _SETSID: spawn.h, of glibc and of musl
_ROOM: Final = 1024
"""More than posix_spawn_file_actions_t, posix_spawnattr_t or sigset_t have in any C library."""

_c = ctypes.CDLL(None)


class Command(NamedTuple):
    """What is to be started: a file, its arguments (the first is its name), its whole environment, and where (None:
    in our own directory).
    """

    file: str
    arguments: Sequence[str]
    environment: Mapping[str, bytes]
    directory: str | None


def spawn(command: Command, fds: Sequence[int]) -> int:
    """Start a program; returns its pid.

    `fds[n]`, which stays the caller's and is not below FDS_FROM, becomes n in it. Raises OSError if it could not be
    executed; then there is no process. A file that is no binary and names no interpreter is run by /bin/sh, as
    execvp(3) does.
    """
    assert min(fds) >= FDS_FROM
    file, arguments, environment, directory = command
    actions, attributes, signals = (ctypes.create_string_buffer(_ROOM) for _ in range(3))
    _call(_c.posix_spawn_file_actions_init, actions)
    try:
        if directory is not None:
            _call(_c.posix_spawn_file_actions_addchdir_np, actions, os.fsencode(directory))
        for number, fd in enumerate(fds):
            _call(_c.posix_spawn_file_actions_adddup2, actions, fd, number)
        _call(_c.posix_spawnattr_init, attributes)
        try:
            _c.sigemptyset(signals)
            _call(_c.posix_spawnattr_setsigmask, attributes, signals)
            _c.sigfillset(signals)
            _call(_c.posix_spawnattr_setsigdefault, attributes, signals)
            _call(_c.posix_spawnattr_setflags, attributes, ctypes.c_short(_FLAGS))
            words = [os.fsencode(argument) for argument in arguments]
            variables = _strings([os.fsencode(name) + b"=" + value for name, value in environment.items()])
            pid = ctypes.c_int()
            own = (ctypes.byref(pid), os.fsencode(file), actions, attributes, _strings(words), variables)
            try:
                _call(_c.posix_spawn, *own)
            except OSError as error:
                if error.errno != errno.ENOEXEC:
                    raise
                script = _strings([b"/bin/sh", os.fsencode(file), *words[1:]])
                _call(_c.posix_spawn, own[0], b"/bin/sh", actions, attributes, script, variables)
            return pid.value
        finally:
            _c.posix_spawnattr_destroy(attributes)
    finally:
        _c.posix_spawn_file_actions_destroy(actions)


def _strings(words: Sequence[bytes]) -> "ctypes.Array[ctypes.c_char_p]":
    return (ctypes.c_char_p * (len(words) + 1))(*words, None)


def _call(function: Any, *arguments: Any) -> None:
    """These functions return an error's number instead of setting errno."""
    number = function(*arguments)
    if number:
        raise OSError(number, os.strerror(number))
