"""Starting programs: what they find, and what is left when they cannot be started."""

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.harness import own_fds
from workers.program import Launched, launch
from workers.spawn import Command


def run(*arguments: str, file: str = "", directory: str | None = None, data: bytes | None = None) -> str:
    """Start a program, wait for it, and return what it wrote."""
    read_end, write_end = os.pipe()
    data_fd = -1
    if data is not None:
        data_fd = os.memfd_create("data")
        os.write(data_fd, data)
    launched: Launched | None = None
    try:
        environment = {"PATH": b"/usr/bin:/bin", "ODD": b"\xff=\n"}
        launched = launch(Command(file or arguments[0], arguments, environment, directory), write_end, data_fd)
    finally:
        os.close(write_end)
        if data_fd >= 0:
            os.close(data_fd)
        with open(read_end, encoding="utf-8", errors="surrogateescape") as output:
            written = output.read()
    os.waitpid(launched.pid, 0)
    os.close(launched.pidfd)
    os.close(launched.stderr_fd)
    return written


def not_closed_by_exec() -> set[str]:
    """Fds of this process that every program has; a worker has none."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    return {
        str(number) for number in numbers if os.path.exists(f"/proc/self/fd/{number}") and os.get_inheritable(number)
    }


def test_a_program_gets_what_is_given_to_it_and_nothing_else(tmp_path: Path) -> None:
    before = own_fds()
    # Without a pipe: the shell would still hold its ends while ls looks.
    script = "pwd; ls -C -w 0 /proc/$$/fd; cat /proc/self/fd/3; ps -o sid= -p $$; echo $$; env"
    lines = run("/bin/sh", "-c", script, directory=str(tmp_path), data=b"data\n").split("\n")
    assert lines[0] == str(tmp_path)
    assert set(lines[1].split()) == {"0", "1", "2", "3", *not_closed_by_exec()}
    assert lines[2] == "data"
    assert lines[3].strip() == lines[4].strip(), "the leader of its own session"
    assert {line.partition("=")[0] for line in lines[5:] if line} == {"PATH", "ODD", "PWD"}
    assert own_fds() == before


def test_every_signal_is_as_a_program_expects_it() -> None:
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    try:
        status = run("/bin/cat", "/proc/self/status")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGPIPE, before)
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith(("SigIgn", "SigBlk")))
    # posix_spawn itself ignores 32 and 33, which are the C library's own.
    assert {int(mask, 16) & 0x7FFF_FFFF for mask in masks.values()} == {0}


def test_a_script_without_an_interpreter_is_the_shells(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0 $1"')
    script.chmod(0o755)
    assert run("./script", "word", file=str(script)) == f"{script} word\n"


@pytest.mark.parametrize(
    ("command", "directory", "number"),
    [
        (("/nowhere/at-all",), None, errno.ENOENT),
        (("/proc/version",), None, errno.EACCES),
        (("/",), None, errno.EACCES),
        (("/bin/true",), "/nowhere", errno.ENOENT),
        (("/bin/true", "x" * 200_000), None, errno.E2BIG),
    ],
)
def test_what_cannot_be_started_leaves_nothing(command: tuple[str, ...], directory: str | None, number: int) -> None:
    before = own_fds()
    with pytest.raises(OSError) as raised:
        run(*command, directory=directory)
    assert raised.value.errno == number
    assert own_fds() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
