"""Programs that answer streams (`exec`), good and bad: what the client gets, what is counted, what is left behind."""

import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    Answer,
    Forkd,
    connect,
    envelope,
    open_fds,
    read_answer,
    read_answers,
    reset,
    running,
    send,
    tcp_pair,
    wait_for,
)
from tests.system.programs import HEAD, handlers, marked, shell, wait_until_gone

MARK = f"exec-tests-{os.getpid()}"
MARKED = {"environment": {"MARK": MARK}}
BACKENDS = {
    "environment": shell("env -0", pass_environment=["WANTED"], environment={"ADDED": "a b", "PORT": 8080}),
    "self": shell("ls /proc/self/fd | xargs; pwd; grep -E '^Sig(Blk|Ign)' /proc/self/status", directory="/"),
    "flags": shell("cat /proc/$$/fdinfo/0 /proc/$$/fdinfo/1"),
    "data": shell(
        'if [ "$HANDOFF_DATA_FILE" ]; then printf "file "; cat "$HANDOFF_DATA_FILE"; '
        'else printf "variable %s" "$HANDOFF_DATA"; fi'
    ),
    "stdin": shell('read -r line; echo "$line" again'),
    "stderr": shell("echo one >&2; printf 'two\\033[31m' >&2; yes three | head -n 500 >&2; echo done"),
    "flood": shell("head -c 1500000 /dev/zero | tr '\\0' 'x' >&2; echo done"),
    "missing": {"provider": "exec", "command": ["/nowhere/at-all"]},
    "nameless": {"provider": "exec", "command": ["no-such-program-anywhere"]},
    "plain file": {},
    "no directory": shell("true", directory="/nowhere"),
    "fails at once": shell("exit 3", head=False),
    "mute": shell("exit 0", head=False),
    "killed": shell("kill -9 $$", head=False),
    "late death": shell("echo some; kill -9 $$"),
    "sleeps": shell("sleep 1000", **MARKED),
    "sleeps mute": shell("sleep 1000", head=False, timeout_secs=0.2, **MARKED),
    "times out": shell("echo some; sleep 1000", timeout_secs=0.2, **MARKED),
    "ignores TERM": shell(
        "trap '' TERM; echo some; while :; do sleep 0.05; done", timeout_secs=0.2, kill_after_secs=0.2, **MARKED
    ),
    "cleans up": shell(
        f"trap 'echo cleaned >&2; exit 0' TERM; {HEAD}; while :; do sleep 0.05; done", head=False, **MARKED
    ),
    "endless": shell("exec yes", **MARKED),
    "children": shell("sleep 1000 & sleep 1000 & echo some", **MARKED),
    "closes stdout": shell("exec >&- <&-; sleep 1000", timeout_secs=0.3, **MARKED),
    "stops itself": shell("echo some; kill -STOP $$", timeout_secs=0.2, **MARKED),
    "few": shell("sleep 1000", max_processes=3, **MARKED),
    "other": shell("echo other", max_processes=1),
    "nonblocking": {
        "provider": "exec",
        "command": [
            "python3",
            "-c",
            "import os; os.set_blocking(0, False); os.write(1, b'HTTP/1.1 200 OK\\r\\n\\r\\nx')",
        ],
    },
    "escapes": shell("echo $(setsid sh -c 'echo some; exec sleep 1000 >/dev/null' &)", **MARKED),
}


def asking(backend: str, **more: Any) -> bytes:
    return json.dumps({"prompt": "Hi", "backend": backend, **more}).encode()


@pytest.fixture(scope="module")
def forkd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkd]:
    """One worker's daemon for all tests that leave nothing behind."""
    directory = tmp_path_factory.mktemp("exec")
    file = directory / "plain"
    file.write_text("no program")
    file.chmod(0o644)
    backends = {**BACKENDS, "plain file": {"provider": "exec", "command": [str(file)]}}
    backends |= {
        name.replace(".", "-"): {"provider": "exec", "command": [command, str(path)]}
        for (name, path), command in zip(sorted(handlers(directory).items()), ("php", "python3", "sh"), strict=True)
    }
    settings = {
        "backends": json.loads(json.dumps({name.replace(" ", "-"): own for name, own in backends.items()})),
        "workers": {"count": 1},
        "server": {"linger_secs": 0.1},
    }
    environ = {**os.environ, "OPENAI_API_KEY": "sk-secret-key", "WANTED": "yes", "UNWANTED": "yes"}
    with running(directory, config=settings, popen={"env": environ}) as daemon:
        warm(daemon, "other")
        yield daemon


