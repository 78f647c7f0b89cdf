"""`forkd check`: whether forkd could run with a configuration, without running it or disturbing one that runs.

It reads the configuration exactly as the daemon does, says what `auto` and the limits came to, looks at every path that
is named, and asks the backends in use (`forkd.probe`). One line each: ok, warning or fault.

Who looks matters. What the daemon opens before it drops its privileges is looked at as whoever runs the check; the rest
in a child that has dropped them likewise.
"""

import argparse
import grp
import os
import pickle
import selectors
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NoReturn

from rich.console import Console
from rich.text import Text

from forkd import config, exposition, lookout, process, programs, strictyaml
from forkd.finding import Finding, Level
from forkd.master import FDS_BASE, FDS_PER_WORKER
from forkd.probe import ANSWER_SECS, probe
from forkd.settings import (
    COMMON,
    ExecBackend,
    HttpBackend,
    ListenerSettings,
    PythonBackend,
    Server,
    Settings,
    default_backends,
    parse_address,
    worker_counts,
)
from forkd.status import Place, Unreachable
from forkd.target import BadTarget
from forkd.target import load as load_target

GOOD: Final = 0
FAULTY: Final = 1
WRONG: Final = 2

_GRACE_SECS: Final = 5.0
"""How much longer than its timeouts a probe may take, before it is given up."""
_SUBJECT_COLUMNS: Final = 16
_STYLES: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.FAULT: "bold red"}

_EPILOG: Final = """\
It reads the file, the environment (DAEMON_*, OPENAI_*) and the keys as the daemon would, so run it as the same user and
in the same environment.

Then it looks at what the configuration names: sockets, log file, directories, the metrics port. As root it looks at
what workers open as server.user would. A forkd that runs is recognised and left alone: check before each reload.

It imports the handlers of python backends, each in a process of its own, as a worker would at its start.

At last it asks each HTTP backend in use whether it is there and takes the key, by a request that costs nothing: the
default backend, those of listeners, and those written in the file. Keys are never printed. A program (exec) is looked
for, and not started.

exit status:
  0  all is well (there may be warnings)
  1  something would not work, or a backend does not answer
  2  the command line or the configuration is wrong

examples:
  forkd check -c /etc/forkd.yaml && systemctl reload forkd
  forkd check --no-probe /etc/forkd.yaml
"""


