"""`forkd send`: what it prints, where, and with which exit status; beside a real daemon, and an odd one."""

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fake_daemon import HEAD, FakeDaemon
from tests.harness import PATIENCE_SECS, Forkd, connect, running
from tests.system.crowd import BACKENDS, WHOLE

FORKD = (sys.executable, "-m", "forkd", "send")
HELLO = '{"prompt":"Hello"}'


@pytest.fixture(scope="module")
def forkd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkd]:
    directory = tmp_path_factory.mktemp("send")
    listeners = [
        {"path": str(directory / "stream"), "type": "stream"},
        {"path": str(directory / "fdpass"), "protocol": "fdpass"},
        {"path": str(directory / "raw"), "envelope": False},
        {"path": str(directory / "forbidden"), "allow_users": [1]},
    ]
    dead = {"provider": "openai", "api_base": "http://127.0.0.1:1", "retries": 0}
    quick = {"provider": "typing", "token_delay_ms": 0}
    backends = {**BACKENDS, "dead": dead, "echo": quick, "flushed": dict(quick)}
    with running(directory, config={"workers": {"count": 1}, "listeners": listeners, "backends": backends}) as daemon:
        yield daemon


@pytest.fixture
def flushed(forkd: Forkd) -> None:
    """What the tests before have counted is written: the worker writes all its counts at once."""
    before = forkd.metric("daemon_backend_requests_total", backend="flushed")
    assert forkd.ask(b'{"prompt":"x","backend":"flushed"}').complete
    forkd.wait_for_metric("daemon_backend_requests_total", before + 1, backend="flushed")


def send(*arguments: str, given: bytes | None = None, **environ: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [*FORKD, *arguments],
        input=given,
        capture_output=True,
        timeout=PATIENCE_SECS,
        check=False,
        env={**os.environ, **environ},
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def outcome(done: "subprocess.CompletedProcess[str]") -> tuple[int, str]:
    return done.returncode, done.stdout


def test_the_text_is_printed(forkd: Forkd, tmp_path: Path) -> None:
    with forkd.counting():
        assert outcome(send("-s", forkd.path, HELLO)) == (0, WHOLE + "\n")
        assert outcome(send("-c", str(forkd.directory / "forkd.yaml"), HELLO)) == (0, WHOLE + "\n")
        assert outcome(send(HELLO, DAEMON_SOCKET_PATH=forkd.path)) == (0, WHOLE + "\n")
        assert outcome(send("-s", str(forkd.directory / "stream"), HELLO)) == (0, WHOLE + "\n")
        assert outcome(send("-s", str(forkd.directory / "raw"), "--no-envelope", HELLO)) == (0, WHOLE + "\n")
        long = json.dumps({"prompt": "Grüße " * 20_000, "backend": "echo"})  # by memfd
        for where in ("stream", "forkd.sock"):
            done = send("-s", str(forkd.directory / where), "-", given=long.encode())
            assert done.returncode == 0
            assert "Grüße Grüße" in done.stdout
    assert "answered with defaults" not in forkd.log()


def test_raw_is_every_byte(forkd: Forkd) -> None:
    done = send("--raw", "-s", forkd.path, '{"prompt":"x","request_id":"my-id"}')
    assert done.returncode == 0
    assert done.stdout.startswith("HTTP/1.1 200 OK\r\n")
    assert "X-Request-Id: my-id\r\n" in done.stdout
    assert done.stdout.endswith("data: [DONE]\n\nevent: done\ndata: {}\n\n")


@pytest.mark.usefixtures("flushed")
def test_a_piece_is_printed_when_it_comes_and_ctrl_c_ends_the_stream(forkd: Forkd) -> None:
    command = [*FORKD, "-s", forkd.path, '{"prompt":"x","backend":"still"}']
    with (
        forkd.counting(stream_client_disconnected=1),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(7) == b"Hello! "
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"\n"
        assert process.stderr.read() == b""
    assert process.returncode == 130


@pytest.mark.usefixtures("flushed")
def test_a_reader_that_goes_ends_the_stream(forkd: Forkd) -> None:
    command = [*FORKD, "-s", forkd.path, '{"prompt":"x","backend":"steady"}']
    with (
        forkd.counting(stream_client_disconnected=1),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(7) == b"Hello! "
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            '{"prompt":"x","backend":"nope"}',
            "400 unknown_backend: The backend named in the handoff data does not exist",
        ),
        ('{"prompt":"x","backend":"dead"}', "502 backend_unavailable: Backend unavailable"),
        ('{"backend":"dead"}', "400 no_prompt: The handoff data has no prompt"),
    ],
)
def test_an_error_is_told(forkd: Forkd, data: str, says: str) -> None:
    done = send("-s", forkd.path, data)
    assert outcome(done) == (1, "")
    assert done.stderr.startswith(f"forkd send: {says}")
    assert "(request id send-" in done.stderr