def warm(daemon: Forkd, *backends: str) -> None:
    """Have each worker start a first program: from then on it has a fd more, by which threads wake it."""
    fds = daemon.idle_fds()
    clients = [daemon.hand_over(asking(backend), tcp=True) for backend in backends or ["own"] * 8]
    for client in clients:
        client.sendall(b"\n")
    read_answers(clients)
    wait_for(lambda: daemon.idle_fds() == (fds[0], *[count + 1 for count in fds[1:]]), "all is closed")


def ask(forkd: Forkd, backend: str, *, tcp: bool = True, **more: Any) -> Answer:
    return forkd.ask(asking(backend.replace(" ", "-"), **more), tcp=tcp)


def body(answer: Answer) -> str:
    assert answer.status == 200
    assert not answer.reset
    return answer.body.decode()


# What a program gets.


@pytest.mark.parametrize("name", ["handler-php", "handler-py", "handler-sh"])
def test_the_handlers_of_the_documentation(forkd: Forkd, name: str) -> None:
    data = asking(name, prompt="tell me more")
    payload = envelope({"method": "GET", "uri": "/x"}, data, response_headers=[["Set-Cookie", "a=b"]])
    with forkd.counting():
        answer = forkd.ask(payload, tcp=True)
    assert answer.status == 200
    assert answer.header("content-type") == "text/event-stream"
    assert answer.header("set-cookie") == "a=b"
    assert answer.complete
    if name == "handler-sh":
        assert [event.data for event in answer.events[:4]] == ["The", "data", "is", data.decode()]
    else:
        assert answer.text == "tell me more "


def test_the_environment_has_no_keys(forkd: Forkd) -> None:
    with forkd.counting():
        data = asking("environment")
        payload = envelope(
            {
                "method": "POST",
                "uri": "/chat",
                "remote_addr": "192.0.2.1",
                "request_id": "r-1",
                "headers": {"X-A": "b"},
            },
            data,
        )
        pairs = dict(line.split("=", 1) for line in body(forkd.ask(payload, tcp=True)).split("\0") if line)
        assert {name: value for name, value in pairs.items() if name.startswith("HANDOFF_")} == {
            "HANDOFF_DATA": data.decode(),
            "HANDOFF_REQUEST_ID": "r-1",
            "HANDOFF_REMOTE_ADDR": "192.0.2.1",
            "HANDOFF_METHOD": "POST",
            "HANDOFF_URI": "/chat",
            "HANDOFF_HEADER_X_A": "b",
        }
        assert (pairs["WANTED"], pairs["ADDED"], pairs["PORT"]) == ("yes", "a b", "8080")
        assert "sk-secret-key" not in str(pairs)
        assert not {"UNWANTED", "OPENAI_API_KEY"} & set(pairs)


def test_it_has_its_own_three_fds_and_every_signal(forkd: Forkd) -> None:
    with forkd.counting():
        others = [forkd.hand_over(tcp=True) for _ in range(5)]
        fds, directory, *masks = body(ask(forkd, "self")).splitlines()
        assert fds.split() == ["0", "1", "2", "3"]  # the last is ls's own
        assert directory == "/"
        assert {int(mask.split()[1], 16) & 0x7FFF_FFFF for mask in masks} == {0}
        read_answers(others)


@pytest.mark.parametrize("tcp", [True, False])
def test_its_socket_blocks(forkd: Forkd, tcp: bool) -> None:
    with forkd.counting():
        flags = re.findall(r"flags:\s+(\d+)", body(ask(forkd, "flags", tcp=tcp)))
        assert len(flags) == 2
        assert not any(int(own, 8) & os.O_NONBLOCK for own in flags)


