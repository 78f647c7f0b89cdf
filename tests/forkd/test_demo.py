"""`forkd demo` as a user types it: one command, a page, Ctrl-C."""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from forkd import config, demo
from tests.harness import PATIENCE_SECS, Answer, read_answer, wait_for


class Demo:
    """A running `forkd demo`, in a session of its own as under a terminal, with a temporary directory of its own."""

    def __init__(self, directory: Path, *arguments: str, **environ: str) -> None:
        self.directory = directory
        self._output = tempfile.TemporaryFile()
        self._seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forkd", "demo", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._output,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(directory), **environ},
        )

    def said(self) -> str:
        """What it has printed so far, log excluded."""
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], 0)[0]:
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                break
            self._seen += piece
        return self._seen.decode()

    def errors(self) -> str:
        """Its stderr, where the daemon's log goes too."""
        self._output.seek(0)
        return self._output.read().decode()

    @property
    def url(self) -> str:
        found = wait_for(lambda: re.search(r"Open +(http://\S+)", self.said()) or self._over(), "the URL")
        assert isinstance(found, re.Match), self.errors()
        return str(found[1])

    def _over(self) -> bool:
        return self.process.poll() is not None

    def daemon(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECS)

    def ctrl_c(self) -> None:
        """As the terminal does it: to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._output.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        yield Path(directory)


@contextlib.contextmanager
def running(directory: Path, *arguments: str, **environ: str) -> Iterator[Demo]:
    app = Demo(directory, *arguments, **environ)
    try:
        yield app
    except BaseException:
        print(app.said(), app.errors())
        raise
    finally:
        app.close()


def begin_stream(url: str) -> socket.socket:
    """A client that has got the first bytes of a stream."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), PATIENCE_SECS)
    client.sendall(b"GET /stream.php?prompt=Hi HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
    return client


def test_one_command_and_ctrl_c(directory: Path) -> None:
    with running(directory, "--token-delay-ms", "1") as app:
        assert "<title>forkd</title>" in requests.get(app.url, timeout=PATIENCE_SECS).text
        response = requests.post(app.url + "/stream.php", data={"prompt": "Hi"}, timeout=PATIENCE_SECS)
        assert response.status_code == 200
        assert response.headers["Set-Cookie"].startswith("visitor=")
        answer = Answer(b"HTTP/1.1 200 OK\r\n\r\n" + response.content)
        assert answer.complete
        assert answer.text == demo.TEXT
        assert f"curl -N {app.url}/stream.php" in app.said()
        wait_for(lambda: "reason=ok" in app.errors(), "the access line")
        daemon = app.daemon()
        app.ctrl_c()
        assert app.wait() == 0
        assert not daemon.is_running()
        assert "forkd stopped" in app.errors()
        assert "Traceback" not in app.errors()
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_it_too(directory: Path, number: signal.Signals) -> None:
    with running(directory) as app:
        assert app.url
        app.process.send_signal(number)
        assert app.wait() == 0
        assert list(directory.iterdir()) == []


def test_a_second_ctrl_c_ends_the_streams(directory: Path) -> None:
    with running(directory, "--token-delay-ms", "60000", DAEMON_SHUTDOWN_TIMEOUT_SECS="3600") as app:
        client = begin_stream(app.url)
        app.ctrl_c()
        wait_for(lambda: "finishing 1 streams" in app.errors(), "draining")
        app.ctrl_c()
        answer = read_answer(client)
        assert b'"code":"shutdown"' in answer.raw
        assert not answer.reset
        assert app.wait() == 0


def test_the_front_door_keeps_no_copy_of_a_client(directory: Path) -> None:
    with running(directory, "--token-delay-ms", "60000") as app, begin_stream(app.url), begin_stream(app.url):
        sockets = psutil.Process(app.process.pid).net_connections
        wait_for(lambda: [each.status for each in sockets("tcp")] == [psutil.CONN_LISTEN], "only forkd has the clients")


def test_a_taken_port(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with running(directory, "--port", str(port)) as app:
            assert app.wait() == 1
            (line,) = app.errors().splitlines()
            advice = "end the program that uses it, or choose another with --port"
            assert line == f"forkd demo: port {port} is in use; {advice}"
            assert app.said() == ""


def test_an_address_that_is_none(directory: Path) -> None:
    with running(directory, "--host", "256.0.0.1") as app:
        assert app.wait() == 1
        (line,) = app.errors().splitlines()
        assert line.startswith("forkd demo: cannot serve on 256.0.0.1: ")


@pytest.mark.parametrize("arguments", [("--port", "http"), ("--port", "65536"), ("--token-delay-ms", "-1")])
def test_arguments_that_are_none(directory: Path, arguments: tuple[str, ...]) -> None:
    with running(directory, *arguments) as app:
        assert app.wait() == 2
        assert arguments[1] in app.errors()


def test_a_daemon_that_does_not_start(directory: Path) -> None:
    with running(directory, "--backend", "nonesuch") as app:
        assert app.wait() == 1
        assert "nonesuch" in app.errors()
        assert app.errors().splitlines()[-1] == (
            "forkd demo: the daemon did not start (exit status 2); it says why above"
        )
        assert "Open" not in app.said()
        assert list(directory.iterdir()) == []


def test_a_daemon_that_dies(directory: Path) -> None:
    with running(directory) as app:
        assert app.url
        app.daemon().kill()
        assert app.wait() == 1
        assert app.errors().splitlines()[-1] == (
            "forkd demo: the daemon has stopped by itself (killed by SIGKILL); its log is above"
        )
        assert "Traceback" not in app.errors()
        assert list(directory.iterdir()) == []


def test_the_daemon_does_not_outlive_it(directory: Path) -> None:
    with running(directory) as app:
        assert app.url
        daemon = app.daemon()
        app.process.kill()
        app.wait()
        wait_for(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE, "the daemon's end")


def test_it_runs_its_own_forkd_wherever_it_is_started(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = directory / "elsewhere"
    for package in ("workers", "forkd"):
        (elsewhere / package).mkdir(parents=True)
        (elsewhere / package / "__init__.py").write_text("raise SystemExit('the wrong one')")
    root = str(Path(demo.__file__).parents[1])
    start = f"import sys; sys.path.insert(0, {root!r}); from forkd.cli import main; main(['demo', '--port', '0'])"
    monkeypatch.chdir(elsewhere)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", start],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert any(b"Open " in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECS) == 0


def test_its_configuration_is_a_valid_one(tmp_path: Path) -> None:
    file = tmp_path / "forkd.yaml"
    for delay in (None, 0.5):
        file.write_text(yaml.safe_dump(demo._settings(delay)))
        settings, warnings = config.load(str(file), {}, {})
        assert not warnings
        assert settings.backends["mock"].text == demo.TEXT  # type: ignore[union-attr]


def test_a_long_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with demo._temporary_directory() as directory, socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.join(directory, "forkd.sock"))
