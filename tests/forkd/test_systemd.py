"""Notifications, the watchdog's interval and passed sockets, with real sockets. systemd itself is not asked."""

import fcntl
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkd import systemd
from forkd.systemd import Passed
from tests.harness import own_fds

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECS = 20.0


@pytest.fixture(autouse=True)
def no_fd_leaks() -> Iterator[None]:
    before = own_fds()
    yield
    assert own_fds() == before


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """What listens at NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(PATIENCE_SECS)
        yield sock


def environ_of(manager: socket.socket) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname()}


# Notifications.


def test_a_line_goes_out_as_it_is(manager: socket.socket) -> None:
    assert systemd.notify("READY=1\nSTATUS=ready", environ_of(manager))
    assert manager.recv(4096) == b"READY=1\nSTATUS=ready"


def test_a_mapping_goes_out_as_lines(manager: socket.socket) -> None:
    assert systemd.notify({"READY": 1, "STATUS": "812 streams – ok", "MAINPID": 4711}, environ_of(manager))
    assert manager.recv(4096) == "READY=1\nSTATUS=812 streams – ok\nMAINPID=4711".encode()


def test_a_value_cannot_begin_another_variable(manager: socket.socket) -> None:
    systemd.notify({"STATUS": "a\nMAINPID=1\n", "WATCHDOG": 1}, environ_of(manager))
    assert manager.recv(4096) == b"STATUS=a MAINPID=1 \nWATCHDOG=1"


def test_what_is_no_text_is_replaced(manager: socket.socket) -> None:
    assert systemd.notify({"STATUS": "\udcff"}, environ_of(manager))
    assert manager.recv(4096) == b"STATUS=?"


def test_an_abstract_address() -> None:
    name = f"forkd-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(b"\0" + name.encode())
        assert systemd.notify("WATCHDOG=1", {"NOTIFY_SOCKET": f"@{name}"})
        assert sock.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1234", "@", "/", "/\0", "/" + "x" * 200, "/gone/x"])
def test_without_a_manager_nothing_happens(address: str | None) -> None:
    assert not systemd.notify("READY=1", {} if address is None else {"NOTIFY_SOCKET": address})


def test_a_manager_that_does_not_read_blocks_nobody(manager: socket.socket) -> None:
    environ = environ_of(manager)
    sent = 0
    while systemd.notify("WATCHDOG=1", environ):
        sent += 1
        assert sent < 1_000_000
    assert sent
    manager.recv(4096)
    assert systemd.notify("WATCHDOG=1", environ)


def test_no_fd_left(manager: socket.socket) -> None:
    environ = environ_of(manager)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        assert not systemd.notify("WATCHDOG=1", environ)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert systemd.notify("WATCHDOG=1", environ)


def test_a_reload_tells_when(manager: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    assert systemd.notify({**systemd.reloading(), "STATUS": "reloading"}, environ_of(manager))
    lines = dict(line.split("=", 1) for line in manager.recv(4096).decode().split("\n"))
    assert lines["RELOADING"] == "1"
    assert before <= int(lines["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert lines["STATUS"] == "reloading"


# The watchdog.


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
        ({"WATCHDOG_PID": "42"}, None),
    ],
)
def test_the_watchdogs_interval(environ: dict[str, str], expected: float | None) -> None:
    assert systemd.watchdog_secs(environ, 42) == expected


# Sockets.

INSPECT = """
import fcntl, json, os, sys
from forkd import systemd
try:
    passed = systemd.listen_fds(os.environ, os.getpid())
except ValueError as error:
    print(json.dumps({"fault": str(error)}))
