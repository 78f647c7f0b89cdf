"""The selector: who is called with what, and that nobody is called for another."""

import os
import socket
from collections.abc import Callable, Iterator
from selectors import EVENT_READ, EVENT_WRITE

import pytest

from forkd.selector import EDGE, EVENTS_MAX, Selector
from tests.harness import own_fds

BOTH = EVENT_READ | EVENT_WRITE


class Probe:
    """Notes what it is called with, then does `then`."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.masks: list[int] = []
        self.then = then

    def on_ready(self, mask: int) -> None:
        self.masks.append(mask)
        self.then()


class Desk:
    """A selector, a pair of sockets, and what crashed."""

    def __init__(self) -> None:
        self.crashed: list[tuple[Probe, Exception]] = []
        self.selector: Selector[Probe] = Selector(lambda probe, error: self.crashed.append((probe, error)))
        self.ours, self.theirs = socket.socketpair()
        self.fd = self.ours.fileno()
        self.probe = Probe()

    def turn(self) -> list[int]:
        """What the probe is told now."""
        self.probe.masks.clear()
        self.selector.serve(self.selector.select(0))
        return self.probe.masks


@pytest.fixture
def desk() -> Iterator[Desk]:
    before = own_fds()
    own = Desk()
    yield own
    own.selector.close()
    own.ours.close()
    own.theirs.close()
    assert own_fds() == before


def test_a_readable_fd_is_told_until_it_is_read(desk: Desk) -> None:
    desk.selector.register(desk.fd, EVENT_READ, desk.probe)
    assert desk.turn() == []
    desk.theirs.send(b"x")
    assert desk.turn() == [EVENT_READ]
    assert desk.turn() == [EVENT_READ]
    desk.ours.recv(1)
    assert desk.turn() == []


def test_each_is_told_what_it_asked_for_and_no_more(desk: Desk) -> None:
    desk.theirs.send(b"x")
    desk.selector.register(desk.fd, BOTH, desk.probe)
    assert desk.turn() == [BOTH]
    desk.selector.modify(desk.fd, EVENT_WRITE)
    assert desk.turn() == [EVENT_WRITE]
    desk.selector.modify(desk.fd, EVENT_READ)
    assert desk.turn() == [EVENT_READ]
    desk.theirs.close()
    assert desk.turn() == [EVENT_READ], "a hang-up is found out by reading"
    desk.selector.modify(desk.fd, EVENT_WRITE)
    assert desk.turn() == [EVENT_WRITE], "or by writing"


def test_watch_registers_and_unregisters_as_needed(desk: Desk) -> None:
    desk.theirs.send(b"x")
    for events in (0, EVENT_READ, BOTH, BOTH, EVENT_WRITE, 0, 0, EVENT_WRITE):
        desk.selector.watch(desk.fd, events, desk.probe)
        assert desk.selector.watched(desk.fd) == events
        assert desk.selector.registered == (events != 0)
        assert desk.turn() == ([events] if events else [])
    desk.selector.unregister(desk.fd)
    assert desk.selector.watched(desk.fd) == 0
    assert desk.selector.watched(100_000) == 0
    assert desk.turn() == []


def test_under_edge_it_is_told_once(desk: Desk) -> None:
    desk.theirs.send(b"xy")
    desk.selector.watch(desk.fd, EVENT_READ | EDGE, desk.probe)
    assert desk.selector.watched(desk.fd) == EVENT_READ | EDGE
    assert desk.turn() == [EVENT_READ]
    assert desk.turn() == []
    desk.theirs.send(b"z")
    assert desk.turn() == [EVENT_READ], "more came"
    desk.ours.recv(1)
    assert desk.turn() == []
    desk.selector.repeat(desk.fd)
    assert desk.turn() == [EVENT_READ], "there was more, and it was asked for"
    desk.ours.recv(10)
    desk.selector.repeat(desk.fd)
    assert desk.turn() == []
    desk.selector.watch(desk.fd, 0, desk.probe)
    desk.selector.repeat(desk.fd)
    desk.theirs.send(b"x")
    assert desk.turn() == []
    desk.selector.watch(desk.fd, EVENT_READ | EDGE, desk.probe)
    assert desk.turn() == [EVENT_READ], "what came while it was not watched"
    desk.selector.unregister(desk.fd)


def test_under_edge_an_end_behind_what_is_there_is_told(desk: Desk) -> None:
    desk.selector.register(desk.fd, EVENT_READ | EDGE, desk.probe)
    desk.theirs.send(b"x")
    desk.theirs.shutdown(socket.SHUT_WR)
    assert desk.turn() == [EVENT_READ | EDGE]
    desk.ours.recv(10)
    assert desk.turn() == []
    desk.selector.repeat(desk.fd)
    assert desk.turn() == [EVENT_READ | EDGE]
    desk.selector.unregister(desk.fd)


def test_only_a_hang_up_is_told_where_somebody_else_reads(desk: Desk) -> None:
    desk.selector.watch_hangup(desk.fd, desk.probe)
    desk.theirs.send(b"x")
    assert desk.turn() == []
    desk.theirs.shutdown(socket.SHUT_WR)
    assert desk.turn() == [EVENT_READ]
    desk.selector.unregister(desk.fd)
    assert desk.turn() == []


def test_one_that_crashes_keeps_nobody_else_from_being_served(desk: Desk) -> None:
    def crash() -> None:
        raise ValueError("a bug")

    bad = Probe(crash)
    desk.selector.register(desk.fd, EVENT_WRITE, bad)
    desk.selector.register(desk.theirs.fileno(), EVENT_WRITE, desk.probe)
    assert desk.turn() == [EVENT_WRITE]
    ((probe, error),) = desk.crashed
    assert probe is bad
    assert str(error) == "a bug"


def test_a_number_that_is_used_again_in_the_same_turn_does_not_answer_for_the_one_before(desk: Desk) -> None:
    """Both ends are ready, and whichever is served first closes the other and opens something with its number."""
    later = Probe()
    fds = [desk.fd, os.dup(desk.fd)]

    def close_the_other(own: int) -> Callable[[], None]:
        def close() -> None:
            other = fds[1 - own]
            if desk.selector.watched(other):
                desk.selector.unregister(other)
                os.close(other)
                assert os.dup(desk.theirs.fileno()) == other
                desk.selector.register(other, EVENT_WRITE, later)

        return close

    probes = [Probe(close_the_other(number)) for number in range(2)]
    for fd, probe in zip(fds, probes, strict=True):
        desk.selector.register(fd, EVENT_WRITE, probe)
    desk.turn()
    assert sorted(len(probe.masks) for probe in probes) == [1, 1], "the closed one is called, and finds itself closed"
    assert later.masks == []
    os.close(fds[1])
    assert not desk.crashed


def test_more_events_than_one_select_takes_are_all_served(desk: Desk) -> None:
    """And a busy fd keeps no other from its turn."""
    probes = {os.eventfd(1): Probe() for _ in range(EVENTS_MAX + EVENTS_MAX // 2)}
    try:
        for fd, probe in probes.items():
            desk.selector.register(fd, EVENT_READ, probe)
        desk.turn()
        assert sum(bool(probe.masks) for probe in probes.values()) == EVENTS_MAX
        desk.turn()
        assert all(probe.masks for probe in probes.values())
    finally:
        for fd in probes:
            os.close(fd)
