"""How the rivals are started: subjects of the benchmark, as those in `subjects.py`."""

import importlib.util
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from api_host import Api
from daemon import Daemon, ready, spawn
from shape import Shape
from trial import TrialError, try_requests, try_streams, wait_for_listener

TRIALS = 8
_HERE = Path(__file__).parent
_TRIAL_DATA = b'{"prompt":"Hello","user_id":"u1","request_id":"bench-trial","model":"trial"}'


@dataclass(frozen=True, slots=True)
class Aiohttp:
    """Handoffs to asyncio and aiohttp, over HTTP/1.1."""

    name: str = "aiohttp"
    packages: tuple[str, ...] = ("aiohttp",)

    def shape(self, shape: Shape, streams: int) -> Shape:
        """It bears the whole load."""
        return shape

    def start(self, directory: Path, shape: Shape) -> Daemon:
        """Ready when a few trial streams have come whole."""
        _require(self.packages)
        socket_path, log = directory / "rival.sock", directory / "rival.log"
        api = Api("http1", shape, directory)
        command = [sys.executable, str(_HERE / "aiohttp_relay.py"), str(socket_path), api.base]
        daemon = Daemon(spawn(command, log), socket_path, log, api=api)

        def warm() -> None:
            wait_for_listener(socket_path)
            daemon.body = try_streams(socket_path, _TRIAL_DATA, shape.words, TRIALS)

        return ready(daemon, warm)


@dataclass(frozen=True, slots=True)
class FastApi:
    """HTTP requests on a Unix socket, as a web server would proxy them, to FastAPI, uvicorn and httpx."""

    name: str = "FastAPI+httpx"
    packages: tuple[str, ...] = ("fastapi", "httpx", "uvicorn")

    def shape(self, shape: Shape, streams: int) -> Shape:
        """A part of the load, in the same time: the whole would take several CPUs."""
        return replace(shape, streams=min(streams, shape.streams), tcp=False)

    def start(self, directory: Path, shape: Shape) -> Daemon:
        """Ready when a few trial streams have come whole."""
        _require(self.packages)
        socket_path, log = directory / "rival.sock", directory / "rival.log"
        api = Api("http1", shape, directory)
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(_HERE), "fastapi_relay:app"]
        command += ["--uds", str(socket_path), "--no-access-log", "--log-level", "warning"]
        data = _request("gpt-4o")
        process = spawn(command, log, {"OPENAI_API_BASE": api.base})
        daemon = Daemon(process, socket_path, log, data=data, over_http=True, api=api)

        def warm() -> None:
            wait_for_listener(socket_path, kind=socket.SOCK_STREAM)
            daemon.body = try_requests(socket_path, _request("trial").encode(), shape.words, TRIALS)

        return ready(daemon, warm)


Rival = Aiohttp | FastApi
RIVALS: dict[str, Rival] = {"aiohttp": Aiohttp(), "fastapi": FastApi()}


def _request(model: str) -> str:
    head = ("Host: localhost", "Accept: text/event-stream", "X-Request-Id: bench-######", "Connection: close")
    return "\r\n".join((f"GET /stream?prompt=Hello&model={model} HTTP/1.1", *head, "", ""))


def _require(packages: tuple[str, ...]) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise TrialError(f"missing: {', '.join(missing)}; run `scripts/bootstrap rivals` first")
