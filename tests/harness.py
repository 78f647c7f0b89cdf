"""What the whole-system tests share: a running forkd, handing over clients to it, reading what they get.

Everything is real: a daemon process, its socket, client sockets. Nothing here sleeps to let something happen:
`wait_for` asks for a condition until it holds, and gives up after a time that no working program needs.
"""

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

PATIENCE_SECS = 20.0


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE_SECS) -> Any:
    """Ask until `condition()` is true, and return what it returned."""
    end = time.monotonic() + patience
    while not (result := condition()):
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.005)
    return result


@dataclass
class Event:
    """One Server-Sent Event as a browser would see it."""

    data: str
    name: str = "message"


@dataclass
class Answer:
    """What a client read up to the end of the stream."""

    raw: bytes
    reset: bool = False
    """The connection ended by an error instead of an end of file."""

    @property
    def head(self) -> str:
        return self.raw.partition(b"\r\n\r\n")[0].decode("latin-1")

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1])

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]

    @property
    def headers(self) -> list[tuple[str, str]]:
        pairs = [line.partition(":") for line in self.head.split("\r\n")[1:]]
        return [(name.lower(), value.strip()) for name, _, value in pairs]

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name.lower())

    @property
    def json(self) -> dict[str, Any]:
        parsed = json.loads(self.body)
        assert isinstance(parsed, dict)
        return parsed

    @property
    def events(self) -> list[Event]:
        """The body's events, by the rules of the HTML standard (fields of unknown names are ignored)."""
        found: list[Event] = []
        data: list[str] = []
        name = "message"
        text = self.body.decode("utf-8")
        for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
            if not line:
                if data:
                    found.append(Event("\n".join(data), name))
                data, name = [], "message"
                continue
            field_name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field_name == "data":
                data.append(value)
            elif field_name == "event":
                name = value
        return found

    @property
    def text(self) -> str:
        """The streamed answer."""
        return "".join(
            json.loads(event.data)["content"]
            for event in self.events
            if event.name == "message" and event.data != "[DONE]"
        )

    @property
    def complete(self) -> bool:
        """It ended with both endings, in order."""
        return [(event.name, event.data) for event in self.events[-2:]] == [("message", "[DONE]"), ("done", "{}")]

    @property
    def error(self) -> dict[str, Any] | None:
        """The JSON of `event: error`, whose last line it is when the event before was cut, or of an error status."""
        if self.status >= 400 and self.header("content-type") == "application/json":
            return self.json
        for event in self.events:
            if event.name == "error":
                parsed = json.loads(event.data.rpartition("\n")[2])
                assert isinstance(parsed, dict)
                return parsed
        return None


def read_answer(sock: socket.socket, patience: float = PATIENCE_SECS) -> Answer:
    """Read a client's socket to its end and close it."""
    sock.settimeout(patience)
    pieces: list[bytes] = []
    reset = False
    with sock:
        try:
            while piece := sock.recv(65536):
                pieces.append(piece)
        except ConnectionError:
            reset = True
    return Answer(b"".join(pieces), reset)


def read_answers(clients: Iterable[socket.socket], patience: float = PATIENCE_SECS) -> list[Answer]:
    """Read many clients' sockets side by side to their ends and close them; in the order given."""
    clients = list(clients)
    pieces: dict[int, list[bytes]] = {client.fileno(): [] for client in clients}
    order = list(pieces)
    reset: set[int] = set()
    end = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.setblocking(False)
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, end - time.monotonic()))
            assert ready, f"{len(selector.get_map())} of {len(clients)} clients never saw an end"
            for key, _ in ready:
                client = key.fileobj
                assert isinstance(client, socket.socket)
                try:
                    piece = client.recv(65536)
                except ConnectionError:
                    reset.add(key.fd)
                    piece = b""
                if piece:
                    pieces[key.fd].append(piece)
                else:
                    selector.unregister(client)
                    client.close()
    return [Answer(b"".join(pieces[number]), number in reset) for number in order]