def main(argv: Sequence[str]) -> int:
    """`forkd check ARGUMENTS`; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.config and options.positional:
        print("forkd check: give the configuration once, by -c or by position", file=sys.stderr)
        return WRONG
    path = options.config or options.positional
    console = Console(highlight=False)
    try:
        return _run(path, console, asks=not options.no_probe)
    except KeyboardInterrupt:
        return FAULTY
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULTY


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forkd check",
        description="Whether forkd could run with a configuration, and whether its backends answer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="the configuration, YAML; without it: defaults")
    parser.add_argument("positional", nargs="?", metavar="FILE", help="the configuration, given without -c")
    parser.add_argument("--no-probe", action="store_true", help="ask no backend")
    return parser


def _run(path: str | None, console: Console, *, asks: bool) -> int:
    try:
        settings, warnings = config.load(path, os.environ)
    except config.ConfigError as error:
        for fault in error.faults:
            _say(console, Finding(Level.FAULT, "configuration", fault))
        console.print(_verdict(len(error.faults), 0))
        return WRONG
    levels = [_say(console, finding) for finding in _findings(path, settings, warnings, asks=asks)]
    faults, cautions = levels.count(Level.FAULT), levels.count(Level.WARNING)
    console.print(_verdict(faults, cautions))
    return FAULTY if faults else GOOD


def _verdict(faults: int, warnings: int) -> str:
    """The last line.

    >>> _verdict(0, 0), _verdict(1, 2)
    ('All is well.', '1 fault, 2 warnings.')
    """
    counts = ((faults, "fault"), (warnings, "warning"))
    told = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count)
    return f"{told or 'All is well'}."


def _say(console: Console, finding: Finding) -> Level:
    level, subject, text = finding
    line = Text.assemble((f"{level.value:<8}", _STYLES[level]), f"{subject:<{_SUBJECT_COLUMNS}} ", text)
    console.print(line, soft_wrap=True)
    return level


def _findings(path: str | None, settings: Settings, warnings: list[str], *, asks: bool) -> Iterator[Finding]:
    yield Finding(Level.OK, "configuration", path or "no file: the defaults and the environment")
    for warning in warnings:
        yield Finding(Level.WARNING, "configuration", warning)
    yield from _measures(settings)
    for listener in settings.all_listeners():
        yield Finding(*_socket(listener))
    yield from _log(settings)
    yield from _metrics(settings)
    yield from _as_user(settings, lambda: [*_files(path, settings), *_handlers(settings)])
    yield from _backends(path, settings, asks=asks)


def _measures(settings: Settings) -> Iterator[Finding]:
    """What the machine made of the configuration."""
    server, counts = settings.server, worker_counts(settings)
    count = sum(counts.values())
    auto = " (auto: one for each CPU there is for us)" if settings.workers.count == "auto" else ""
    yield Finding(Level.OK, "workers", f"{counts.pop(COMMON)}{auto}")
    for pool, own in counts.items():
        paths = ", ".join(listener.path for listener in settings.listeners if listener.pool == pool)
        yield Finding(Level.OK, f"pool {pool}", f"{own} worker{'s' if own > 1 else ''} of its own, for {paths}")
    if os.geteuid() == 0 and server.user is None:
        yield Finding(Level.WARNING, "user", "workers would run as root: name a user in server.user")
    elif os.geteuid() != 0 and server.user is not None and not process.runs_as(server.user):
        text = f"only root can become server.user: forkd would run as {process.own_user()}"
        yield Finding(Level.WARNING, "user", text)
    limit, capacity = _room(server, count)
    if not capacity:
        yield Finding(Level.FAULT, "capacity", f"the limit of open files is {limit}, too low for {count} workers")
        return
    text = f"{capacity:,} streams at once; the limit of open files is {limit:,} here"
    if capacity < server.max_connections:
        text += f", too low for max_connections {server.max_connections:,} (ulimit -n, or LimitNOFILE of a service)"
    short = capacity < server.max_connections != Server().max_connections
    yield Finding(Level.WARNING if short else Level.OK, "capacity", text)


def _room(server: Server, workers: int) -> tuple[int, int]:
    """The limit of open files and the streams it leaves room for, 0 if none: as the master reckons."""
    reserve = FDS_BASE + 3 * FDS_PER_WORKER * workers + server.max_pending_handoffs
    limit = process.raise_open_files_limit(server.max_connections + reserve)
    if limit < FDS_BASE + FDS_PER_WORKER * workers:
        return limit, 0
    if not server.ledger:
        return limit, server.max_connections
    return limit, min(server.max_connections, limit - min(reserve, limit // 2))


def _socket(listener: ListenerSettings) -> tuple[Level, str, str]:
    """Whether it could be listened on. Nobody connects to it, nor takes its lock."""
    path, subject = listener.path, "socket"
    who = lookout.described(path)
    if who.startswith("forkd"):
        return Level.OK, subject, f"{path}: {who} listens on it now"
    if who:
        return Level.FAULT, subject, f"{path}: {who} listens on it"
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return Level.FAULT, subject, f"{path}: exists and is no socket; remove it, or choose another path"
    except FileNotFoundError:
        pass
    except OSError as error:
        return Level.FAULT, subject, f"{path}: {error.strerror}"
    lock = path + ".lock"
    if os.path.lexists(lock) and not os.access(lock, os.R_OK | os.W_OK):
        return Level.FAULT, subject, f"{lock}: belongs to somebody else"
    if fault := _cannot_create(path):
        return Level.FAULT, subject, f"{path}: {fault}"
    if listener.group is not None and not _may_give_to(listener.group):
        return Level.FAULT, subject, f"{path}: cannot be given to the group {listener.group}: you are not in it"
    return Level.OK, subject, f"{path}: free"


def _may_give_to(group: str | int) -> bool:
    gid = group if isinstance(group, int) else grp.getgrnam(group).gr_gid
    return os.geteuid() == 0 or gid in (os.getegid(), *os.getgroups())


def _cannot_create(path: str) -> str:
    """Why no file can be made at `path`, or "". Directories that are missing would be made too."""
    directory = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(directory):
        directory = os.path.dirname(directory)
    if not os.path.isdir(directory):
        return f"{directory} is no directory"
    return "" if os.access(directory, os.W_OK | os.X_OK) else f"you may not write to {directory}"


def _log(settings: Settings) -> Iterator[Finding]:
    file = settings.logging.file
    if file is None:
        yield Finding(Level.OK, "log", "stderr")
    elif os.path.isdir(file):
        yield Finding(Level.FAULT, "log", f"{file}: is a directory")
    elif os.path.exists(file):
        good = os.access(file, os.W_OK)
        yield Finding(Level.OK if good else Level.FAULT, "log", f"{file}{'' if good else ': you may not write to it'}")
    elif not os.path.isdir(os.path.dirname(os.path.abspath(file))):
        yield Finding(Level.FAULT, "log", f"{file}: its directory does not exist")
    else:
        fault = _cannot_create(file)
        yield Finding(Level.FAULT if fault else Level.OK, "log", f"{file}: {fault or 'will be made'}")


def _metrics(settings: Settings) -> Iterator[Finding]:
    own = settings.metrics
    if not own.enabled:
        yield Finding(Level.OK, "metrics", "switched off")
        return
    host, port = parse_address(own.listen_addr)
    if not port:
        yield Finding(Level.OK, "metrics", f"{own.listen_addr}: any free port; the log tells which")
        return
    try:
        status = Place.given(host, port).status()
    except Unreachable:
        try:
            exposition.bind(own.listen_addr).close()
        except OSError as error:
            yield Finding(Level.FAULT, "metrics", f"{own.listen_addr}: {error.strerror}; there would be no metrics")
        else:
            yield Finding(Level.OK, "metrics", f"{own.listen_addr}: free")
    else:
        text = f"{own.listen_addr}: forkd {status.version} (pid {status.pid}) serves them now"
        yield Finding(Level.OK, "metrics", text)


def _as_user(settings: Settings, look: Callable[[], list[Finding]]) -> Iterable[Finding]:
    """What `look` finds, as the user and group that forkd drops to, if it does."""
    server = settings.server
    if os.geteuid() != 0 or (server.user is None and server.group is None):
        return look()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            process.drop_privileges(server.user, server.group)
            found = look()
        except BaseException as error:
            found = [Finding(Level.FAULT, "user", str(error))]
        try:
            with open(write_end, "wb") as answer:
                pickle.dump(found, answer)
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as answer:
        told: list[Finding] = pickle.load(answer)
    os.waitpid(pid, 0)
    return told


def _files(path: str | None, settings: Settings) -> Iterator[Finding]:
    """What workers open, and what a reload opens again."""
    server = settings.server
    if settings.metrics.enabled and settings.metrics.dir is not None:
        own = settings.metrics.dir
        fault = _cannot_create(os.path.join(own, "file"))
        yield Finding(Level.FAULT if fault else Level.OK, "metrics.dir", f"{own}{': ' if fault else ''}{fault}")
    if server.data_dir is not None:
        yield Finding(*_data_dir(server.data_dir))
    for name, backend in settings.backends.items():
        if isinstance(backend, HttpBackend):
            if backend.ca_file is not None and not os.access(backend.ca_file, os.R_OK):
                yield Finding(Level.FAULT, "ca_file", f"{backend.ca_file}: workers may not read it (backends.{name})")
            if backend.api_key_file is not None and not os.access(backend.api_key_file, os.R_OK):
                text = f"{backend.api_key_file}: a reload may not read it (backends.{name}): it is for another user"
                yield Finding(Level.WARNING, "api_key_file", text)
    if path is not None and not os.access(path, os.R_OK):
        yield Finding(Level.WARNING, "configuration", f"{path}: a reload may not read it: it is for another user")


def _data_dir(path: str) -> tuple[Level, str, str]:
    subject = "data_dir"
    if not os.path.isdir(path):
        return Level.FAULT, subject, f"{path}: there is no such directory"
    if not os.access(path, os.R_OK | os.X_OK):
        return Level.FAULT, subject, f"{path}: workers may not read it"
    if not os.access(path, os.W_OK):
        return Level.WARNING, subject, f"{path}: workers may not write to it, so attachments would never be deleted"
    return Level.OK, subject, path


def _backends(path: str | None, settings: Settings, *, asks: bool) -> Iterator[Finding]:
    """Asked all at once; told in their order."""
    asked: list[_Probe] = []
    for name in _used(path, settings):
        backend = settings.backends[name]
        if isinstance(backend, PythonBackend):
            continue  # `_handlers` has looked at all of them
        if isinstance(backend, ExecBackend):
            yield from _as_user(settings, lambda name=name, backend=backend: [_program(name, backend)])  # type: ignore[misc]
        elif not isinstance(backend, HttpBackend):
            yield Finding(Level.OK, f"backend {name}", "answers by itself")
        elif not asks:
            key = "with a key" if backend.api_key is not None else "without a key"
            yield Finding(Level.OK, f"backend {name}", f"{backend.api_base}: not asked, {key}")
        else:
            asked.append(_Probe(name, backend))
    for one in asked:
        yield one.finding()


def _handlers(settings: Settings) -> Iterator[Finding]:
    """Whether workers could import them. Each is tried in a child, which does not outlive it: it is others' code."""
    secs = settings.workers.timeout_secs
    for name, backend in settings.backends.items():
        if not isinstance(backend, PythonBackend):
            continue
        fault = _import_fault(backend, secs)
        text = f"{backend.target}: {fault}" if fault else f"{backend.target} can be imported"
        yield Finding(Level.FAULT if fault else Level.OK, f"backend {name}", text)


