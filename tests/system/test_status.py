"""`forkd status` beside a running daemon."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import PATIENCE_SECS, Forkd, read_answer, running, wait_for

FORKD = (sys.executable, "-m", "forkd")
LONG: dict[str, Any] = {"backends": {"mock": {"provider": "mock", "token_delay_ms": 600_000}}}


def address(forkd: Forkd) -> str:
    """Where it serves metrics."""
    return str(wait_for(lambda: re.search(r"metrics on http://([\d.]+:\d+)/", forkd.log()), "a metrics address")[1])


def status(forkd: Forkd, *arguments: str, **how: Any) -> "subprocess.CompletedProcess[str]":
    command = [*FORKD, "status", "--addr", address(forkd), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECS, check=False, **how)


def told(forkd: Forkd) -> dict[str, Any]:
    """What --json says."""
    answer = json.loads(status(forkd, "--once", "--json").stdout)
    assert isinstance(answer, dict)
    return answer


def test_once_json_is_the_whole_truth(tmp_path: Path) -> None:
    with running(tmp_path, config=LONG) as forkd:
        clients = [forkd.hand_over() for _ in range(4)]
        wait_for(lambda: sum(w["oldest_stream_secs"] is not None for w in told(forkd)["workers"]) == 2, "ages of both")
        said = told(forkd)
        assert (said["pid"], said["stage"], said["obstacle"], said["streams"]) == (forkd.pid, "running", None, 4)
        assert said["rss_bytes"] > 4 << 20
        assert said["cpu_ms"] > 0
        assert sorted(worker["pid"] for worker in said["workers"]) == forkd.workers()
        assert sum(worker["streams"] for worker in said["workers"]) == 4
        for worker in said["workers"]:
            assert (worker["state"], worker["streams"], worker["restarts"]) == ("ready", worker["started"], 0)
            assert 4 << 20 < worker["rss_bytes"] < 1 << 30
            assert worker["cpu_ms"] > 0
            assert 0 <= worker["cpu_percent"] <= 110
            assert 0 < worker["oldest_stream_secs"] < 60
        for client in clients:
            client.close()
        wait_for(lambda: not any(w["oldest_stream_secs"] for w in told(forkd)["workers"]), "no stream, so none is old")
        assert sum(worker["failed"] for worker in told(forkd)["workers"]) == 4


def test_once_is_a_table_for_any_reader(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        assert read_answer(forkd.hand_over()).complete
        plain = status(forkd, "--once")
        assert (plain.returncode, plain.stderr) == (0, "")
        assert "\x1b" not in plain.stdout
        assert all(len(line) <= 80 for line in plain.stdout.splitlines())
        for pid in (forkd.pid, *forkd.workers()):
            assert f" {pid} " in plain.stdout
        narrow = status(forkd, env={**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"})
        assert narrow.returncode == 0
        assert narrow.stdout.isascii()


def test_a_dead_worker_is_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        os.kill(forkd.workers()[0], signal.SIGKILL)
        wait_for(lambda: sum(worker["restarts"] for worker in told(forkd)["workers"]) == 1, "one restart")


def test_exit_status_tells_how_it_is(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        assert status(forkd, "--json").returncode == 0
        workers = forkd.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: status(forkd, "--json").returncode == 1, "not ready")
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: status(forkd, "--json").returncode == 0, "ready again")
        port = address(forkd)
        forkd.stop()
        command = [*FORKD, "status", "--addr", port, "--once"]
        after = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECS, check=False)
        assert (after.returncode, after.stdout) == (3, "")
        assert f"nothing answers on {port}" in after.stderr


class Terminal:
    """A program on a terminal of 80 by 24."""

    def __init__(self, *command: str) -> None:
        self.seen = b""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="80", LINES="24")
            os.execv(command[0], command)

    def wait_for(self, text: bytes, count: int = 1) -> None:
        end = time.monotonic() + PATIENCE_SECS
        while self.seen.count(text) < count:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"never shown: {text!r}, but {self.seen!r}"
            self.seen += os.read(self._fd, 65536)

    def type(self, text: bytes) -> None:
        os.write(self._fd, text)

    def end(self) -> int:
        """Read it to its end; its exit code."""
        try:
            while piece := os.read(self._fd, 65536):
                self.seen += piece
        except OSError:  # EIO: the other side is closed
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_live_until_told_to_stop(tmp_path: Path, how: str) -> None:
    with running(tmp_path) as forkd:
        terminal = Terminal(*FORKD, "status", "--addr", address(forkd))
        terminal.wait_for(b"Ctrl-C to leave", count=3)
        assert terminal.echoes()
        if how == "Ctrl-C":
            terminal.type(b"\x03")
        else:
            os.kill(terminal.pid, signal.SIGTERM)
        assert terminal.end() == 0
        assert b"Traceback" not in terminal.seen
        last = terminal.seen.rpartition(b"\x1b[?1049l")[2]  # the screen is given back, and the cursor
        assert str(forkd.pid).encode() in last
        assert b"\x1b[?25h" in terminal.seen


def test_live_survives_the_daemon(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        terminal = Terminal(*FORKD, "status", "--addr", address(forkd))
        terminal.wait_for(b"Ctrl-C to leave")
        forkd.stop()
        terminal.wait_for(b"What you see is")
        terminal.type(b"\x03")
        assert terminal.end() == 0
        assert b"Traceback" not in terminal.seen
