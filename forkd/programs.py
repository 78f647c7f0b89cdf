"""What is known of an `exec` backend's program before it runs: where it is, what it finds in its environment, and which
mark its slots have on the board.

Nothing here starts anything. The command line's checks and the workers share it, so that what `forkd check` says of a
command is what a worker will make of it.
"""

import os
import pwd
import re
import shutil
import zlib
from collections.abc import Mapping
from typing import Final

from forkd.settings import ExecBackend, Settings

PREFIX: Final = "HANDOFF_"
"""Of the variables that tell a program what it was handed."""
NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PASSED: Final = re.compile(r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_[A-Z_]+|TZ|TMPDIR", re.ASCII)
"""Of forkd's own environment. Nothing else, or API keys would be there for every program and whatever it starts."""
_MARKS_MAX: Final = 255


def marks(settings: Settings) -> dict[str, int]:
    """The mark on the board of each `exec` backend, by its name. If there are more than marks, the last share theirs.

    It comes from the name, and not from what other backends there are: while a reload lasts, workers of two
    configurations count the same programs. (Names that want the same mark are the exception; the later has the next.)
    """
    found: dict[str, int] = {}
    taken: set[int] = set()
    for name in sorted(name for name, own in settings.backends.items() if isinstance(own, ExecBackend)):
        mark = zlib.crc32(name.encode()) % _MARKS_MAX
        while mark in taken and len(taken) < _MARKS_MAX:
            mark = (mark + 1) % _MARKS_MAX
        taken.add(mark)
        found[name] = mark + 1
    return found


def environment(backend: ExecBackend, environ: Mapping[str, str]) -> dict[str, str]:
    """What every program of this backend has in its environment. `environ` is forkd's own."""
    passed = {name: value for name, value in environ.items() if _PASSED.fullmatch(name)}
    passed.setdefault("PATH", os.defpath)
    try:
        own = pwd.getpwuid(os.geteuid())
    except KeyError:  # a number without a name: containers have such
        own = None
    if own is not None and {passed.get("USER", own.pw_name), passed.get("LOGNAME", own.pw_name)} != {own.pw_name}:
        # Started by root, and its privileges dropped since.
        passed |= {"HOME": own.pw_dir, "USER": own.pw_name, "LOGNAME": own.pw_name}
    passed |= {name: environ[name] for name in backend.pass_environment if name in environ}
    return passed | {name: str(value) for name, value in (backend.environment or {}).items()}


def find(command: str, directory: str | None, path: str) -> str:
    """The absolute path of the file that a command means. One with a slash in it is a path, from `directory` on; any
    other is looked for in `path`, as a shell would, and is given back as it is when it is not there.
    """
    if "/" in command:
        return os.path.abspath(os.path.join(directory or "", command))
    found = shutil.which(command, path=path)
    return command if found is None else os.path.abspath(found)


def fault(backend: ExecBackend, environ: Mapping[str, str]) -> str:
    """What keeps this process from starting the backend's program, in words, or ""."""
    directory = backend.directory
    if directory is not None and not os.path.isdir(directory):
        return f"{directory}: there is no such directory"
    if directory is not None and not os.access(directory, os.X_OK):
        return f"{directory}: may not be entered"
    command = backend.command[0]
    file = find(command, directory, environment(backend, environ)["PATH"])
    if not os.path.exists(file):
        return f"{command}: there is no such program" + ("" if "/" in command else " in PATH")
    if not os.path.isfile(file):
        return f"{file}: is no program but a {'directory' if os.path.isdir(file) else 'special file'}"
    return "" if os.access(file, os.X_OK) else f"{file}: is not executable (chmod +x)"
