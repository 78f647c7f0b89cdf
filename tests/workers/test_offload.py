"""Blocking calls beside the loop: where they run, how they come back, and what does not get lost."""

import errno
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from workers.loop import Loop
from workers.offload import Offload


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def make(loop: Loop) -> Iterator[Callable[..., Offload]]:
    made: list[Offload] = []
    gc.collect()  # what earlier tests left to the collector
    fds = len(os.listdir("/proc/self/fd"))

    def make(**how: Any) -> Offload:
        made.append(Offload(loop, **how))
        return made[-1]

    yield make
    for offload in made:
        if not offload._closed:
            offload.close()
        eventually(lambda o=offload: not any(thread.is_alive() for thread in o._threads))  # type: ignore[misc]
    assert len(os.listdir("/proc/self/fd")) == fds


def eventually(condition: Callable[[], object], loop: Loop | None = None, secs: float = 20) -> None:
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end, "never happened"
        if loop is None:
            time.sleep(0.001)
        else:
            loop.turn()


def test_the_function_runs_in_a_thread_and_done_on_the_loops(loop: Loop, make: Callable[..., Offload]) -> None:
    offload = make()
    seen: list[tuple[Any, int]] = []
    offload.run(threading.get_ident, lambda ident: seen.append((ident, threading.get_ident())))
    assert not seen, "called from within run"
    eventually(lambda: seen, loop)
    assert seen[0][1] == threading.get_ident()
    assert seen[0][0] != threading.get_ident()


def test_an_exception_is_an_outcome(loop: Loop, make: Callable[..., Offload]) -> None:
    offload = make()
    outcomes: list[object] = []

    def look_up() -> None:
        raise socket.gaierror(-2, "Name or service not known")

    offload.run(look_up, outcomes.append)
    offload.run(lambda: sys.exit(3), outcomes.append)
    offload.run(lambda: "still there", outcomes.append)
    eventually(lambda: len(outcomes) == 3, loop)
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)].count(socket.gaierror) == 1
    assert [str(outcome) for outcome in outcomes if isinstance(outcome, RuntimeError)] == ["SystemExit in a thread"]
    assert "still there" in outcomes


def test_threads_come_as_they_are_needed_and_no_more(loop: Loop, make: Callable[..., Offload]) -> None:
    before = threading.active_count()
    fds = len(os.listdir("/proc/self/fd"))
    offload = make(threads=3)
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == fds
    outcomes: list[Any] = []
    for number in range(5):  # one after the other: one thread will do
        offload.run(lambda number=number: number, outcomes.append)  # type: ignore[misc]
        eventually(lambda number=number: len(outcomes) == number + 1, loop)  # type: ignore[misc]
    assert threading.active_count() == before + 1
    go = threading.Event()
    running = threading.Semaphore(0)

    def wait() -> bool:
        running.release()
        return go.wait(20)

    for _ in range(10):
        offload.run(wait, outcomes.append)
    for _ in range(3):
        assert running.acquire(timeout=20)
    assert threading.active_count() == before + 3
    assert not running.acquire(timeout=0.05), "more at once than there are threads"
    go.set()
    eventually(lambda: len(outcomes) == 15, loop)
    assert outcomes == [0, 1, 2, 3, 4] + [True] * 10
    assert threading.active_count() == before + 3


def test_functions_start_in_order(loop: Loop, make: Callable[..., Offload]) -> None:
    offload = make(threads=1)
    started: list[int] = []
    outcomes: list[Any] = []
    for number in range(100):
        offload.run(lambda number=number: started.append(number), outcomes.append)  # type: ignore[misc]
    eventually(lambda: len(outcomes) == 100, loop)
    assert started == list(range(100))


def test_what_has_gathered_is_given_back_in_one_turn(loop: Loop, make: Callable[..., Offload]) -> None:
    offload = make(threads=4)
    outcomes: list[Any] = []
    for number in range(1000):
        offload.run(lambda number=number: number, outcomes.append)  # type: ignore[misc]
    eventually(lambda: len(offload._outcomes) == 1000)
    assert not outcomes
    loop.turn()
    assert sorted(outcomes) == list(range(1000))


def test_nothing_is_lost_while_the_loop_turns(loop: Loop, make: Callable[..., Offload]) -> None:
    """Outcomes that come in just as the loop takes out others: each is followed by a wake-up of its own."""
    offload = make(threads=4)
    left = 3000
    outcomes: list[Any] = []

    def done(outcome: Any) -> None:
        nonlocal left
        outcomes.append(outcome)
        if left:
            left -= 1
            offload.run(lambda: None, done)

    started = time.monotonic()
    for _ in range(8):
        offload.run(lambda: None, done)
    eventually(lambda: len(outcomes) == 3008, loop)
    assert time.monotonic() - started < 15, "waited for the loop's longest sleep instead of a wake-up"