def sealed(data: bytes) -> int:
    """A memfd as the module makes it."""
    fd = os.memfd_create("data", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize("size", [60_000, 131_058, 131_059, 900_000])
def test_data_of_every_size(forkd: Forkd, size: int) -> None:
    data = asking("data", filler="x" * (size - len(asking("data", filler=""))))
    assert len(data) == size
    with forkd.counting():
        if size < 65536:
            answer = forkd.ask(data, tcp=True)
        else:
            client, server = tcp_pair()
            fd = sealed(data)
            with server, connect(forkd.path) as sender:
                send(sender, envelope({}, b"", flags=1), server.fileno(), fd)
            os.close(fd)
            answer = read_answer(client)
        assert body(answer) == f"{'file' if size > 131_058 else 'variable'} {data.decode()}"


def test_its_stdin_is_what_the_client_sends(forkd: Forkd) -> None:
    with forkd.counting():
        client = forkd.hand_over(asking("stdin"), tcp=True)
        assert client.recv(1, socket.MSG_PEEK)  # it runs; nobody has eaten anything, and nobody does now
        client.sendall(b"a line\n")
        assert body(read_answer(client)) == "a line again\n"


def test_its_stderr_goes_to_the_log(forkd: Forkd) -> None:
    with forkd.counting():
        assert body(ask(forkd, "stderr", request_id="talks")) == "done\n"
        wait_for(lambda: "more lines in a second were left out" in forkd.log(), "the log")
        lines = [
            line.partition("stream talks: program: ")[2]
            for line in forkd.log().splitlines()
            if "stream talks: p" in line
        ]
        assert lines[:3] == ["one", "two\\x1b[31mthree", "three"]
        assert 50 <= len(lines) <= 101
        left_out = sum(int(count) for count in re.findall(r"\((\d+) more lines", "\n".join(lines)))
        assert left_out + sum(line in ("three", "two\\x1b[31mthree") for line in lines) == 500


def test_more_stderr_than_there_is_time_for_holds_up_its_program_alone(forkd: Forkd) -> None:
    with forkd.counting():
        noisy = forkd.hand_over(asking("flood"), tcp=True)
        assert ask(forkd, "mock").complete
        assert body(read_answer(noisy)) == "done\n"


# What a program does.


@pytest.mark.parametrize(
    ("backend", "status", "code"),
    [
        ("missing", 502, "program_unavailable"),
        ("nameless", 502, "program_unavailable"),
        ("plain file", 502, "program_unavailable"),
        ("no directory", 502, "program_unavailable"),
        ("fails at once", 502, "program_mute"),
        ("mute", 502, "program_mute"),
        ("killed", 502, "program_mute"),
        ("sleeps mute", 504, "program_timeout"),
    ],
)
def test_a_program_without_a_word(forkd: Forkd, backend: str, status: int, code: str) -> None:
    with forkd.counting(**{f"stream_{code}": 1}):
        payload = envelope({"uri": "/"}, asking(backend.replace(" ", "-")), response_headers=[["Vary", "Origin"]])
        answer = forkd.ask(payload, tcp=True)
        assert (answer.status, answer.json["code"], answer.reset) == (status, code, False)
        assert answer.header("vary") == "Origin"
        wait_for(lambda: f"request_id={answer.json['request_id']} " in forkd.log(), "its access line")
        wait_until_gone(MARK)


@pytest.mark.parametrize("backend", ["missing", "no directory"])
def test_a_unix_client_too_is_told_what_could_not_be_started(forkd: Forkd, backend: str) -> None:
    with forkd.counting(stream_program_unavailable=1):
        assert ask(forkd, backend, tcp=False).json["code"] == "program_unavailable"


def test_nothing_is_added_to_what_a_unix_client_may_have_read(forkd: Forkd) -> None:
    with forkd.counting(stream_program_failed=2):
        assert ask(forkd, "fails at once", tcp=False).raw == b""
        assert body(ask(forkd, "late death", tcp=False)) == "some\n"


@pytest.mark.parametrize(
    ("backend", "code"),
    [
        ("late death", "program_failed"),
        ("times out", "program_timeout"),
        ("ignores TERM", "program_timeout"),
        ("closes stdout", "program_timeout"),
        ("stops itself", "program_timeout"),
    ],
)
def test_nothing_is_added_to_what_a_program_wrote(forkd: Forkd, backend: str, code: str) -> None:
    with forkd.counting(**{f"stream_{code}": 1}):
        assert body(ask(forkd, backend)) in ("some\n", "")
        wait_until_gone(MARK)


@pytest.mark.parametrize("tcp", [True, False])
def test_what_it_leaves_running_does_not_hold_up_the_end(forkd: Forkd, tcp: bool) -> None:
    with forkd.counting():
        assert body(ask(forkd, "children", tcp=tcp)) == "some\n"
        wait_until_gone(MARK)


def test_one_that_leaves_its_group_is_let_go_and_the_client_sees_the_end_all_the_same(forkd: Forkd) -> None:
    with forkd.counting():
        assert body(ask(forkd, "escapes")) == "some\n"
        (pid,) = wait_for(lambda: marked(MARK), "it lives")
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(MARK)


def test_one_that_changes_the_sockets_flags_harms_nobody(forkd: Forkd) -> None:
    with forkd.counting():
        assert body(ask(forkd, "nonblocking")) == "x"


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("backend", ["sleeps", "endless", "cleans up"])
def test_a_client_that_goes_ends_its_program(forkd: Forkd, backend: str, tcp: bool) -> None:
    with forkd.counting(stream_client_disconnected=1):
        client = forkd.hand_over(asking(backend.replace(" ", "-"), request_id=f"{backend[0]}-{tcp}"), tcp=tcp)
        assert client.recv(1)
        client.close()
        wait_until_gone(MARK)
    if backend == "cleans up":
        assert f"stream c-{tcp}: program: cleaned" in forkd.log()


def test_a_client_that_goes_by_a_reset_or_before_the_start(forkd: Forkd) -> None:
    with forkd.counting(stream_client_disconnected=2):
        client = forkd.hand_over(asking("sleeps"), tcp=True)
        assert client.recv(1)
        reset(client)
        forkd.hand_over(asking("sleeps"), tcp=True).close()
        wait_until_gone(MARK)


def test_a_client_that_reads_nothing_holds_up_its_program_alone(forkd: Forkd) -> None:
    with forkd.counting(stream_client_disconnected=1):
        client = forkd.hand_over(asking("endless"), tcp=True)
        assert client.recv(1)
        assert body(ask(forkd, "other")) == "other\n"
        reset(client)


def test_there_are_never_more_than_may_be(forkd: Forkd) -> None:
    with forkd.counting(stream_program_limit=2, stream_client_disconnected=3):
        live = [forkd.hand_over(asking("few"), tcp=True) for _ in range(3)]
        for client in live:
            assert client.recv(1)
        for _ in range(2):
            answer = ask(forkd, "few")
            assert (answer.status, answer.json["code"], answer.header("retry-after")) == (503, "program_limit", "1")
        assert body(ask(forkd, "other")) == "other\n"  # a limit is a backend's own
        for client in live:
            client.close()
        wait_until_gone(MARK)
    with forkd.counting(stream_client_disconnected=1):  # and there is room again
        last = forkd.hand_over(asking("few"), tcp=True)
        assert last.recv(12) == b"HTTP/1.1 200"
        last.close()


# Several workers, their ends, and forkd's.


def test_two_hundred_at_once_on_two_workers(tmp_path: Path) -> None:
    backend = shell("sleep 0.5; echo $HANDOFF_DATA", max_processes=200, environment={"MARK": f"{MARK}-crowd"})
    with running(tmp_path, config={"backends": {"own": backend}, "default_backend": "own"}) as forkd:
        warm(forkd)
        before = forkd.idle_fds()
        payloads = [json.dumps({"prompt": str(number)}).encode() for number in range(200)]
        answers = read_answers([forkd.hand_over(payload, tcp=True) for payload in payloads], 60)
        assert [answer.body.rstrip() for answer in answers] == payloads
        forkd.wait_for_metric("daemon_active_connections", 0)
        wait_for(lambda: forkd.idle_fds() == before, "no fd is left")
        assert not marked(f"{MARK}-crowd")
        assert forkd.counts("forkd_stream_errors_total") == {}
        assert forkd.stop() == 0


def test_a_limit_is_for_all_workers_together(tmp_path: Path) -> None:
    backends = {"own": shell("sleep 1000", max_processes=3, environment={"MARK": f"{MARK}-shared"})}
    with running(tmp_path, config={"backends": backends, "default_backend": "own"}) as forkd:
        clients = [forkd.hand_over(tcp=True) for _ in range(20)]
        codes = [client.recv(12) for client in clients]
        assert sorted(codes).count(b"HTTP/1.1 200") == 3
        assert codes.count(b"HTTP/1.1 503") == 17
        wait_for(lambda: len(marked(f"{MARK}-shared")) == 6, "each a shell with its sleep")
        assert forkd.stop(signal.SIGQUIT) == 0
        assert not marked(f"{MARK}-shared")


def test_a_dead_workers_programs_keep_their_clients(tmp_path: Path) -> None:
    script = "for n in 1 2 3 4 5 6 7 8; do echo noise >&2; echo $n; read -r line; done; echo end"
    backends = {"own": shell(script, max_processes=2, environment={"MARK": f"{MARK}-orphan"})}
    with running(tmp_path, config={"backends": backends, "default_backend": "own", "workers": {"count": 1}}) as forkd:
        fds = open_fds(forkd.pid)
        clients = [forkd.hand_over(tcp=tcp) for tcp in (True, False)]
        for client in clients:
            assert client.recv(1, socket.MSG_PEEK)
        os.kill(forkd.workers()[0], signal.SIGKILL)
        forkd.wait_for_metric("forkd_streams_recovered_total", 2, outcome="closed")
        wait_for(lambda: open_fds(forkd.pid) <= fds, "the master closed its copies")
        for client in clients:
            client.sendall(b"go on\n" * 8)
        for answer in read_answers(clients):
            assert body(answer) == "1\n2\n3\n4\n5\n6\n7\n8\nend\n"
        wait_until_gone(f"{MARK}-orphan")
        third = forkd.hand_over(tcp=True)  # whom the dead worker's do not keep out
        third.sendall(b"\n" * 8)
        assert body(read_answer(third)).endswith("end\n")


def test_a_drain_waits_for_programs_and_an_end_ends_them(tmp_path: Path) -> None:
    backends = {
        "waits": shell("echo here; read -r line; echo $line", environment={"MARK": f"{MARK}-drained"}),
        "stubborn": shell(
            f"trap '' TERM; {HEAD}; echo here; while :; do sleep 0.05; done",
            head=False,
            environment={"MARK": f"{MARK}-drained"},
        ),
        "mute": shell("sleep 1000", head=False, environment={"MARK": f"{MARK}-drained"}),
    }
    with running(tmp_path, config={"backends": backends}) as forkd:
        clients = [forkd.hand_over(asking(name), tcp=True) for name in ("waits", "waits", "stubborn", "mute")]
        for client in clients[:3]:
            assert client.recv(1, socket.MSG_PEEK)
        wait_for(lambda: len(marked(f"{MARK}-drained")) >= 5, "all run")
        assert forkd.process is not None
        forkd.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "finishing 4 streams" in forkd.log(), "it drains")
        clients[0].sendall(b"still served\n")
        assert body(read_answer(clients[0])) == "here\nstill served\n"
        forkd.process.send_signal(signal.SIGTERM)
        rest = read_answers(clients[1:])
        assert [answer.body for answer in rest[:2]] == [b"here\n"] * 2
        assert (rest[2].status, rest[2].json["code"]) == (503, "shutdown")
        assert forkd.process.wait(20) == 0
        assert not marked(f"{MARK}-drained")
        assert "was killed" not in forkd.log()


