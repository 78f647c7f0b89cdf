"""`forkd fdrecv SOCKET COMMAND…`: a daemon whose every answer is a program's, and no configuration but that line.

A drop-in for the C tool of this name. What it is made of is the `exec` backend; here its arguments become settings, and
`forkd.cli` runs them like any others.
"""

import argparse
import grp
import os
from collections.abc import Mapping, Sequence
from typing import Final

from forkd import config, programs
from forkd.settings import ExecBackend

MAX_PROCESSES: Final = 1000
WEB_SERVERS_GROUPS: Final = ("www-data", "apache", "http")
"""Of Debian, Red Hat, Arch."""
_NAME: Final = "fdrecv"
_ARGUMENTS: Final = {
    "server.socket_path": "SOCKET",
    "server.socket_mode": "--mode",
    "server.socket_group": "--group",
    "server.user": "--user",
    "workers.count": "--workers",
    f"backends.{_NAME}.command": "COMMAND",
    f"backends.{_NAME}.max_processes": "--max-processes",
    f"backends.{_NAME}.timeout_secs": "--timeout",
    f"backends.{_NAME}.pass_environment": "--pass",
}
"""What the user calls the settings that come from the command line."""

_EPILOG: Final = """\
COMMAND is started for each client, with the client's socket as its stdin and stdout and the data in HANDOFF_DATA. It
writes a whole HTTP response; its stderr goes to the log, which is standard error. Options come before SOCKET.

No configuration is read, and no environment. docs/exec.md tells what a program gets, and has examples.

examples:
  forkd fdrecv /run/streaming-daemon.sock ./handler.sh
  forkd fdrecv /run/streaming-daemon.sock php handler.php
  forkd fdrecv --pass OPENAI_API_KEY /run/streaming-daemon.sock python3 handler.py
"""


class CommandFault(Exception):
    """The command cannot be run; the message is for the user."""


class Options:
    """The command line, understood. Leaves by SystemExit if it cannot be."""

    def __init__(self, argv: Sequence[str]) -> None:
        given = _parser().parse_args(argv)
        self.socket: str = given.socket
        self._overrides: dict[str, object] = {
            "server.socket_path": given.socket,
            "server.socket_mode": given.mode,
            "server.socket_group": given.group,
            "server.user": given.user,
            "server.max_stream_duration_secs": 0,
            "workers.count": given.workers,
            "metrics.enabled": False,
            "logging.level": "debug" if given.debug else None,
            "default_backend": _NAME,
            f"backends.{_NAME}.provider": "exec",
            f"backends.{_NAME}.command": given.command,
            f"backends.{_NAME}.max_processes": given.max_processes,
            f"backends.{_NAME}.timeout_secs": given.timeout,
            f"backends.{_NAME}.pass_environment": given.passed,
        }
        if given.mode is None and given.group is None:
            self._overrides |= _for_the_web_server()

    def load(self) -> config.Loaded:
        """The settings. Raises ConfigError, with faults that name the arguments."""
        try:
            return config.load(None, {}, self._overrides)
        except config.ConfigError as error:
            raise config.ConfigError([_in_its_words(fault) for fault in error.faults]) from None

    def check(self, environ: Mapping[str, str]) -> None:
        """Raise CommandFault if there is no such program: better now than at the first client."""
        backend = self.load().settings.backends[_NAME]
        assert isinstance(backend, ExecBackend)
        fault = programs.fault(backend, environ)
        if fault:
            raise CommandFault(fault)


def _in_its_words(fault: str) -> str:
    """A fault of a setting, told of the argument that it came by.

    >>> _in_its_words('server.socket_mode (command line): expected a file mode, got "rw"')
    '--mode: expected a file mode, got "rw"'
    """
    setting, colon, why = fault.partition(": ")
    argument = _ARGUMENTS.get(setting.removesuffix(" (command line)").partition("[")[0])
    return fault if argument is None else f"{argument}{colon}{why}"


def _for_the_web_server() -> dict[str, object]:
    """The socket's mode and group, so that the web server may hand over: its group alone, where we can give it that."""
    if os.geteuid() == 0:
        for name in WEB_SERVERS_GROUPS:
            try:
                grp.getgrnam(name)
            except KeyError:
                continue
            return {"server.socket_mode": "0660", "server.socket_group": name}
    return {"server.socket_mode": "0666"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forkd fdrecv",
        usage="forkd fdrecv [OPTION…] SOCKET COMMAND [ARGUMENT…]",
        description="Starts a program for each client that is handed over.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="SOCKET", help="the Unix socket to listen on")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the program and its arguments")
    parser.add_argument(
        "--mode",
        metavar="MODE",
        help="the socket's permissions (as root 0660, for the web server's group if there is one; else 0666)",
    )
    parser.add_argument("--group", metavar="GROUP", help="the socket's group (www-data, apache or http, as root)")
    parser.add_argument("--user", metavar="USER", help="become this user once the socket is bound, as root")
    parser.add_argument(
        "--max-processes", metavar="N", default=MAX_PROCESSES, help=f"how many may run at once ({MAX_PROCESSES})"
    )
    parser.add_argument("--timeout", metavar="SECONDS", default=0, help="how long one may run (0: no limit)")
    parser.add_argument(
        "--pass", metavar="NAME", dest="passed", action="append", default=[], help="hand on a variable; repeatable"
    )
    parser.add_argument("-w", "--workers", metavar="N", help="how many workers start them, or auto (auto)")
    parser.add_argument("-d", "--debug", action="store_true", help="log at debug level")
    return parser
