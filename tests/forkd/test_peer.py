"""A worker as the master sees it: what it was told, and that a full channel delays but loses nothing."""

import socket
from collections.abc import Iterator

import pytest

from forkd import channel, handoff
from forkd.board import Board
from forkd.channel import Assignment, Down, send_down
from forkd.peer import Life, Peer


@pytest.fixture
def pair() -> Iterator[tuple[Peer, socket.socket]]:
    """A peer, and the worker's end of its channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        yield Peer(1, 1, 0, -1, ours, Board(1).row(1)), theirs


def heard(theirs: socket.socket) -> list[int]:
    """The kinds of all messages that wait."""
    kinds = []
    room = bytearray(100_000)
    while True:
        try:
            message = handoff.receive(theirs, room)
        except BlockingIOError:
            return kinds
        if message is None:
            return kinds
        kinds.append(channel.parse_down(message.payload)[0].kind)


def takes_one_more(peer: Peer) -> bool:
    """Whether one message more went into the channel."""
    try:
        send_down(peer.channel, Assignment(0, 1, Down.ASSIGN, 0, 0, 0.0), b"x", ())
    except BlockingIOError:
        return False
    return True


def test_it_is_told_once_and_takes_no_more(pair: tuple[Peer, socket.socket]) -> None:
    peer, theirs = pair
    peer.life = Life.READY
    peer.tell(Down.DRAIN)
    peer.tell(Down.DRAIN)
    peer.tell_again()
    assert heard(theirs) == [Down.DRAIN]
    assert peer.life is Life.DRAINING
    peer.tell(Down.STOP)
    peer.tell(Down.DRAIN)
    assert heard(theirs) == [Down.STOP]


def test_a_full_channel_is_tried_again(pair: tuple[Peer, socket.socket]) -> None:
    peer, theirs = pair
    peer.life = Life.READY
    sent = 0
    while takes_one_more(peer):
        sent += 1
    peer.tell(Down.DRAIN)
    assert peer.life is Life.DRAINING  # whatever becomes of the message, it gets no more handoffs
    peer.tell_again()
    assert heard(theirs) == [Down.ASSIGN] * sent
    peer.tell_again()
    assert heard(theirs) == [Down.DRAIN]


def test_the_dead_need_not_be_told(pair: tuple[Peer, socket.socket]) -> None:
    peer, theirs = pair
    peer.life = Life.DEAD
    theirs.close()
    peer.tell(Down.STOP)
    assert peer.life is Life.DEAD
    assert not peer.untold
