"""What a worker tells its master, and when."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from forkd import channel
from forkd.channel import Up
from workers.loop import Loop
from workers.main import Worker


class Desk:
    """A worker of which only its reports work, and the master's end of its channel."""

    def __init__(self) -> None:
        self.master, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker: Any = Worker.__new__(Worker)
        self.loop = worker._loop = Loop()
        worker._channel = self.ours
        worker._speaks = True
        worker._telling = False
        worker._told_at = 0
        worker._returned = []
        worker._context = SimpleNamespace(finished=[])
        self.worker = worker

    def timers(self) -> int:
        return sum(map(len, self.loop._buckets.values()))

    def heard(self) -> list[tuple[int, list[tuple[int, int]]]]:
        found = []
        while True:
            try:
                kind, pairs = channel.parse_up(channel.receive_up(self.master, bytearray(65536)))
            except BlockingIOError:
                return found
            found.append((kind, list(pairs)))


@pytest.fixture
def desk() -> Iterator[Desk]:
    own = Desk()
    yield own
    own.master.close()
    own.ours.close()
    own.loop.close()


def test_what_is_put_off_is_told_by_the_next_tick_and_once(desk: Desk) -> None:
    desk.worker._context.finished += [(1, 1), (2, 1)]
    for _ in range(3):
        desk.worker._tell_soon()
    assert desk.timers() == 1
    assert desk.heard() == []
    while desk.timers():
        desk.loop.turn()
    assert desk.heard() == [(Up.FINISHED, [(1, 1), (2, 1)])]
    assert desk.worker._context.finished == []
    assert desk.timers() == 0
    desk.worker._tell_soon()
    assert desk.timers() == 1, "it may be put off again"


def test_what_a_full_channel_does_not_take_is_kept_and_tried_again(desk: Desk) -> None:
    with pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            desk.ours.send(channel.pack_up(Up.READY), channel.SEND_FLAGS)
    desk.worker._context.finished.append((1, 1))
    desk.worker._returned.append((2, 1))
    for _ in range(3):
        desk.worker._tell()
    assert desk.worker._context.finished == [(1, 1)]
    assert desk.timers() == 1, "however often it is tried"
    assert {kind for kind, _ in desk.heard()} == {Up.READY}
    while desk.timers():
        desk.loop.turn()
    assert desk.heard() == [(Up.FINISHED, [(1, 1)]), (Up.RETURNED, [(2, 1)])]


def test_a_master_that_is_gone_need_not_be_told(desk: Desk) -> None:
    desk.master.close()
    desk.worker._context.finished.append((1, 1))
    desk.worker._tell()
    assert desk.worker._context.finished == []
    assert desk.timers() == 0
