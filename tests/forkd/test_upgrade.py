"""The two sides of an upgrade. The new master is a real process, of a few lines; `tests/system/test_upgrade.py` has
whole daemons."""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd import upgrade
from forkd.listener import Listener
from forkd.selector import Ready, Selector
from forkd.settings import ListenerSettings
from forkd.upgrade import QUIT_SECS, READY_SECS, SIDES, VARIABLE, Upgrade, clear_gauges, take
from tests.harness import fail, own_fds, wait_for

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = own_fds()
    yield
    assert own_fds() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def inheritable_fds() -> int:
    """How many fds every program has that is started here: the standard ones, and what a shell may have left open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the directory itself is closed by now
            found += os.get_inheritable(int(name))
    return found


class Old:
    """The old master's side, with a listener, a metrics port and a directory."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self._monkeypatch = monkeypatch
        self.selector: Selector[Ready] = Selector(fail)
        self.listener = Listener(0, ListenerSettings(path=str(directory / "a.sock")))
        self.metrics = socket.create_server(("127.0.0.1", 0))
        self.succeeded: list[tuple[int, list[str]]] = []
        self.failed: list[str] = []
        self.upgrade = Upgrade(
            self.selector,
            logging.getLogger("test"),
            lambda pid, given_up: self.succeeded.append((pid, given_up)),
            self.failed.append,
        )

    def start(self, program: str, side: str = "") -> None:
        """Start `program` as the new master; `heritage` is there for it."""
        whole = f"import os, signal, sys\nsys.path.insert(0, {ROOT!r})\nfrom forkd import upgrade\n"
        whole += f"heritage = upgrade.take(os.environ)\n{program}\n"
        self._monkeypatch.setattr(sys, "orig_argv", ["python", "-c", whole])
        self.upgrade.start([self.listener], self.metrics, str(self.directory), side)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            self.selector.serve(self.selector.select(0.1))

    def close(self) -> None:
        self.listener.close()
        self.metrics.close()
        self.selector.close()
        if self.succeeded:
            os.close(self.upgrade._alive)  # as its end does; nothing else gives it back


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Old]:
    own = Old(tmp_path, monkeypatch)
    yield own
    own.close()


def test_the_new_master_has_all_that_it_needs_and_nothing_else(old: Old) -> None:
    client, server = socket.socketpair()  # as there are many in an old master
    found = old.directory / "found"
    handed_on = inheritable_fds()
    old.start(
        f"""
import json, socket
(path, (sock, lock, lent)), = heritage.listeners.items()
json.dump({{
    "path": path, "lent": lent, "side": heritage.side, "dir": heritage.metrics_dir,
    "name": socket.socket(fileno=os.dup(sock)).getsockname(),
    "lock": os.path.basename(os.readlink(f"/proc/self/fd/{{lock}}")),
    "port": socket.socket(fileno=os.dup(heritage.metrics_fd)).getsockname()[1],
    "fds": len(os.listdir("/proc/self/fd")),
    "inheritable": sum(os.get_inheritable(fd) for fd in (sock, lock, heritage.metrics_fd, heritage.ready_fd)),
    "variable": upgrade.VARIABLE in os.environ,
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
}}, open({str(found)!r}, "w"))
upgrade.tell_ready(heritage, ["/gone/a", "/gone/b"])
os.read(heritage.old_fd, 1)
os._exit(0)
"""
    )
    pid = old.upgrade.pid
    assert old.upgrade.under_way
    old.until(lambda: old.succeeded)
    assert old.succeeded == [(pid, ["/gone/a", "/gone/b"])]
    assert not old.upgrade.under_way
    assert not old.failed
    assert json.loads(found.read_text()) == {
        "path": old.listener.path,
        "lent": False,
        "side": "b-",
        "dir": str(old.directory),
        "name": old.listener.path,
        "lock": "a.sock.lock",
        "port": old.metrics.getsockname()[1],
        "fds": 5 + 1 + handed_on,  # inherited, the directory being listed, what whoever started us let everybody have
        "inheritable": 0,
        "variable": False,
        "blocked": 0,
    }
    for fd in (old.listener.sock.fileno(), old.listener.lock_fd, old.metrics.fileno()):
        assert not os.get_inheritable(fd)
    client.close()
    server.close()
    # It notices when the old one is gone.
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.close(old.upgrade._alive)
    old.succeeded.clear()
    assert os.waitpid(pid, 0) == (pid, 0)


def test_the_lock_is_held_as_long_as_one_of_them_lives(old: Old) -> None:
    old.start("upgrade.tell_ready(heritage, [])\nos.read(0, 1) if 0 else signal.pause()")
    old.until(lambda: old.succeeded)
    ((pid, _),) = old.succeeded
    path = f"{old.listener.path}.lock"
    old.listener.shared = True
    old.listener.close()
    with open(path) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    old.listener = Listener(0, old.listener.settings)


@pytest.mark.parametrize("side", SIDES)
def test_the_sides_take_turns(old: Old, side: str) -> None:
    old.start("sys.exit(3 if heritage.side else 4)", side)
    old.until(lambda: old.failed)
    assert old.failed[0].endswith(f"exited with status {4 if side else 3}")


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("os._exit(3)", "exited with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("os.close(heritage.ready_fd)\nsignal.pause()", "was killed by SIGKILL"),  # it lives and will never say so
        ("os.write(heritage.ready_fd, b'nonsense')\nsignal.pause()", "was killed by SIGKILL"),
    ],
)
def test_one_that_fails_is_reaped_and_said_so(old: Old, program: str, end: str) -> None:
    old.start(program)
    pid = old.upgrade.pid
    old.until(lambda: old.failed)
    assert old.failed == [f"the new master (pid {pid}) {end}"]
    assert not old.succeeded
    assert not old.upgrade.under_way
    old.start("os._exit(0)")  # another attempt is not impaired
    old.until(lambda: len(old.failed) == 2)