def test_without_fds_it_is_said_so(tmp_path: Path) -> None:
    backends = {"own": shell("echo here; read -r line", max_processes=1000, environment={"MARK": f"{MARK}-starved"})}
    with running(tmp_path, config={"backends": backends, "default_backend": "own", "workers": {"count": 1}}) as forkd:
        worker = forkd.workers()[0]
        warm(forkd)
        before = forkd.idle_fds()
        used = open_fds(worker)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 22, used + 22))
        clients = [forkd.hand_over(tcp=True) for _ in range(10)]
        answers = []
        for client in clients:
            client.sendall(b"\n")
            answers.append(read_answer(client))
        assert {answer.status for answer in answers} == {200, 503}
        assert {answer.json["code"] for answer in answers if answer.status == 503} <= {"out_of_fds", "program_limit"}
        wait_until_gone(f"{MARK}-starved")
        wait_for(lambda: forkd.idle_fds() == before, "no fd is left")
        assert len(forkd.workers()) == 1
        assert forkd.workers()[0] == worker


# fdrecv.


@contextlib.contextmanager
def fdrecv(directory: Path, *arguments: str) -> Iterator[Forkd]:
    """`forkd fdrecv`, in `directory`."""
    daemon = Forkd(directory)
    with open(directory / "output", "wb") as output:
        command = [sys.executable, "-m", "forkd", "fdrecv", *arguments]
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "DAEMON_SOCKET_PATH": "/nowhere/x"}
        daemon.process = subprocess.Popen(command, cwd=directory, env=environ, stdout=output, stderr=output)
    try:
        yield daemon
    finally:
        print(daemon.output())
        daemon.stop(signal.SIGQUIT)