else:
    closing = [bool(fcntl.fcntl(each.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC) for each in passed]
    print(json.dumps({"passed": passed, "closing": closing}))
"""


def activate(fds: list[int], **environ: str) -> str:
    """Start a process with these fds from 3 on, as systemd would, and return what it makes of them."""

    def place() -> None:
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
        for index, fd in enumerate(high):
            os.dup2(fd, systemd.FIRST_FD + index)

    # The shell's exec keeps the pid, which LISTEN_PID must name.
    command = 'LISTEN_PID=$$ exec "$@"'
    done = subprocess.run(
        ["/bin/sh", "-c", command, "sh", sys.executable, "-c", INSPECT],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECS,
        close_fds=False,
        preexec_fn=place,
        cwd=ROOT,
        env={**os.environ, "LISTEN_FDS": str(len(fds)), **environ},
    )
    return done.stdout.strip()


def listening(path: str | bytes, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    sock.listen(5)
    return sock


def test_sockets_are_passed_on(tmp_path: Path) -> None:
    packets, stream, abstract = str(tmp_path / "a"), str(tmp_path / "b"), f"forkd-test-{os.getpid()}"
    with (
        listening(packets, socket.SOCK_SEQPACKET) as first,
        listening(stream, socket.SOCK_STREAM) as second,
        listening(b"\0" + abstract.encode(), socket.SOCK_SEQPACKET) as third,
    ):
        fds = [each.fileno() for each in (first, second, third)]
        said = activate(fds, LISTEN_FDNAMES="forkd.socket:old")
    assert said == (
        f'{{"passed": [[3, "{packets}", "seqpacket", "forkd.socket"], [4, "{stream}", "stream", "old"], '
        f'[5, "@{abstract}", "seqpacket", ""]], "closing": [true, true, true]}}'
    )


def unix_not_listening(_: Path) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def unix_datagram(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path / "d"))
    return sock


def tcp(_: Path) -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (unix_not_listening, "does not listen (forkd needs Accept=no)"),
        (unix_datagram, "has neither of the types SOCK_SEQPACKET and SOCK_STREAM"),
        (tcp, "is no Unix socket (ListenSequentialPacket= or ListenStream= takes a path)"),
    ],
)
def test_sockets_of_other_kinds_are_refused(tmp_path: Path, make: Callable[[Path], socket.socket], fault: str) -> None:
    with make(tmp_path) as sock, listening(str(tmp_path / "good"), socket.SOCK_SEQPACKET) as good:
        said = activate([good.fileno(), sock.fileno()], LISTEN_FDNAMES="good:bad")
    assert said == f'{{"fault": "fd 4 (bad) from systemd: {fault}"}}'


def test_what_is_no_socket_is_refused() -> None:
    with open(os.devnull) as file:
        said = activate([file.fileno()])
    assert said == '{"fault": "fd 3 from systemd: Socket operation on non-socket"}'


def test_every_fault_is_named(tmp_path: Path) -> None:
    with unix_not_listening(tmp_path) as first, tcp(tmp_path) as second:
        said = activate([first.fileno(), second.fileno()])
    assert "fd 3 from systemd: does not listen" in said
    assert "; fd 4 from systemd: is no Unix socket" in said


def test_a_closed_fd_is_a_fault() -> None:
    said = activate([], LISTEN_FDS="1")
    assert said == '{"fault": "fd 3 from systemd: Bad file descriptor"}'


@pytest.mark.parametrize("count", ["", "-1", "many", "1025", "9" * 30, "²"])
def test_a_wrong_number_is_a_fault(count: str) -> None:
    with pytest.raises(ValueError, match=f"LISTEN_FDS: expected a number up to 1024, got '{count}'"):
        systemd.listen_fds({"LISTEN_PID": "42", "LISTEN_FDS": count}, 42)


@pytest.mark.parametrize("pid", [None, "", "43", "-42"])
def test_sockets_for_another_process_are_not_ours(pid: str | None) -> None:
    environ = {"LISTEN_FDS": "1"} | ({} if pid is None else {"LISTEN_PID": pid})
    assert systemd.listen_fds(environ, 42) == []


def test_no_sockets() -> None:
    assert systemd.listen_fds({"LISTEN_PID": "42", "LISTEN_FDS": "0"}, 42) == []


def test_the_fd_stays_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(str(tmp_path / "s"), socket.SOCK_STREAM) as sock:
        monkeypatch.setattr(systemd, "FIRST_FD", sock.fileno())
        found = systemd.listen_fds({"LISTEN_PID": "42", "LISTEN_FDS": "1"}, 42)
        assert found == [Passed(sock.fileno(), str(tmp_path / "s"), "stream", "")]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


# Environments.

EVERYTHING = {
    "PATH": "/bin",
    "NOTIFY_SOCKET": "/run/systemd/notify",
    "WATCHDOG_USEC": "30000000",
    "WATCHDOG_PID": "42",
    "LISTEN_FDS": "1",
    "LISTEN_PID": "42",
    "LISTEN_FDNAMES": "forkd.socket",
}


def test_a_successor_is_watched_and_passed_no_sockets() -> None:
    environ = systemd.for_successor(EVERYTHING)
    assert environ == {"PATH": "/bin", "NOTIFY_SOCKET": "/run/systemd/notify", "WATCHDOG_USEC": "30000000"}
    assert systemd.watchdog_secs(environ, 43) == 30.0
    assert systemd.listen_fds(environ, 42) == []


def test_a_program_cannot_speak_for_forkd() -> None:
    assert systemd.for_program(EVERYTHING) == {"PATH": "/bin"}