def test_one_that_takes_too_long_is_told_to_quit(old: Old) -> None:
    old.start("signal.pause()")
    started = time.monotonic()
    old.upgrade.tick(started + READY_SECS - 1)
    assert not old.selector.select(0)
    old.upgrade.tick(started + READY_SECS + 1)
    old.until(lambda: old.failed)
    assert old.failed[0].endswith("was killed by SIGQUIT")


def test_one_that_does_not_quit_is_killed(old: Old) -> None:
    ready = old.directory / "ready"
    old.start(f"signal.signal(signal.SIGQUIT, signal.SIG_IGN)\nopen({str(ready)!r}, 'w')\nwhile True: signal.pause()")
    wait_for(ready.exists, "it ignores the signal")
    late = time.monotonic() + READY_SECS
    old.upgrade.tick(late)
    old.upgrade.tick(late + QUIT_SECS - 1)
    assert old.upgrade.under_way
    old.upgrade.tick(late + QUIT_SECS)
    old.until(lambda: old.failed)
    assert old.failed[0].endswith("was killed by SIGKILL")


def test_an_upgrade_that_is_called_off(old: Old) -> None:
    old.upgrade.cancel()
    old.start("signal.pause()")
    old.upgrade.cancel()
    old.until(lambda: old.failed)
    assert old.failed[0].endswith("was killed by SIGTERM")


def test_a_program_that_is_not_there(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(FileNotFoundError):
        old.start("pass")
    assert not old.upgrade.under_way


def test_nothing_was_passed() -> None:
    environ = {"PATH": "/bin"}
    assert take(environ) is None
    assert environ == {"PATH": "/bin"}


WHOLE: dict[str, Any] = {
    "listeners": {},
    "metrics_fd": -1,
    "metrics_dir": None,
    "side": "",
    "ready_fd": "pipe",
    "old_fd": "pipe",
    "old_pid": 1,
}


@pytest.mark.parametrize(
    "change",
    [
        {"listeners": None},
        {"listeners": ["/a"]},
        {"listeners": {"/a": 3}},
        {"listeners": {"/a": [3, 4]}},
        {"listeners": {"/a": ["pipe", "pipe", False]}},
        {"listeners": {"/a": ["socket", "pipe", False]}},
        {"listeners": {"/a": ["socket", -1, False]}},
        {"listeners": {"/a": [10**30, 4, False]}},
        {"metrics_fd": "pipe"},
        {"metrics_fd": 999_999},
        {"metrics_fd": "many"},
        {"metrics_fd": None},
        {"metrics_dir": 7},
        {"side": "c-"},
        {"side": None},
        {"ready_fd": "socket"},
        {"ready_fd": -1},
        {"old_fd": "socket"},
        {"old_fd": [1]},
        {"old_pid": "init"},
    ],
)
def test_garbage_is_refused_and_touches_nothing(change: dict[str, Any]) -> None:
    sockets = socket.socketpair()
    pipe = os.pipe()

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [filled(each) for each in value]
        return {"socket": sockets[0].fileno(), "pipe": pipe[0]}.get(value, value) if isinstance(value, str) else value

    try:
        assert take({VARIABLE: json.dumps(filled(WHOLE))}) is not None
        os.set_inheritable(pipe[0], True)
        with pytest.raises(ValueError, match="FORKD_UPGRADE is not set by forkd"):
            take({VARIABLE: json.dumps(filled({**WHOLE, **change}))})
        assert os.get_inheritable(pipe[0])
    finally:
        for end in sockets:
            end.close()
        for fd in pipe:
            os.close(fd)


@pytest.mark.parametrize("written", ["", "1", "{", "[]", "null", "[" * 100_000, "{}", '{"listeners": {}}', "\udc80"])
def test_what_is_no_heritage_at_all_is_refused(written: str) -> None:
    environ = {VARIABLE: written}
    with pytest.raises(ValueError, match="FORKD_UPGRADE is not set by forkd"):
        take(environ)
    assert environ == {}


def test_a_new_master_whose_parent_is_gone_need_not_tell() -> None:
    there, here = os.pipe()
    os.close(there)
    heritage = upgrade.Heritage({}, -1, None, "b-", here, -1, 0)
    upgrade.tell_ready(heritage, [])


def test_the_gauges_of_a_master_that_was_killed_are_cleared(tmp_path: Path) -> None:
    count = """
import sys
from forkd.metrics import Metrics
metrics = Metrics(sys.argv[1], sys.argv[2])
metrics.gauge("daemon_active_streams", 7)
metrics.gauge("daemon_peak_streams", 9)
metrics.count("daemon_handoffs_total", amount=5)
metrics.flush()
"""
    for key in ("master", "b-master"):  # each in a process of its own: a process has one set of files
        subprocess.run([sys.executable, "-c", count, str(tmp_path), key], check=True, cwd=ROOT)

    def found() -> dict[str, float]:
        read = """
import sys
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry, sys.argv[1])
for family in registry.collect():
    for sample in family.samples:
        print(sample.name, sample.value)
"""
        run = subprocess.run([sys.executable, "-c", read, str(tmp_path)], check=True, capture_output=True, text=True)
        pairs = [line.split() for line in run.stdout.splitlines()]
        return {name: float(value) for name, value in pairs}

    assert found()["daemon_active_streams"] == 14
    clear_gauges(str(tmp_path), "b-")
    after = found()
    assert after["daemon_active_streams"] == 7
    assert after["daemon_peak_streams"] == 9
    assert after["daemon_handoffs_total"] == 10
    clear_gauges(str(tmp_path / "gone"), "")