@pytest.mark.parametrize("command", [("php", "handler.php"), ("python3", "handler.py")])
def test_the_examples_read_data_that_is_too_large_for_a_variable(tmp_path: Path, command: tuple[str, ...]) -> None:
    handlers(tmp_path)
    with fdrecv(tmp_path, "forkd.sock", *command) as daemon:
        wait_for(lambda: " ready (pid" in daemon.output(), "it is ready")
        answer = daemon.ask(b'{"prompt":"first last","more":"%s"}' % (b"x" * 200_000), tcp=True)
        assert "first" in answer.body.decode()
        assert "last" in answer.body.decode()


@pytest.mark.parametrize("command", [("./handler.sh",), ("php", "handler.php"), ("python3", "handler.py")])
def test_fdrecv_is_a_drop_in(tmp_path: Path, command: tuple[str, ...]) -> None:
    handlers(tmp_path)
    with fdrecv(tmp_path, "forkd.sock", *command) as daemon:
        wait_for(lambda: " ready (pid" in daemon.output(), "it is ready")
        answer = daemon.ask(b'{"prompt":"word"}', tcp=True)
        assert answer.complete
        assert "word" in answer.body.decode()
        assert daemon.stop() == 0
        assert not Path(daemon.path).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("s", "./nowhere.sh"), "forkd fdrecv: ./nowhere.sh: there is no such program"),
        (("s", "no-such-program"), "no-such-program: there is no such program in PATH"),
        (("s", "./plain"), "plain: is not executable (chmod +x)"),
        (("s",), "  COMMAND: expected a program and its arguments, got nothing"),
        ((), "SOCKET"),
        (("--mode", "rw", "s", "true"), "  --mode: expected a file mode"),
        (("--max-processes", "many", "s", "true"), "  --max-processes: expected a whole number"),
        (("--user", "nobody-here", "s", "true"), '  --user: there is no user "nobody-here"'),
        (("--pass", "A=B", "s", "true"), "  --pass: "),
    ],
)
def test_fdrecv_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "plain").write_text("")
    with fdrecv(tmp_path, *arguments) as daemon:
        assert daemon.process is not None
        assert daemon.process.wait(20) == 2
        assert said in daemon.output()


def test_fdrecv_hands_on_what_is_named_and_the_command_has_its_own_options(tmp_path: Path) -> None:
    shutil.copy("/usr/bin/env", tmp_path / "own-env")
    with fdrecv(tmp_path, "--pass", "DAEMON_SOCKET_PATH", "forkd.sock", "./own-env", "-u", "HOME") as daemon:
        wait_for(lambda: " ready (pid" in daemon.output(), "it is ready")
        raw = daemon.ask(b"not json", tcp=True).raw.decode()
        assert "HANDOFF_DATA=not json\n" in raw
        assert "DAEMON_SOCKET_PATH=/nowhere/x\n" in raw
        assert "PATH=" in raw
        assert "HOME=" not in raw
        assert "PYTHONPATH" not in raw
