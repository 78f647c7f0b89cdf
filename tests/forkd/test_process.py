"""What a process does to itself. Each case does it to a child."""

import os
import re
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from forkd import process


def in_a_child(act: Callable[[], object]) -> str:
    """Run `act` in a child; returns repr() of what it returned, or of what it raised."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = repr(act())
        except BaseException as error:
            said = repr(error)
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said


def test_close_all_but() -> None:
    def act() -> list[bool]:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        high = os.dup2(fds[0], 1000)
        links = {int(name): f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}
        answer = [fd for fd, link in links.items() if os.path.lexists(link) and os.readlink(link).startswith("pipe:")]
        process.close_all_but([fds[3], fds[7], high, 1, *answer])
        return [is_open(fd) for fd in (0, 1, 2, fds[0], fds[3], fds[4], fds[7], fds[19], high)]

    assert in_a_child(act) == "[True, True, True, False, True, False, True, False, True]"


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_the_limit_of_open_files_is_raised_as_far_as_allowed() -> None:
    def act() -> tuple[int, int, int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 200))
        enough = process.raise_open_files_limit(40)
        some = process.raise_open_files_limit(150)
        os.setresuid(65534, 65534, 65534) if os.geteuid() == 0 else None
        return enough, some, process.raise_open_files_limit(100_000)

    assert in_a_child(act) == "(50, 150, 200)"


def test_the_table_of_fds_grows_at_once() -> None:
    def act() -> tuple[int, int, int]:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
        fds = len(os.listdir("/proc/self/fd"))
        sizes = []
        for count in (2000, 10**9):
            process.make_room_for_fds(count)
            (size,) = re.findall(r"^FDSize:\s*(\d+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
            sizes.append(int(size))
        return sizes[0], sizes[1], len(os.listdir("/proc/self/fd")) - fds

    assert in_a_child(act) == repr((2048, 4096, 0))


def test_no_core_dumps() -> None:
    def act() -> tuple[int, int]:
        process.forbid_core_dumps()
        return resource.getrlimit(resource.RLIMIT_CORE)

    assert in_a_child(act) == "(0, 0)"


def test_dropping_privileges_drops_all_of_them() -> None:
    def act(user: str | int | None, group: str | int | None) -> Callable[[], object]:
        def inner() -> object:
            process.drop_privileges(user, group)
            return os.getresuid(), os.getresgid(), os.getgroups()

        return inner

    before = (os.getresuid(), os.getresgid(), os.getgroups())
    assert in_a_child(act(None, None)) == repr(before)
    if os.geteuid() != 0:
        assert in_a_child(act("nobody", None)) == repr(before)
        return
    assert in_a_child(act(None, 1234)) == repr(((0, 0, 0), (1234,) * 3, [1234]))
    assert in_a_child(act(4321, 1234)) == repr(((4321,) * 3, (1234,) * 3, [1234]))
    assert in_a_child(act("daemon", None)) == repr(((1,) * 3, (1,) * 3, [1]))
    assert in_a_child(act("daemon", 1234)) == repr(((1,) * 3, (1234,) * 3, [1234]))
    assert "does not exist" in in_a_child(act("no such user", None))
    assert "does not exist" in in_a_child(act(None, "no such group"))
    assert "does not exist" in in_a_child(act(54321, None))  # no such number, and no group to go with it


def test_whose_process_it_is() -> None:
    def act() -> list[object]:
        process.drop_privileges("daemon", None)
        return [process.own_user(), *(process.runs_as(user) for user in ("daemon", 1, "nobody", 2, "no such user"))]

    if os.geteuid() == 0:
        assert in_a_child(act) == "['daemon', True, True, False, False, False]"
    assert process.runs_as(os.geteuid())


def test_the_title_is_shown_at_most_once_a_second() -> None:
    def act() -> list[str]:
        title = process.Title()
        seen = []
        for text, now in (("forkd: one", 10.0), ("forkd: two", 10.9), ("forkd: three", 11.0), ("forkd: three", 15.0)):
            title.show(text, now)
            seen.append(" ".join(psutil.Process().cmdline()).strip())
        return seen

    assert in_a_child(act) == repr(["forkd: one", "forkd: one", "forkd: three", "forkd: three"])


def test_signals_queue_in_order_and_wake_a_loop() -> None:
    def act() -> object:
        signals = process.Signals((signal.SIGUSR1, signal.SIGTERM), (signal.SIGUSR2,))
        assert not select.select([signals.wakeup_fd], [], [], 0)[0]
        assert signals.take() == []
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert select.select([signals.wakeup_fd], [], [], 10)[0]
        taken = signals.take()
        assert not select.select([signals.wakeup_fd], [], [], 0)[0]
        return [number.name for number in taken]

    assert in_a_child(act) == "['SIGUSR1', 'SIGTERM', 'SIGUSR1']"


def test_a_storm_of_signals_overflows_the_pipe_and_not_the_queue() -> None:
    def act() -> object:
        signals = process.Signals((signal.SIGUSR1,), ())
        for _ in range(70_000):
            signal.raise_signal(signal.SIGUSR1)
        return len(signals.take()), signals.take()

    assert in_a_child(act) == "(70000, [])"


def test_blocked_signals_come_after_all() -> None:
    def act() -> object:
        signals = process.Signals((signal.SIGUSR1,), ())
        before = process.block_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        blocked = signals.take()
        process.restore_signals(before)
        return blocked, [number.name for number in signals.take()]

    assert in_a_child(act) == "([], ['SIGUSR1'])"


def test_garbage_is_collected_when_there_is_time() -> None:
    def act() -> object:
        import gc  # noqa: PLC0415

        collector = process.Collector()
        collections: list[int] = []
        gc.callbacks.append(lambda phase, info: collections.append(info["generation"]) if phase == "start" else None)
        waste: list[object] = []
        for _ in range(200_000):
            waste.append([])
        frozen = gc.get_freeze_count() > 1000
        for second in range(1, 62):
            collector.tidy(second, idle=False)
        busy = list(collections)
        for second in range(62, 70):
            collector.tidy(second, idle=True)
        return frozen, busy, collections[len(busy) :]

    assert in_a_child(act) == "(True, [0], [2])"


def test_usage_is_what_ps_says() -> None:
    usage = process.Usage()
    ps = psutil.Process()
    assert abs(usage.rss_bytes() - ps.memory_info().rss) < 8 << 20
    assert abs(usage.cpu_secs() - sum(ps.cpu_times()[:2])) < 0.5


def test_usage_needs_no_fd_that_is_free() -> None:
    def act() -> bool:
        usage = process.Usage()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        return usage.rss_bytes() > 0 and usage.cpu_secs() > 0

    assert in_a_child(act) == "True"


@pytest.mark.parametrize(("code", "said"), [(0, "exited with status 0"), (3, "exited with status 3")])
def test_how_it_ended(code: int, said: str) -> None:
    assert process.how_it_ended(code) == said


def test_how_it_was_killed() -> None:
    assert process.how_it_ended(-9) == "was killed by SIGKILL"


def test_cloexec() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    process.set_cloexec(read_end)
    assert not os.get_inheritable(read_end)
    os.close(read_end)
    os.close(write_end)
