"""Runs of handlers, as both sides see them."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from forkd.handler import Handoff
from tests.harness import wait_for
from workers.handlers.mailbox import Mailbox
from workers.handlers.run import AHEAD_MAX, Ended
from workers.handlers.threads import ThreadRun
from workers.loop import Loop


class Reader:
    """Who the letters are for. One that breaks it is told to `crashed`."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.errors: list[Exception] = []

    def take(self, piece: Any) -> None:
        if piece == "breaks":
            raise ValueError(piece)
        self.pieces.append(piece)

    def crashed(self, error: Exception) -> None:
        self.errors.append(error)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def mailbox(loop: Loop) -> Iterator[Mailbox]:
    mailbox = Mailbox(loop)
    yield mailbox
    mailbox.close()


def run_of(function: Any, mailbox: Mailbox, reader: Reader) -> ThreadRun:
    run = ThreadRun(function, Handoff("r", "b"), "label", mailbox, reader)
    run.condition = None
    return run


def test_many_letters_are_one_wake_up(loop: Loop, mailbox: Mailbox) -> None:
    reader = Reader()
    turns = 0
    for number in range(1000):
        mailbox.put(reader, number)
    while len(reader.pieces) < 1000:
        loop.turn()
        turns += 1
    assert (reader.pieces, turns) == (list(range(1000)), 1)
    mailbox.put(reader, "again")
    loop.turn()
    assert reader.pieces[-1] == "again"


def test_a_letter_that_breaks_its_reader_harms_no_other(loop: Loop, mailbox: Mailbox) -> None:
    first, second = Reader(), Reader()
    for reader, letter in ((first, "a"), (first, "breaks"), (second, "b"), (first, "c")):
        mailbox.put(reader, letter)
    loop.turn()
    assert (first.pieces, second.pieces) == (["a", "c"], ["b"])
    assert [str(error) for error in first.errors] == ["breaks"]


def test_letters_after_the_end_go_nowhere(loop: Loop) -> None:
    mailbox = Mailbox(loop)
    mailbox.put(Reader(), "a")
    mailbox.close()
    mailbox.put(Reader(), "b")
    loop.turn()


def test_a_handler_does_not_get_far_ahead_of_the_loop(loop: Loop, mailbox: Mailbox) -> None:
    reader = Reader()
    run = run_of(lambda _: (str(number) for number in range(10 * AHEAD_MAX)), mailbox, reader)
    thread = threading.Thread(target=run.live)
    thread.start()
    while not reader.pieces or reader.pieces[-1] != Ended():
        wait_for(lambda: run.waits or not thread.is_alive(), "it is ahead")
        assert run.given - run.taken <= AHEAD_MAX
        before = len(reader.pieces)
        loop.turn()
        run.taken += len(reader.pieces) - before
        if run.waits:
            run.wake()
    thread.join()
    assert reader.pieces[:-1] == [str(number) for number in range(10 * AHEAD_MAX)]


def test_whoever_wakes_a_run_that_waits_again_wakes_the_same(mailbox: Mailbox) -> None:
    """The loop may be between the two steps of a wake-up while the handler begins to wait anew."""
    run = run_of(None, mailbox, Reader())
    conditions = []
    for _ in range(2):
        run.paused = True
        thread = threading.Thread(target=run.wait)
        thread.start()
        wait_for(lambda: run.waits, "it waits")
        conditions.append(run.condition)
        run.paused = False
        run.wake()
        thread.join()
    assert conditions[0] is conditions[1]


def test_a_run_that_was_cancelled_before_it_began_never_begins(loop: Loop, mailbox: Mailbox) -> None:
    reader = Reader()
    run = run_of(pytest.fail, mailbox, reader)
    run.cancelled = True
    run.live()
    loop.turn()
    assert reader.pieces == [Ended()]
