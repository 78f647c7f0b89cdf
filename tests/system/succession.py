"""What the tests of reload and upgrade share: a daemon whose master may change, and a load that goes on meanwhile."""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.harness import PATIENCE_SECS, Forkd, connect, read_answers, send, wait_for
from tests.system.crowd import fates, forkd_of, prompt, ready_pids

RATE = 100
"""New streams a second: a light load, so that these tests can share a machine with others."""


class Adopted:
    """A master that another master started, with what the harness asks of a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        """None while it lives. Its exit status is known to its parent only."""
        try:
            return None if self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE else 0
        except psutil.NoSuchProcess:
            return 0

    def wait(self, timeout: float = PATIENCE_SECS) -> int:
        wait_for(lambda: self.poll() is not None, f"the end of process {self.pid}", timeout)
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.kill()


@contextlib.contextmanager
def daemon(directory: Path, workers: int = 2, **config: Any) -> Iterator[Forkd]:
    """`forkd_of`, of which no master is left at the end, however many there were."""
    try:
        with forkd_of(directory, workers, **config) as forkd:
            yield forkd
    finally:
        for process in family(directory):
            with contextlib.suppress(psutil.Error):
                process.kill()


def family(directory: Path) -> list[psutil.Process]:
    """Every master that serves this directory's configuration, and all their children."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and str(directory / "forkd.yaml") in " ".join(
                process.cmdline()
            ):
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = each
    return list(found.values())


def masters(directory: Path) -> list[int]:
    """The pids of all masters, by their titles."""
    found = []
    for process in family(directory):
        with contextlib.suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith("forkd: master"):
                found.append(process.pid)
    return found


def reconfigure(forkd: Forkd, **sections: Any) -> None:
    """Write keys into the sections of the configuration file."""
    file = forkd.directory / "forkd.yaml"
    config = yaml.safe_load(file.read_text())
    for section, keys in sections.items():
        config[section] = {**config.get(section, {}), **keys} if isinstance(keys, dict) else keys
    file.write_text(yaml.safe_dump(config))


def reload(forkd: Forkd) -> None:
    """HUP, and wait until the new generation serves."""
    before = forkd.log().count(" serves; generation ")
    os.kill(forkd.pid, signal.SIGHUP)
    wait_for(lambda: forkd.log().count(" serves; generation ") == before + 1, "the new generation serves")


def settled_workers(forkd: Forkd, count: int) -> list[int]:
    """Wait until there are this many workers, all of them ready; returns their pids."""
    wait_for(lambda: len(forkd.workers()) == count and set(forkd.workers()) <= set(ready_pids(forkd)), "they are ready")
    return forkd.workers()


def successors(forkd: Forkd) -> list[int]:
    """The pids of all new masters that became ready, oldest first."""
    return [int(pid) for pid in re.findall(r"the new master \(pid (\d+)\) is ready", forkd.log())]


def begin_upgrade(forkd: Forkd) -> int:
    """USR2; returns the pid of the new master, which is starting."""
    pattern = re.compile(r"upgrade: started a new master \(pid (\d+)\)")
    before = len(pattern.findall(forkd.log()))
    os.kill(forkd.pid, signal.SIGUSR2)
    wait_for(lambda: len(pattern.findall(forkd.log())) == before + 1, "a new master starts")
    return int(pattern.findall(forkd.log())[-1])


def hand_down(forkd: Forkd) -> Any:
    """USR2, and wait until the new master serves. `forkd` is that one from then on; returns the old one's process."""
    pid = begin_upgrade(forkd)
    wait_for(lambda: pid in successors(forkd), "the new master is ready")
    return adopt(forkd, pid)


def adopt(forkd: Forkd, pid: int) -> Any:
    """Make the master with this pid the one that `forkd` is; returns the process of the one before."""
    old, forkd.process = forkd.process, Adopted(pid)  # type: ignore[assignment]
    return old


def upgrade(forkd: Forkd) -> None:
    """USR2, and wait until the old master is gone and the new one knows."""
    before = forkd.log().count("upgrade: the old master is gone")
    assert hand_down(forkd).wait(PATIENCE_SECS) == 0
    wait_for(lambda: forkd.log().count("upgrade: the old master is gone") == before + 1, "the new master knows")


class Load:
    """A steady load, handed over by a thread as Apache does it: each by a connection of its own, or all by one.

    EPIPE from a connection that was accepted by a master which then stopped accepting is an Apache child's daily bread:
    it connects again. That nobody listens must never happen, not for an instant.
    """

    def __init__(self, forkd: Forkd, *, kind: socket.SocketKind = socket.SOCK_SEQPACKET, payload: bytes = b"") -> None:
        self.clients: list[socket.socket] = []
        self.again = 0
        self._path = forkd.path
        self._kind = kind
        self._payload = payload or prompt(backend="steady")
        self._over = threading.Event()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        wait_for(lambda: len(self.clients) >= 20 or self._fault, "the load flows")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE_SECS)
        assert not self._thread.is_alive()

    def verdicts(self) -> dict[str, int]:
        """What all clients got to read, after the end."""
        assert self._fault is None, self._fault
        return dict(fates(read_answers(self.clients)))

    @property
    def complete(self) -> dict[str, int]:
        """The verdicts, if nothing was lost."""
        return {"complete": len(self.clients)}

    def _run(self) -> None:
        begin = time.monotonic()
        try:
            while not self._over.wait(max(0.0, begin + len(self.clients) / RATE - time.monotonic())):
                self._hand_over()
        except BaseException as error:
            self._fault = error

    def _hand_over(self) -> None:
        client, server = socket.socketpair()
        with server:
            for _ in range(5):
                with connect(self._path, self._kind) as sender:
                    try:
                        send(sender, self._payload, server.fileno())
                        break
                    except BrokenPipeError:
                        self.again += 1
            else:
                raise AssertionError("EPIPE five times in a row")
        self.clients.append(client)
