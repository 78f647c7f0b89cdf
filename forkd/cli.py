"""The command line: flags and subcommands. Nothing else knows argv.

Exit status: 0 after an orderly stop, 1 when forkd could not start or run, 2 when the command line or the
configuration is wrong.
"""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Final

import forkd
from forkd import compiled, config, process, upgrade
from forkd.listener import ListenError
from forkd.logs import Logs, Sink
from forkd.master import Master
from workers.main import run as run_worker

DESCRIPTION = """\
Takes streaming answers off Apache's hands: receives client sockets that Apache hands over (mod_socket_handoff),
and streams to them from a pool of worker processes.

Without any configuration forkd answers with canned text (the mock backend), which is enough to try the set-up.
"""

EPILOG = """\
subcommands:
  forkd demo               everything in one command, without Apache: a web page on http://127.0.0.1:8080
  forkd check              is the configuration good, what became of it, and do the backends answer?
  forkd status             a live table of the master and its workers
  forkd send JSON          one handoff from the terminal, and its answer as it streams
  forkd fdrecv SOCKET COMMAND…
                           start a program for each client, without any configuration
                           (each has a --help of its own)

signals to the master:
  TERM, INT   stop accepting, let streams finish (server.shutdown_timeout_secs); a second one ends them
  QUIT        end the streams and stop at once
  HUP         read the configuration again: new workers with it, old ones finish their streams
  USR1        reopen the log file
  USR2        upgrade: a new master from the code that is installed now, on the same sockets
  TTIN, TTOU  one worker more, one fewer

examples:
  forkd -c /etc/forkd.yaml
  forkd -s /tmp/forkd.sock -w 2 -d

Flags override the environment (DAEMON_*, OPENAI_*), which overrides the file. Every key is in docs/configuration.md.
"""


SUBCOMMANDS: Final = ("demo", "check", "status", "send")
"""Modules of forkd, whose `main` takes what follows and returns the exit status."""
FDRECV: Final = "fdrecv"
"""One that is the daemon, with settings from its command line."""
_MEANT_AS_SUBCOMMAND: Final = re.compile(r"[a-z]+").fullmatch


def main(argv: Sequence[str] | None = None, why_not_compiled: str = compiled.UNASKED) -> int:
    """Run forkd; returns the exit status. `why_not_compiled`: why it runs on the sources, "" if it does not."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in SUBCOMMANDS:
        subcommand = importlib.import_module(f"forkd.{arguments[0]}")  # the daemon needs none of them
        return int(subcommand.main(arguments[1:]))
    if arguments and arguments[0] == FDRECV:
        return _fdrecv(arguments[1:], why_not_compiled)
    options = _parser(why_not_compiled).parse_args(arguments)
    if options.config and options.positional:
        print("forkd: give the configuration once, by -c or by position", file=sys.stderr)
        return 2
    path = options.config or options.positional
    if options.positional and not os.path.lexists(path) and _MEANT_AS_SUBCOMMAND(path):
        near = difflib.get_close_matches(path, (*SUBCOMMANDS, FDRECV), 1)
        hint = f"; did you mean forkd {near[0]}?" if near else "; forkd -h tells what there is"
        print(f"forkd: {path} is neither a subcommand nor a file{hint}", file=sys.stderr)
        return 2
    overrides: dict[str, object] = {
        "server.socket_path": options.socket,
        "default_backend": options.backend,
        "workers.count": options.workers,
        "logging.level": "debug" if options.debug else None,
        "metrics.enabled": False if options.benchmark else None,
    }

    def load() -> config.Loaded:
        return config.load(path, os.environ, overrides)

    subject = f"the configuration{f' {path}' if path else ''}"
    name = os.path.abspath(path) if path else None
    return _serve(load, subject, name, why_not_compiled, benchmark=options.benchmark)


def _fdrecv(arguments: Sequence[str], why_not_compiled: str) -> int:
    from forkd.fdrecv import CommandFault, Options  # noqa: PLC0415 (the daemon needs none of it)

    options = Options(arguments)
    try:
        options.check(os.environ)
    except CommandFault as error:
        print(f"forkd fdrecv: {error}", file=sys.stderr)
        return 2
    except config.ConfigError:
        pass  # told by who loads it next
    return _serve(options.load, "the command line", None, why_not_compiled)


def _serve(
    load: Callable[[], config.Loaded], subject: str, name: str | None, why_not_compiled: str, *, benchmark: bool = False
) -> int:
    """Be the daemon. `subject` is what `load` reads, in words; `name` what the title says (None: the socket's path)."""
    try:
        heritage = upgrade.take(os.environ)
        settings, warnings = load()
    except config.ConfigError as error:
        print(f"forkd: {subject} is not valid:", file=sys.stderr)
        for fault in error.faults:
            print(f"  {fault}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"forkd: {error}", file=sys.stderr)
        return 1
    own = settings.logging
    try:
        logs = Logs(Sink(own.file), own.level, own.format, access=own.access)
    except OSError as error:
        print(f"forkd: cannot open the log {own.file}: {error.strerror}", file=sys.stderr)
        return 1
    for warning in warnings:
        logs.logger.warning("%s", warning)
    if compiled.is_a_surprise(why_not_compiled):
        logs.logger.warning("running on the sources, which takes more CPU: %s", why_not_compiled)
    process.forbid_core_dumps()
    name = name or settings.server.socket_path
    try:
        master = Master(settings, logs, run_worker, name, load, heritage, benchmark=benchmark)
    except (ListenError, OSError) as error:
        print(f"forkd: {error}", file=sys.stderr)
        if own.file is not None:  # where whoever asked for an upgrade looks
            logs.logger.error("cannot start: %s", error)
            logs.sink.flush()
        return 1
    status = master.run()
    if status and own.file is not None:
        print(f"forkd: it did not work out; the log, {own.file}, says why", file=sys.stderr)
    return status


def _version(why_not_compiled: str) -> str:
    made = f"sources: {why_not_compiled}" if why_not_compiled else "compiled"
    return f"forkd {forkd.__version__} ({made})"


def _parser(why_not_compiled: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forkd", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="the configuration, YAML; without it: defaults")
    parser.add_argument("positional", nargs="?", metavar="FILE", help="the configuration, given without -c")
    parser.add_argument("-s", "--socket", metavar="PATH", help="the Unix socket to listen on (server.socket_path)")
    parser.add_argument("-b", "--backend", metavar="NAME", help="the backend to answer with (default_backend)")
    parser.add_argument("-w", "--workers", metavar="N", help="how many workers, or auto (workers.count)")
    parser.add_argument("-d", "--debug", action="store_true", help="log at debug level")
    parser.add_argument(
        "--benchmark", action="store_true", help="no Prometheus metrics; a summary of all streams at the end"
    )
    parser.add_argument("-V", "--version", action="version", version=_version(why_not_compiled))
    return parser


if __name__ == "__main__":
    sys.exit(main())
