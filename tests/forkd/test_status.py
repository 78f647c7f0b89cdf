"""`forkd status`, against whatever may answer at an address."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from forkd import status
from forkd.cli import main

STATUS: dict[str, Any] = {
    "pid": 4711,
    "version": "1.2.3",
    "uptime_secs": 60.0,
    "silent_secs": 0.1,
    "generation": 1,
    "stage": "running",
    "obstacle": None,
    "of_a_later_version": True,
    "workers": [{"index": 1, "pid": 4712, "generation": 1, "state": "ready"}],
}


@contextlib.contextmanager
def answering(body: bytes, code: int = 200) -> Iterator[str]:
    """A server that says this to everybody; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/status" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "SAMPLE_SECS", 0.0)
    monkeypatch.setattr(status.signal, "signal", lambda *_: None)  # type: ignore[attr-defined]


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def configuration(directory: Path, address: str, **more: Any) -> str:
    file = directory / "forkd.yaml"
    base = {"server": {"socket_path": str(directory / "forkd.sock")}, "metrics": {"listen_addr": address, **more}}
    file.write_text(yaml.safe_dump(base))
    return str(file)


def test_once(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(json.dumps(STATUS).encode()) as address:
        assert main(["status", "--addr", address, "--once"]) == 0
    out = capsys.readouterr().out
    assert "forkd 1.2.3" in out
    assert "worker 1" in out
    assert "\x1b" not in out


def test_without_a_terminal_it_is_once(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(json.dumps(STATUS).encode()) as address:
        assert main(["status", "--addr", address]) == 0
    assert "worker 1" in capsys.readouterr().out


def test_json_is_what_the_daemon_says(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(json.dumps(STATUS).encode() + b"\n") as address:
        assert main(["status", "--addr", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


@pytest.mark.parametrize("how", ["--once", "--json"])
def test_a_daemon_that_takes_no_handoffs_is_status_1(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(json.dumps({**STATUS, "obstacle": "no worker is ready"}).encode()) as address:
        assert main(["status", "--addr", address, how]) == 1
    assert "no worker is ready" in capsys.readouterr().out


@pytest.mark.parametrize("listen", ["{}", ":{port}", "0.0.0.0:{port}"])
def test_the_configuration_says_where(tmp_path: Path, listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(json.dumps(STATUS).encode()) as address:
        file = configuration(tmp_path, listen.format(address, port=address.partition(":")[2]))
        assert main(["status", "-c", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pid"] == 4711


def test_so_does_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(json.dumps(STATUS).encode()) as address:
        monkeypatch.setenv("DAEMON_METRICS_ADDR", address)
        assert main(["status", "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_nobody_there(tmp_path: Path, nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = configuration(tmp_path, nowhere)
    assert main(["status", "-c", file, "--once"]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"forkd status: nothing answers on {nowhere}: forkd is not running there.\n")
    assert f"No forkd listens on {tmp_path}/forkd.sock either: start it with 'forkd -c {file}'." in error


def test_a_daemon_without_metrics_is_recognised(
    tmp_path: Path, nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "forkd.sock.lock").write_text("4711\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "forkd.sock"))
        listener.listen()
        assert main(["status", "-c", configuration(tmp_path, nowhere), "--once"]) == 3
    error = capsys.readouterr().err
    assert f"forkd (pid 4711) listens on {tmp_path}/forkd.sock, so it runs without metrics" in error


def test_metrics_are_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "-c", configuration(tmp_path, "127.0.0.1:1", enabled=False)]) == 3
    assert "metrics are switched off" in capsys.readouterr().err


def test_a_port_that_only_the_log_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "-c", configuration(tmp_path, "127.0.0.1:0")]) == 3
    assert "--addr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"<html>hello", 200), (b"{}", 200), (b"[1]", 200), (b"\xff", 200), (b"", 200), (b"{}", 404), (b"no", 500)],
)
def test_somebody_else_answers(body: bytes, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(body, code) as address:
        assert main(["status", "--addr", address, "--json"]) == 3
    said = capsys.readouterr()
    assert (said.out, "is not forkd" in said.err) == ("", True)


def test_somebody_speaks_another_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                peer.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        assert main(["status", "--addr", f"127.0.0.1:{server.getsockname()[1]}", "--once"]) == 3
        thread.join()
    assert "is not forkd" in capsys.readouterr().err


def test_somebody_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(status, "TIMEOUT_SECS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert main(["status", "--addr", f"127.0.0.1:{server.getsockname()[1]}", "--once"]) == 3
    assert "no answer" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70])
def test_no_such_host(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--addr", f"{host}:9090", "--once"]) == 3
    assert capsys.readouterr().err.startswith("forkd status: ")


def test_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch, nowhere: str) -> None:
    monkeypatch.setenv("http_proxy", f"http://{nowhere}")
    with answering(json.dumps(STATUS).encode()) as address:
        assert main(["status", "--addr", address, "--json"]) == 0


def test_a_wrong_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "forkd.yaml"
    file.write_text("workers: {count: many}\n")
    assert main(["status", "-c", str(file)]) == 2
    assert "workers.count" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--addr", "nonsense"], ["--often"], ["x"]])
def test_a_wrong_command_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["status", *arguments])
    assert caught.value.code == 2


def test_a_reader_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with answering(json.dumps(STATUS).encode()) as address, open(write_end, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert main(["status", "--addr", address, "--json"]) == 0