def connect(path: str | Path, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> socket.socket:
    """A sender's connection."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PATIENCE_SECS)
    sock.connect(str(path))
    return sock


def send(sock: socket.socket, payload: bytes, *fds: int) -> None:
    """One message with any number of fds, which stay the caller's. Built here by hand, not with forkd's own code."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([payload], rights)


def envelope(request: dict[str, Any], data: bytes, *, flags: int = 0, **more: Any) -> bytes:
    """An envelope's bytes, built by hand."""
    return bytes((1, flags)) + json.dumps({"request": request, **more}).encode() + b"\n" + data


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a loopback TCP connection: the client's, and the one Apache would hold."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        return client, server


def reset(sock: socket.socket) -> None:
    """Close a TCP socket by an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def open_fds(pid: int) -> int:
    """How many fds a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def fd_targets(pid: int) -> list[str]:
    """What a process has open, for the message of a test that counted too many."""
    targets = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            targets.append(f"{name}: {os.readlink(f'/proc/{pid}/fd/{name}')}")
    return sorted(targets)


def fail(_ready: object, error: Exception) -> None:
    """For a selector in whose callbacks nothing may go wrong."""
    raise error


def own_fds() -> int:
    """How many fds this process has open, without those that wait for the garbage collector."""
    gc.collect()
    return open_fds(os.getpid())


@dataclass
class Forkd:
    """A running daemon. `config` is the YAML as a dict; sections of it may be given and are merged over the tests'
    own.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    command: tuple[str, ...] = (sys.executable, "-m", "forkd")
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def path(self) -> str:
        return str(self.directory / "forkd.sock")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, *, ready: bool = True, **popen: Any) -> "Forkd":
        """Start it; with `ready`, wait until every worker is. `popen` goes to Popen, over what is given to it here."""
        base: dict[str, Any] = {
            "server": {"socket_path": self.path},
            "workers": {"count": 2},
            "backends": {"mock": {"provider": "mock", "token_delay_ms": 10}},
            "metrics": {"dir": str(self.directory / "metrics"), "listen_addr": "127.0.0.1:0"},
            "logging": {"level": "debug", "file": str(self.directory / "forkd.log")},
        }
        for section, keys in self.config.items():
            base[section] = {**base.get(section, {}), **keys} if isinstance(keys, dict) else keys
        file = self.directory / "forkd.yaml"
        file.write_text(yaml.safe_dump(base))
        with open(self.directory / "output", "wb") as output:
            streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen([*self.command, "-c", str(file), *self.arguments], **{**streams, **popen})
        if ready:
            wanted = base["workers"]["count"] + sum(pool["count"] for pool in base.get("pools", {}).values())
            wait_for(lambda: self.log().count(" ready (pid") >= wanted or self._exited(), "workers ready")
            assert not self._exited(), self.log() + self.output()
        return self

    def _exited(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def log(self) -> str:
        file = self.directory / "forkd.log"
        return file.read_text() if file.exists() else ""

    def output(self) -> str:
        """What it wrote to stdout and stderr."""
        return (self.directory / "output").read_text()

    def access_lines(self) -> list[dict[str, str]]:
        """The access lines, as dicts. Values that were quoted keep their quotes."""
        lines = [line.partition(": ")[2] for line in self.log().splitlines() if " ACCESS " in line]
        return [dict(pair.split("=", 1) for pair in line.split(" ")) for line in lines]

    def workers(self) -> list[int]:
        """The pids of the workers, as ps(1) shows them."""
        found = []
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.Error):
                for _ in range(3):  # it may be writing its title just now
                    line = child.cmdline()
                    if line and line[0].startswith("forkd: worker"):
                        found.append(child.pid)
                        break
        return sorted(found)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all processes (0.0 if it was never counted). Counts lag by about a second."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(next((self.directory / "metrics").glob("master-*"))))
        total = 0.0
        for family in registry.collect():
            for sample in family.samples:
                if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items()):
                    total += sample.value
        return total

    def counts(self, *names: str) -> dict[str, float]:
        """These counters, summed over all processes, by the value of their one label; what is 0 is left out."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(next((self.directory / "metrics").glob("master-*"))))
        found: dict[str, float] = {}
        for family in registry.collect():
            for sample in family.samples:
                if sample.name in names and sample.value:
                    (label,) = sample.labels.values()
                    found[label] = found.get(label, 0.0) + sample.value
        return found

    def wait_for_metric(self, name: str, value: float, **labels: str) -> None:
        """Wait until a metric has exactly this value."""
        end = time.monotonic() + PATIENCE_SECS
        while (found := self.metric(name, **labels)) != value:
            assert time.monotonic() < end, f"{name}{labels} is {found}, not {value}"
            time.sleep(0.05)

    def hand_over(
        self, payload: bytes = b'{"prompt":"Hello"}', *, tcp: bool = False, path: str | None = None
    ) -> socket.socket:
        """Hand a new client over, as Apache would, and return the client's end."""
        client, server = tcp_pair() if tcp else socket.socketpair()
        with server, connect(path or self.path) as sender:
            send(sender, payload, server.fileno())
        return client

    def ask(self, payload: bytes = b'{"prompt":"Hello"}', **how: Any) -> Answer:
        """Hand over a client and read its whole answer."""
        return read_answer(self.hand_over(payload, **how))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait for its end; returns the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECS)

    @contextlib.contextmanager
    def counting(self, **expected: int) -> Iterator[None]:
        """What happens inside is counted under exactly these codes (handoff errors as `code`, stream errors as
        `stream_code`), and leaves no fd behind in any process."""

        def counts() -> dict[str, float]:
            handoffs = self.counts("forkd_handoff_errors_total")
            streams = self.counts("forkd_stream_errors_total")
            return {**handoffs, **{f"stream_{code}": count for code, count in streams.items()}}

        fds, before = self.idle_fds(), counts()
        yield

        def news() -> dict[str, float]:
            return {code: count - before.get(code, 0) for code, count in counts().items() if count != before.get(code)}

        end = time.monotonic() + PATIENCE_SECS
        while (found := news()) != expected:
            assert time.monotonic() < end, f"counted {found}, not {expected}"
            time.sleep(0.05)
        self.wait_for_fds(fds)

    def wait_for_fds(self, before: tuple[int, ...]) -> None:
        """Wait until the master and the workers have as many fds as `idle_fds` said before."""
        end = time.monotonic() + PATIENCE_SECS
        while (left := self.idle_fds()) != before:
            if time.monotonic() > end:
                held = {pid: fd_targets(pid) for pid in [self.pid, *self.workers()]}
                raise AssertionError(f"fds leaked: {before} became {left}: {held}")
            time.sleep(0.02)

    def idle_fds(self) -> tuple[int, ...]:
        """The fd counts of the master and each worker, once nothing is in flight."""
        return tuple(open_fds(pid) for pid in [self.pid, *self.workers()])


@contextlib.contextmanager
def running(
    directory: Path, *, ready: bool = True, popen: dict[str, Any] | None = None, **parts: Any
) -> Iterator[Forkd]:
    """A forkd that is stopped at the end, with everything it started, and its log shown if the test fails."""
    daemon = Forkd(directory, **parts)
    try:
        yield daemon.start(ready=ready, **popen or {})
    except BaseException:
        print(daemon.log()[-20000:])
        print(daemon.output()[-5000:])
        raise
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            family = psutil.Process(daemon.pid).children(recursive=True)
            daemon.process.send_signal(signal.SIGQUIT)
            try:
                daemon.process.wait(PATIENCE_SECS)
            finally:
                for process in family:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                daemon.process.kill()
