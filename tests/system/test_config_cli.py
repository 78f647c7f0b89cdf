"""The command line, the environment, and the socket: who may have it, and that it is never taken from the living."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import forkd
from tests.harness import Forkd, connect, read_answer, running, send, wait_for

FORKD = (sys.executable, "-m", "forkd")
QUICK: dict[str, Any] = {"backends": {"mock": {"provider": "mock", "token_delay_ms": 0}}, "workers": {"count": 1}}


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run forkd to its end, which must come by itself."""
    return subprocess.run(
        [*FORKD, *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, **environment},
    )


def check_refused(ended: "subprocess.CompletedProcess[str]", status: int, *said: str) -> None:
    """It ended with this status and said so much on stderr, in plain words."""
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    for words in said:
        assert words in ended.stderr
    assert "Traceback" not in ended.stderr


@contextmanager
def bare(path: Path, *arguments: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A forkd that is told nothing but its socket's path, by flag or by environment."""
    process = subprocess.Popen(
        [*FORKD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        wait_for(lambda: listens(path) or process.poll() is not None, "the socket")
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)
        process.communicate(timeout=20)


def listens(path: Path) -> bool:
    try:
        connect(path).close()
    except OSError:  # not there yet, or bound and not yet listening
        return False
    return True


def ask(path: Path, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> bool:
    client, server = socket.socketpair()
    with server, connect(path, kind) as sender:
        send(sender, b'{"prompt":"a"}', server.fileno())
    return read_answer(client).complete


# Words, and nothing else.


def test_help_says_what_there_is() -> None:
    ended = run("-h")
    assert ended.returncode == 0
    assert ended.stderr == ""
    for words in (
        "--config",
        "--socket",
        "--backend",
        "--workers",
        "--debug",
        "--benchmark",
        "--version",
        "forkd demo",
    ):
        assert words in ended.stdout
    for name in ("TERM", "QUIT", "HUP", "USR1", "TTIN"):
        assert name in ended.stdout


def test_version() -> None:
    ended = run("-V")
    assert (ended.returncode, ended.stdout) == (0, f"forkd {forkd.__version__} (compiled)\n")


def test_a_wrong_command_line(tmp_path: Path) -> None:
    check_refused(run("--nonesuch"), 2, "--nonesuch", "usage:")
    check_refused(run("-c", "a", "b"), 2, "once")
    check_refused(run("a", "b"), 2, "usage:")
    check_refused(run("-w", "many"), 2, "workers.count (command line)", "many")
    check_refused(run("-w", "0"), 2, "workers.count (command line)")
    check_refused(run("-b", "nonesuch"), 2, "default_backend (command line)", "mock")
    check_refused(run("-s", "/tmp/" + "x" * 108), 2, "server.socket_path (command line)", "107")
    check_refused(run("-c", str(tmp_path / "nonesuch.yaml")), 2, "nonesuch.yaml")
    check_refused(run("stauts"), 2, "stauts is neither a subcommand nor a file; did you mean forkd status?")
    check_refused(run("reload"), 2, "reload is neither a subcommand nor a file; forkd -h tells what there is")


def test_a_wrong_file_has_every_fault_named(tmp_path: Path) -> None:
    file = tmp_path / "forkd.yaml"
    file.write_text("server: {socket_paht: /x, linger_secs: long}\nworkers: {count: -1}\ndefault_backend: nonesuch\n")
    check_refused(
        run(str(file)),
        2,
        str(file),
        "server.socket_paht",
        "socket_path",
        "server.linger_secs",
        "workers.count",
        "nonesuch",
    )
    check_refused(run("-c", str(file), DAEMON_LOG_LEVEL="loud"), 2, "DAEMON_LOG_LEVEL", "workers.count")


# Places that cannot be had.


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    file = tmp_path / "forkd.yaml"
    file.write_text(f"logging: {{file: {tmp_path}}}\nserver: {{socket_path: {tmp_path}/s}}\n")
    check_refused(run("-c", str(file)), 1, "cannot open the log", str(tmp_path))


def test_a_log_file_says_too_why_forkd_did_not_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = tmp_path / "forkd.yaml"
    config.write_text(f"logging: {{file: {tmp_path}/log}}\nmetrics: {{enabled: false}}\n")
    check_refused(run("-c", str(config), "-s", str(tmp_path / "file")), 1, "exists and is no socket")
    assert f"cannot start: {tmp_path}/file exists and is no socket" in (tmp_path / "log").read_text()


def test_a_path_where_no_socket_can_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    check_refused(run("-s", str(file)), 1, str(file), "no socket")
    assert file.read_text() == "precious"
    check_refused(run("-s", str(file / "below")), 1, str(file / "below"))
    link = tmp_path / "link"
    link.symlink_to(file)
    check_refused(run("-s", str(link)), 1, "no socket")
    assert link.is_symlink()
    (tmp_path / "s.lock").symlink_to(file)
    check_refused(run("-s", str(tmp_path / "s")), 1, "s.lock")
    assert file.read_text() == "precious"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "seqpacket"])
def test_another_programs_socket_is_left_alone(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        other.listen()
        check_refused(run("-s", str(path)), 1, str(path), "in use by another program")
        with connect(path, kind) as client:
            client.send(b"hello")
            heard = [other.accept()[0].recv(5)]
            if not heard[0]:  # that was forkd, looking whether anybody is there
                heard.append(other.accept()[0].recv(5))
            assert heard[-1] == b"hello"


def test_too_few_fds_to_do_anything(tmp_path: Path) -> None:
    keep_down = ("setpriv", "--bounding-set", "-sys_resource") if os.geteuid() == 0 else ()
    command = ["prlimit", "--nofile=40:40", *keep_down, *FORKD, "-w", "2", "-s", str(tmp_path / "s")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    check_refused(ended, 1, "open files", "40")
    assert not (tmp_path / "s").exists()


# The living and the dead.


def test_a_living_daemons_socket_is_never_taken(tmp_path: Path) -> None:
    with running(tmp_path, config=QUICK) as daemon:
        before = os.stat(daemon.path)
        check_refused(run("-s", daemon.path), 1, daemon.path, f"pid {daemon.pid}")
        # Nor when its socket's file has gone, and a new one would be easy to make.
        os.unlink(daemon.path)
        check_refused(run("-s", daemon.path), 1, daemon.path, f"pid {daemon.pid}")
        assert not os.path.exists(daemon.path)
    assert stat.S_ISSOCK(before.st_mode)


def test_a_living_daemon_serves_on_meanwhile(tmp_path: Path) -> None:
    with running(tmp_path, config=QUICK) as daemon, daemon.counting():
        for _ in range(2):
            check_refused(run("-s", daemon.path), 1)
            assert daemon.ask().complete


def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path, config=QUICK) as dead:
        workers = [psutil.Process(pid) for pid in dead.workers()]
        dead.stop(signal.SIGKILL)
        psutil.wait_procs(workers, timeout=20)
    assert stat.S_ISSOCK(os.stat(dead.path).st_mode)
    (tmp_path / "forkd.log").unlink()
    with running(tmp_path, config=QUICK) as daemon:
        assert daemon.ask().complete
        assert daemon.stop() == 0
    assert not Path(daemon.path).exists()


def test_a_path_that_somebody_else_took_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with running(tmp_path, config=QUICK) as daemon:
        Path(daemon.path).unlink()
        Path(daemon.path).write_text("not ours")
        assert daemon.stop() == 0
        assert Path(daemon.path).read_text() == "not ours"


# The socket.


@pytest.mark.parametrize(("written", "mode"), [("0600", 0o600), (660, 0o660), ("0o666", 0o666)])
def test_the_sockets_mode_and_group(tmp_path: Path, written: Any, mode: int) -> None:
    group = 12345 if os.geteuid() == 0 else os.getegid()
    server = {"socket_mode": written, "socket_group": group}
    with running(tmp_path, config={**QUICK, "server": server}, popen={"umask": 0o022}) as daemon:
        found = os.stat(daemon.path)
        assert stat.S_IMODE(found.st_mode) == mode
        assert found.st_gid == group
        assert daemon.ask().complete


def test_a_stream_listener_and_others_beside_it(tmp_path: Path) -> None:
    listeners = [
        {"path": str(tmp_path / "second.sock"), "mode": "0666"},
        {"path": str(tmp_path / "third.sock"), "type": "stream", "backend": "other"},
    ]
    backends = {**QUICK["backends"], "other": {"provider": "mock", "text": "other words", "token_delay_ms": 0}}
    config = {**QUICK, "server": {"socket_type": "stream"}, "listeners": listeners, "backends": backends}
    with running(tmp_path, config=config) as daemon:
        assert ask(Path(daemon.path), socket.SOCK_STREAM)
        assert ask(tmp_path / "second.sock")
        client, server = socket.socketpair()
        with server, connect(tmp_path / "third.sock", socket.SOCK_STREAM) as sender:
            # One handoff, in pieces; the fd comes with any of them.
            sender.send(b'{"pro')
            send(sender, b'mpt":', server.fileno())
            sender.send(b'"a"}')
        answer = read_answer(client)
        assert answer.text == "other words"
        with pytest.raises(OSError, match="wrong type"):
            connect(daemon.path)
        assert stat.S_IMODE(os.stat(tmp_path / "second.sock").st_mode) == 0o666
        assert daemon.stop() == 0
    assert not list(tmp_path.glob("*.sock"))


def test_when_one_listener_cannot_be_had_none_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    file = tmp_path / "forkd.yaml"
    server = {"socket_path": str(tmp_path / "first.sock")}
    file.write_text(json.dumps({"server": server, "listeners": [{"path": str(tmp_path / "taken")}]}))
    check_refused(run(str(file)), 1, "taken")
    assert not (tmp_path / "first.sock").exists()


# Nothing but flags, and the environment.


def test_forkd_alone_runs_the_mock_backend(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "forkd.sock"
    with bare(path, "-s", str(path), "-w", "1", "-d", DAEMON_METRICS_ENABLED="false") as process:
        assert ask(path)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert output == ""
    assert " DEBUG " in errors
    assert errors.count(" ACCESS ") == 1
    assert not path.exists()


def test_benchmark_prints_the_references_summary(tmp_path: Path) -> None:
    path = tmp_path / "s"
    quick = {"DAEMON_TOKEN_DELAY_MS": "0"}
    with bare(path, "-s", str(path), "-w", "1", "--benchmark", **quick) as process:
        assert ask(path)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    lines = dict(line.split(": ") for line in output.splitlines() if ": " in line)
    assert lines["Total started"] == lines["Total completed"] == lines["Peak concurrent streams"] == "1"
    assert lines["Total failed"] == "0"
    assert int(lines["Total bytes sent"]) > 500
    assert "metrics on" not in errors


def test_the_environment_is_over_the_file_and_flags_over_both(tmp_path: Path) -> None:
    by_file, by_environment, by_flag = (tmp_path / name for name in ("file", "environment", "flag"))
    file = tmp_path / "forkd.yaml"
    file.write_text(json.dumps({"server": {"socket_path": str(by_file)}, **QUICK, "metrics": {"enabled": False}}))
    environment = {"DAEMON_SOCKET_PATH": str(by_environment), "DAEMON_SOCKET_MODE": "0666", "DAEMON_LOG_FORMAT": "json"}
    with bare(by_environment, str(file), **environment) as process:
        assert ask(by_environment)
        assert stat.S_IMODE(by_environment.stat().st_mode) == 0o666
        assert not by_file.exists()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    records = [json.loads(line) for line in errors.splitlines()]
    assert [record["status"] for record in records if record["level"] == "ACCESS"] == [200]
    more = {"DAEMON_HANDOFF_BUFFER_SIZE": "65536", "DAEMON_MAX_CONECTIONS": "5", "DAEMON_LOG_LEVEL": ""}
    with bare(by_flag, "-c", str(file), "-s", str(by_flag), **{**environment, **more}) as process:
        assert ask(by_flag)
        assert not by_environment.exists()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    messages = [json.loads(line).get("message", "") for line in errors.splitlines()]
    assert any("DAEMON_HANDOFF_BUFFER_SIZE is ignored" in message for message in messages)
    assert any("did you mean DAEMON_MAX_CONNECTIONS?" in message for message in messages)


def test_metrics_can_be_left_out(tmp_path: Path) -> None:
    with running(tmp_path, config={**QUICK, "metrics": {"enabled": False}}) as daemon:
        assert daemon.ask().complete
        assert not (tmp_path / "metrics").exists()
        assert "metrics on" not in daemon.log()


def test_it_is_seen_in_ps_as_what_it_is(tmp_path: Path) -> None:
    with running(tmp_path, config=QUICK) as daemon:

        def titles(process: Forkd) -> set[str]:
            master = psutil.Process(process.pid)
            return {" ".join(each.cmdline()).strip() for each in (master, *master.children())}

        wanted = f"forkd: master [{tmp_path}/forkd.yaml] workers=1 streams=0"
        wait_for(lambda: {wanted, "forkd: worker 1 [gen 1] streams=0"} <= titles(daemon), "the titles")
