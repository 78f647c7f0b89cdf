"""The daemons that are measured: how each is started, made ready and stopped, and which processes are its own.

To measure another daemon, write a class with `name` and `start` and give it to `bench.py`. To measure forkd with
another backend, add its section to `BACKENDS`; processes that it needs beside forkd (a fake API) go to
`Daemon.helpers`, so that they are stopped with it and their CPU time is not taken for forkd's.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from proc import Tree
from shape import Shape
from trial import TrialError, try_streams, wait_for_listener

ROOT = Path(__file__).resolve().parents[2]

DATA = '{"prompt":"Hello","user_id":"u1","request_id":"bench-######"}'
TRIAL_DATA = b'{"prompt":"Hello","user_id":"u1","request_id":"bench-trial","backend":"trial"}'
STOP_SECS = 15


@dataclass(slots=True)
class Daemon:
    """A daemon that is up and ready."""

    process: subprocess.Popen[bytes]
    socket_path: Path
    log: Path
    body: bytes = b""  # what each stream says after its head
    data: str = DATA
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def tree(self) -> Tree:
        """Its processes: all whose CPU and memory count."""
        return Tree(self.process.pid)

    def stop(self) -> int:
        """SIGTERM, then after `STOP_SECS` SIGKILL to all of it. Returns its exit status, negative for a signal."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)  # its own session: see _spawn
            self.process.wait()
        for helper in self.helpers:
            helper.terminate()
            helper.wait()
        return self.process.returncode

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


class Subject(Protocol):
    """Something to measure."""

    @property
    def name(self) -> str:
        """As the table calls it."""

    def start(self, directory: Path, shape: Shape) -> Daemon:
        """Start it and return when it is ready. `directory` is empty, short of path, and goes away after the run."""


@dataclass(frozen=True, slots=True)
class Floor:
    """floor.c: the least that any program can do."""

    program: Path
    name: str = "floor"

    def start(self, directory: Path, shape: Shape) -> Daemon:
        """Ready when it listens; nothing in it needs warming."""
        socket_path, log = directory / "floor.sock", directory / "floor.log"
        command = [str(self.program), str(socket_path), str(shape.events), f"{shape.delay_ms:g}"]
        event = b'data: {"content":"This is a message, with enough text in it."}\n\n'
        daemon = Daemon(_spawn(command, log), socket_path, log, body=event * shape.events + b"data: [DONE]\n\n")
        return _ready(daemon, lambda: wait_for_listener(socket_path))


def _mock(shape: Shape) -> dict[str, Any]:
    text = " ".join(shape.words)
    return {
        "mock": {"provider": "mock", "token_delay_ms": shape.delay_ms, "text": text},
        "trial": {"provider": "mock", "token_delay_ms": 1, "text": text},  # the same words, sooner
    }


BACKENDS: Mapping[str, Callable[[Shape], dict[str, Any]]] = {"mock": _mock}


@dataclass(frozen=True, slots=True)
class Forkd:
    """forkd with everything on, unless told otherwise."""

    workers: int
    ledger: bool = True
    benchmark: bool = False
    backend: str = "mock"

    @property
    def name(self) -> str:
        """With what departs from the default."""
        switches = [*(() if self.ledger else ("ledger off",)), *(("--benchmark",) if self.benchmark else ())]
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}"
        return f"forkd, {self.backend}, {', '.join([workers, *switches])}"

    def start(self, directory: Path, shape: Shape) -> Daemon:
        """Ready when a few trial streams for each worker have come whole, which also settles Python's bytecode."""
        socket_path, log, config = directory / "forkd.sock", directory / "forkd.log", directory / "forkd.yaml"
        config.write_text(yaml.safe_dump(self._config(socket_path, log, shape), width=1 << 20))
        script = Path(sys.executable).with_name("forkd")
        program = [str(script)] if script.exists() else [sys.executable, "-m", "forkd.cli"]
        command = [*program, "-c", str(config), *(("--benchmark",) if self.benchmark else ())]
        daemon = Daemon(_spawn(command, directory / "forkd.out"), socket_path, log)

        def warm() -> None:
            wait_for_listener(socket_path)
            daemon.body = try_streams(socket_path, TRIAL_DATA, shape.words, 8 * self.workers)

        try:
            return _ready(daemon, warm)
        except TrialError as error:
            raise TrialError(f"{error}\n{(directory / 'forkd.out').read_text(errors='replace')[-2000:]}") from error

    def _config(self, socket_path: Path, log: Path, shape: Shape) -> dict[str, Any]:
        return {
            "server": {"socket_path": str(socket_path), "max_connections": 100_000, "ledger": self.ledger},
            "workers": {"count": self.workers},
            "default_backend": self.backend,
            "backends": BACKENDS[self.backend](shape),
            "metrics": {"enabled": True, "listen_addr": "127.0.0.1:0"},
            "logging": {"level": "info", "format": "pretty", "access": True, "file": str(log)},
        }


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    # A session of its own: a Ctrl-C in the terminal is ours to handle, and the whole group can be ended by its id.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("DAEMON_", "OPENAI_"))}
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _ready(daemon: Daemon, check: Callable[[], None]) -> Daemon:
    try:
        check()
    except TrialError as error:
        status = daemon.process.poll()
        daemon.stop()
        ended = "" if status is None else f" (it ended with status {status})"
        raise TrialError(f"{error}{ended}\n{daemon.last_words()}".rstrip()) from error
    except BaseException:
        daemon.stop()
        raise
    return daemon