def _import_fault(backend: PythonBackend, secs: float) -> str:
    """Why a handler cannot be imported within `secs`, or ""."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _try_import(backend, write_end)
    os.close(write_end)
    answer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(read_end, selectors.EVENT_READ)
        if over := not selector.select(secs):
            os.kill(pid, signal.SIGKILL)
        else:
            answer = os.read(read_end, 65536)
    os.close(read_end)
    _, status = os.waitpid(pid, 0)
    if over:
        return f"importing it takes longer than {secs:g} s (workers.timeout_secs)"
    if not answer:
        return f"importing it ended the process, which {process.how_it_ended(os.waitstatus_to_exitcode(status))}"
    return answer[1:].decode(errors="replace")


def _try_import(backend: PythonBackend, pipe: int) -> NoReturn:
    """In the child: import, tell, go. What the code prints is not ours to show."""
    fault = ""
    try:
        with open(os.devnull, "r+b") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        load_target(backend.target, backend.path)
    except BadTarget as error:
        fault = str(error)
    except BaseException as error:
        fault = f"{type(error).__name__}: {error}"
    finally:
        os.write(pipe, b"." + fault.encode(errors="replace")[:4000])  # of less than a pipe holds
        os._exit(0)  # whatever threads it has started, and functions it wants to be called at the end


def _program(name: str, backend: ExecBackend) -> Finding:
    """Whether a worker could start the program; as whoever workers run as."""
    subject = f"backend {name}"
    fault = programs.fault(backend, os.environ)
    if fault:
        return Finding(Level.FAULT, subject, fault)
    command = backend.command[0]
    file = programs.find(command, backend.directory, programs.environment(backend, os.environ)["PATH"])
    if "/" in command and not os.path.isabs(command) and not os.path.isabs(backend.directory or ""):
        text = f"{command}: looked for where forkd is started, which may be elsewhere; write it, or directory, in full"
        return Finding(Level.WARNING, subject, text)
    return Finding(Level.OK, subject, f"starts {file}, at most {backend.max_processes} at once")


def _used(path: str | None, settings: Settings) -> list[str]:
    """The default backend, those of listeners, and those that somebody wrote."""
    names = {settings.default_backend: None}
    names |= {name: None for listener in settings.listeners if (name := listener.named_backend) is not None}
    written = strictyaml.read(path)[0] if path is not None else None
    if isinstance(written, dict) and isinstance(written.get("backends"), dict):
        names |= dict.fromkeys(written["backends"])
    defaults = default_backends()  # what the environment changed is meant to be used
    names |= {name: None for name, backend in settings.backends.items() if backend != defaults.get(name)}
    return [name for name in names if name in settings.backends]


class _Probe:
    """One backend that is being asked, in a thread that nobody waits for when its time is up."""

    def __init__(self, name: str, backend: HttpBackend) -> None:
        self._name = name
        self._backend = backend
        self._found: Finding | None = None
        self._deadline = time.monotonic() + backend.connect_timeout_secs + ANSWER_SECS + _GRACE_SECS
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        self._found = probe(self._name, self._backend)

    def finding(self) -> Finding:
        """Wait for it."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._found is not None:
            return self._found
        return Finding(Level.FAULT, f"backend {self._name}", f"{self._backend.api_base}: it does not come to an end")