@pytest.mark.parametrize("where", ["fdpass", "forbidden"])
def test_a_daemon_that_does_not_want_it(forkd: Forkd, where: str) -> None:
    done = send("-s", str(forkd.directory / where), HELLO)
    assert done.returncode in (1, 3)  # whether it was refused before or after it was sent
    assert done.stdout == ""
    assert re.search("ended without an answer|reset|closed the connection", done.stderr)


def test_nobody_there(forkd: Forkd, tmp_path: Path) -> None:
    path = tmp_path / "s"
    done = send("-s", str(path), HELLO)
    assert outcome(done) == (3, "")
    assert done.stderr == (
        f"forkd send: {path}: there is no such socket.\n"
        "Is forkd running? 'forkd' starts it; -s names another socket, -c the daemon's configuration\n"
    )
    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).bind(str(path))
    done = send("-s", str(path), HELLO)
    assert done.returncode == 3
    assert "whoever listened there is gone" in done.stderr
    (tmp_path / "file").touch()
    done = send("-s", str(tmp_path / "file"), HELLO)
    assert (done.returncode, done.stderr) == (3, f"forkd send: {tmp_path}/file: this is no socket\n")
    for odd in ("/" + "x" * 200, str(tmp_path)):
        done = send("-s", odd, HELLO)
        assert done.returncode == 3
        assert done.stderr.startswith(f"forkd send: {odd}: ")


def test_a_daemon_that_hangs(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        with connect(tmp_path / "s"):
            done = send("-s", str(tmp_path / "s"), HELLO)
    assert done.returncode == 3
    assert "accepts nothing" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try as somebody else")
def test_a_socket_that_is_not_ones_own(open_directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(open_directory / "s"))
        os.chmod(open_directory / "s", 0o660)
        listener.listen()
        command = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            *FORKD,
            "-s",
            str(open_directory / "s"),
            HELLO,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECS, check=False)
    assert done.returncode == 3
    assert "you may not write to this socket (mode 0660, user root, group root)" in done.stderr


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("Hello", """did you mean '{"prompt":"Hello"}'?"""),
        ('{"prompt":', "the data is not JSON ("),
        ("[1]", "the data is not a JSON object"),
        ("", "the data is not JSON ("),
        ('{"a":' + "[" * 100_000, "the data is not JSON ("),
    ],
)
def test_data_that_no_application_would_send(data: str, says: str) -> None:
    done = send("-s", "/nowhere", "-", given=data.encode())
    assert outcome(done) == (2, "")
    assert says in done.stderr


def test_a_wrong_command_line_or_configuration(tmp_path: Path) -> None:
    for arguments in ([], ["-s", "/x", "-c", "/y", HELLO], ["--row", HELLO]):
        assert send(*arguments).returncode == 2
    (tmp_path / "f").write_text(yaml.safe_dump({"server": {"socket_pth": "/x"}}))
    done = send("-c", str(tmp_path / "f"), HELLO)
    assert done.returncode == 2
    assert "did you mean server.socket_path?" in done.stderr
    assert 'forkd send \'{"prompt"' in send("--help").stdout


# A daemon that says what the test wants.


def answered(tmp_path: Path, answer: bytes, *arguments: str, reset: bool = False) -> "subprocess.CompletedProcess[str]":
    with FakeDaemon(tmp_path / "s") as daemon:
        command = [*FORKD, "-s", str(tmp_path / "s"), *arguments, HELLO]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            handoff = daemon.take()
            handoff.say(answer)
            handoff.end(reset=reset)
            stdout, stderr = process.communicate(timeout=PATIENCE_SECS)
    assert "Traceback" not in stderr, stderr
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


