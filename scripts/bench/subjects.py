"""forkd and floor: how each is started and made ready.

To measure another daemon, write a class with `name` and `start` and give it to `bench.py`. To measure forkd with
another backend, add its section to `BACKENDS`.
"""

import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from api_answer import TRIAL_MODEL
from api_host import Api, Upstream
from daemon import Daemon, ready, spawn
from scraper import metrics_url, scrape
from shape import Shape
from trial import TrialError, try_streams, wait_for_listener

TRIAL_DATA = b'{"prompt":"Hello","user_id":"u1","request_id":"bench-trial","backend":"trial"}'
_HANDLERS = Path(__file__).with_name("handlers")
_PAUSED_FORKD = Path(__file__).with_name("paused_forkd.py")


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
        daemon = Daemon(spawn(command, log), socket_path, log, body=event * shape.events + b"data: [DONE]\n\n")
        return ready(daemon, lambda: wait_for_listener(socket_path))


def _mock(shape: Shape, api: Api | None, directory: Path) -> dict[str, Any]:
    text = " ".join(shape.words)
    return {
        "mock": {"provider": "mock", "token_delay_ms": shape.delay_ms, "text": text},
        "trial": {"provider": "mock", "token_delay_ms": 1, "text": text},  # the same words, sooner
    }


def _openai(shape: Shape, api: Api | None, directory: Path) -> dict[str, Any]:
    assert api is not None
    http2 = {"http1": False, "h2": "force", "h2-tls": True}[api.upstream]
    own = {"provider": "openai", "api_base": api.base, "api_key": "dummy", "http2": {"enabled": http2}}
    if api.ca_file is not None:
        own["ca_file"] = str(api.ca_file)
    # A copy, because forkd refuses YAML's aliases, which is how an object that occurs twice is written.
    return {"openai": own, "trial": deepcopy(own) | {"default_model": TRIAL_MODEL}}


def _python(shape: Shape, api: Api | None, directory: Path) -> dict[str, Any]:
    return _handler("python", "words:say", shape, directory)


def _python_async(shape: Shape, api: Api | None, directory: Path) -> dict[str, Any]:
    return _handler("python-async", "words:say_async", shape, directory)


def _handler(name: str, target: str, shape: Shape, directory: Path) -> dict[str, Any]:
    # What the handlers are to say, beside them, since a configuration has no room for it.
    (directory / "said.py").write_text(f"WORDS = {shape.words!r}\nDELAY_SECS = {shape.delay_ms / 1000}\n")
    own: dict[str, Any] = {"provider": "python", "target": target, "threads": min(shape.streams, 4096)}
    return {
        name: own | {"path": [str(_HANDLERS), str(directory)]},
        "trial": own | {"path": [str(_HANDLERS), str(directory)]},
    }


BACKENDS: Mapping[str, Callable[[Shape, Api | None, Path], dict[str, Any]]] = {
    "mock": _mock,
    "openai": _openai,
    "python": _python,
    "python-async": _python_async,
}


@dataclass(frozen=True, slots=True)
class Forkd:
    """forkd with everything on, unless told otherwise."""

    workers: int
    ledger: bool = True
    benchmark: bool = False
    backend: str = "mock"
    upstream: Upstream | None = None  # of a backend that relays
    pause_ms: float | None = None  # instead of the worker's own pause when busy
    scrape: bool = False  # its metrics are asked for every second

    @property
    def kind(self) -> str:
        """What the limits go by: the upstream's protocol, or the backend that needs none."""
        return self.upstream or self.backend

    @property
    def name(self) -> str:
        """With what departs from the default."""
        switches = [*(() if self.ledger else ("ledger off",)), *(("--benchmark",) if self.benchmark else ())]
        if self.pause_ms is not None:
            switches.append(f"pause {self.pause_ms:g} ms")
        if self.scrape:
            switches.append("scraped every second")
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}"
        backend = f"{self.backend} {self.upstream}" if self.upstream else self.backend
        return f"forkd, {backend}, {', '.join([workers, *switches])}"

    def start(self, directory: Path, shape: Shape) -> Daemon:
        """Ready when a few trial streams for each worker have come whole, which also settles Python's bytecode."""
        socket_path, log, config = directory / "forkd.sock", directory / "forkd.log", directory / "forkd.yaml"
        api = Api(self.upstream, shape, directory) if self.upstream else None
        config.write_text(yaml.safe_dump(self._config(socket_path, log, shape, api), width=1 << 20))
        command = [*self._program(), "-c", str(config), *(("--benchmark",) if self.benchmark else ())]
        daemon = Daemon(spawn(command, directory / "forkd.out"), socket_path, log, api=api)

        def warm() -> None:
            wait_for_listener(socket_path)
            daemon.body = try_streams(socket_path, TRIAL_DATA, shape.words, 8 * self.workers)
            if self.scrape:
                daemon.metrics_url = metrics_url(log)
                scrape(daemon.metrics_url)  # what the first one takes in memory is no stream's

        try:
            return ready(daemon, warm)
        except TrialError as error:
            raise TrialError(f"{error}\n{(directory / 'forkd.out').read_text(errors='replace')[-2000:]}") from error

    def _program(self) -> list[str]:
        if self.pause_ms is not None:
            return [sys.executable, str(_PAUSED_FORKD), f"{self.pause_ms:g}"]
        script = Path(sys.executable).with_name("forkd")
        return [str(script)] if script.exists() else [sys.executable, "-m", "forkd"]

    def _config(self, socket_path: Path, log: Path, shape: Shape, api: Api | None) -> dict[str, Any]:
        return {
            "server": {"socket_path": str(socket_path), "max_connections": 100_000, "ledger": self.ledger},
            "workers": {"count": self.workers},
            "default_backend": self.backend,
            "backends": BACKENDS[self.backend](shape, api, socket_path.parent),
            "metrics": {"enabled": True, "listen_addr": "127.0.0.1:0"},
            "logging": {"level": "info", "format": "pretty", "access": True, "file": str(log)},
        }