def test_a_done_that_raises_harms_no_other(
    loop: Loop, make: Callable[..., Offload], caplog: pytest.LogCaptureFixture
) -> None:
    offload = make(threads=1)
    outcomes: list[Any] = []
    crashes: list[Exception] = []

    def fail(_: object) -> None:
        raise ValueError("a bug")

    def fail_again(error: Exception) -> None:
        raise KeyError("another")

    with caplog.at_level(logging.ERROR, "forkd"):
        offload.run(lambda: 1, outcomes.append)
        offload.run(lambda: 2, fail, crashes.append)
        offload.run(lambda: 3, fail)
        offload.run(lambda: 4, fail, fail_again)
        offload.run(lambda: 5, outcomes.append)
        eventually(lambda: len(offload._outcomes) == 5)
        loop.turn()
    assert outcomes == [1, 5]
    assert [str(error) for error in crashes] == ["a bug"]
    assert [type(record.exc_info[1]) for record in caplog.records if record.exc_info] == [ValueError, KeyError]


def test_a_stuck_function_holds_one_thread_and_no_exit() -> None:
    """As getaddrinfo does when a name server is gone. A process whose threads were not daemons would never end."""
    program = """if True:
        import time
        from workers.loop import Loop
        from workers.offload import Offload
        loop, came = Loop(), []
        offload = Offload(loop, threads=2)
        offload.run(lambda: time.sleep(3600), came.append)
        offload.run(lambda: "others go on", came.append)
        while not came:
            loop.turn()
        print(came[0])
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "others go on\n", "")


def test_signals_are_the_loops(loop: Loop, make: Callable[..., Offload]) -> None:
    offload = make()
    masks: list[Any] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGTERM not in before
    offload.run(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), masks.append)
    eventually(lambda: masks, loop)
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD, signal.SIGABRT} <= masks[0]
    assert not {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL} & masks[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_no_threads_to_be_had(loop: Loop, make: Callable[..., Offload], monkeypatch: pytest.MonkeyPatch) -> None:
    offload = make(threads=2)
    outcomes: list[Any] = []
    go = threading.Event()

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        offload.run(lambda: "not even one", outcomes.append)
        assert not outcomes, "called from within run"
        eventually(lambda: outcomes, loop)
    assert [str(outcome) for outcome in outcomes] == ["can't start new thread"]
    offload.run(lambda: go.wait(20), outcomes.append)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        offload.run(lambda: "waits for the one there is", outcomes.append)
        go.set()
        eventually(lambda: len(outcomes) == 3, loop)
    assert outcomes[1:] == [True, "waits for the one there is"]


def test_idle_threads_hold_on_to_nothing(loop: Loop, make: Callable[..., Offload]) -> None:
    """Collections are rare in a worker: what is not freed by its last reference stays for long."""

    class Thing:
        pass

    def fail(thing: Thing) -> None:
        raise ValueError(thing)

    offload = make(threads=1)
    things = [Thing(), Thing(), Thing()]
    watched = [weakref.ref(thing) for thing in things]
    outcomes: list[str] = []
    gc.disable()
    try:
        argument, result, raised = things
        things.clear()
        offload.run(lambda argument=argument: str(argument), lambda outcome: outcomes.append("1"))  # type: ignore[misc]
        offload.run(lambda result=result: result, lambda outcome: outcomes.append("2"))  # type: ignore[misc]
        offload.run(lambda raised=raised: fail(raised), lambda outcome: outcomes.append("3"))  # type: ignore[misc]
        del argument, result, raised
        eventually(lambda: outcomes == ["1", "2", "3"], loop)
        eventually(lambda: all(watch() is None for watch in watched))
    finally:
        gc.enable()


def test_close_while_a_function_runs(loop: Loop, make: Callable[..., Offload]) -> None:
    """The eventfd's number goes to the next who opens something, who must not be written to."""
    offload = make(threads=1)
    outcomes: list[Any] = []
    go, running = threading.Event(), threading.Event()

    def wait() -> None:
        running.set()
        go.wait(20)

    offload.run(wait, outcomes.append)
    offload.run(lambda: outcomes.append("queued, and never run"), outcomes.append)
    assert running.wait(20)
    number = offload._wakeup_fd
    offload.close()
    heir = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert heir == number
        go.set()
        eventually(lambda: not offload._threads[0].is_alive())
        with pytest.raises(BlockingIOError):
            os.eventfd_read(heir)
    finally:
        os.close(heir)
    offload.on_ready(1)
    assert not outcomes


def test_close_in_a_done(loop: Loop, make: Callable[..., Offload], caplog: pytest.LogCaptureFixture) -> None:
    offload = make(threads=1)
    outcomes: list[Any] = []
    offload.run(lambda: 1, lambda _: offload.close())
    offload.run(lambda: 2, outcomes.append)
    eventually(lambda: len(offload._outcomes) == 2)
    loop.turn()
    assert not outcomes
    assert not caplog.records
    assert not loop.selector.registered


def test_after_a_time_without_epoll_watches_all_is_as_before(
    loop: Loop, make: Callable[..., Offload], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    offload = make()
    with monkeypatch.context() as patch:
        patch.setattr("forkd.selector.Selector.register", refuse)
        with pytest.raises(OSError, match="No space"):
            offload.run(int, lambda _: None)
    seen: list[Any] = []
    offload.run(int, seen.append)
    eventually(lambda: seen, loop)