END = b"data: [DONE]\n\nevent: done\ndata: {}\n\n"


@pytest.mark.parametrize(
    ("answer", "status", "printed", "says"),
    [
        (HEAD + b": c\n\ndata: one\n\ndata: 2\n\n" + END, 0, "one2\n", ""),  # format: text
        (HEAD + b'data: {"content":"a\\nb\\n"}\n\nevent: usage\ndata: {}\n\n' + END, 0, "a\nb\n", ""),
        (HEAD + END, 0, "", ""),
        (HEAD + b'data: {"content":"half"}\n\n', 1, "half\n", "the answer broke off"),
        (HEAD + b'data: {"content":"half"}\n\nevent: error\ndata: oops\n\n', 1, "half\n", "forkd send: oops"),
        (
            HEAD + b'event: error\ndata: {"error":"Too bad","code":"worker_lost","request_id":"r"}\n\n',
            1,
            "",
            "forkd send: worker_lost: Too bad (request id r)",
        ),
        (HEAD + b'event: message_stop\ndata: {"type":"x"}\n\n', 0, "", "none of the 1 events has text in it; --raw"),
        (HEAD + b'data: {"choices":[]}\n\ndata: [DONE]\n\n', 0, "", "none of the 1 events has text in it; --raw"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nas it is", 0, "as it is\n", ""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 0, "", ""),
        (b"HTTP/1.1 418 Hm\r\nContent-Type: text/html\r\n\r\n<p>", 1, "", "forkd send: 418 I'm a Teapot"),
        (b"HTTP/1.1 200 OK\r\nConten", 1, "", "ended in its head"),
        (b"HTTP/garbage\r\n\r\nx", 1, "", "begins with no status line: 'HTTP/garbage'"),
        (b" _ _\n| | |\n", 0, " _ _\n| | |\n", ""),  # a program that speaks no HTTP
        (b"HTT", 1, "", "ended in its head"),
        (b"", 1, "", "ended without an answer"),
        (HEAD + b"data: " + b"x" * (9 << 20), 1, "", "an event is larger than"),
    ],
    ids=lambda value: repr(value[-30:]) if isinstance(value, bytes) else "",
)
def test_what_becomes_of_an_answer(tmp_path: Path, answer: bytes, status: int, printed: str, says: str) -> None:
    done = answered(tmp_path, answer)
    assert outcome(done) == (status, printed)
    assert says in done.stderr
    assert bool(says) == bool(done.stderr)


def test_raw_that_is_empty_is_a_failure(tmp_path: Path) -> None:
    assert outcome(answered(tmp_path, b"any\x00thing", "--raw")) == (0, "any\x00thing")
    (tmp_path / "s").unlink(missing_ok=True)
    assert outcome(answered(tmp_path, b"", "--raw")) == (1, "")


def test_a_terminal_gets_no_control_characters(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with FakeDaemon(tmp_path / "s") as daemon:
        with subprocess.Popen([*FORKD, "-s", str(tmp_path / "s"), HELLO], stdout=theirs) as process:
            os.close(theirs)
            handoff = daemon.take()
            handoff.say(HEAD + 'data: {"content":"Grüße\\u001b]0;x\\u0007"}\n\n'.encode() + END)
            handoff.end()
        got = b""
        while select.select([ours], [], [], PATIENCE_SECS)[0]:
            try:
                got += os.read(ours, 1000)
            except OSError:  # EIO: the other side is closed
                break
        os.close(ours)
    assert process.returncode == 0
    assert got.decode() == "Grüße\N{REPLACEMENT CHARACTER}]0;x\N{REPLACEMENT CHARACTER}\r\n"


def test_nor_does_what_went_wrong_have_any(tmp_path: Path) -> None:
    answer = answered(tmp_path, HEAD + b"event: error\ndata: \x1b]0;x\x07\n\n")
    assert outcome(answer) == (1, "")
    assert answer.stderr == "forkd send: \N{REPLACEMENT CHARACTER}]0;x\N{REPLACEMENT CHARACTER}\n"
