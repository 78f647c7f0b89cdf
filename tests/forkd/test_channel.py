"""The wire between master and worker."""

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd import channel, handoff
from forkd.channel import Assignment, Down, Up
from tests.harness import own_fds

UINT32 = st.integers(0, 2**32 - 1)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    master, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with master, worker:
        yield master, worker


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("body", [b"\0", b"x" * channel.MAX_BODY_BYTES], ids=["small", "largest"])
def test_a_message_down_with_its_fds(pair: tuple[socket.socket, socket.socket], count: int, body: bytes) -> None:
    before = own_fds()
    head = Assignment(7, 2, Down.ASSIGN, channel.DATA_FD, 3, 12.5)
    with open("/dev/null", "rb") as null:
        channel.send_down(pair[0], head, body, [null.fileno()] * count)
    room = bytearray(channel.HEAD_BYTES + channel.MAX_BODY_BYTES)
    message = handoff.receive(pair[1], room)
    assert message is not None
    assert not message.truncated
    assert channel.parse_down(message.payload) == (head, body)
    assert len(message.fds) == count
    for fd in message.fds:
        os.close(fd)
    assert own_fds() == before


def test_a_full_channel_says_so_and_takes_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    head = Assignment(1, 1, Down.ASSIGN, 0, 0, 0.0)
    sent = 0
    with open("/dev/null", "rb") as null, pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            channel.send_down(pair[0], head, b"x" * 1000, [null.fileno()])
            sent += 1
    pair[0].close()
    received = 0
    while (message := handoff.receive(pair[1], bytearray(4096))) is not None:
        received += 1
        os.close(message.fds[0])
    assert received == sent > 0


@given(UINT32, UINT32, st.sampled_from(list(Down)), st.integers(0, 255), st.integers(0, 65535), st.floats(0, 1e12))
def test_heads_survive(slot: int, attempt: int, kind: Down, flags: int, listener: int, received_at: float) -> None:
    head = Assignment(slot, attempt, kind, flags, listener, received_at)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        channel.send_down(ours, head, b"body", ())
        assert channel.parse_down(theirs.recv(1000)) == (head, b"body")


@given(st.integers(0, 255), st.from_regex(r"[a-z_]{1,32}", fullmatch=True), st.binary())
def test_the_body_of_an_end_survives(state: int, code: str, payload: bytes) -> None:
    assert channel.parse_end_body(channel.end_body(state, code, payload)) == (state, code, payload)


@given(st.sampled_from(list(Up)), st.lists(st.tuples(UINT32, UINT32)))
def test_messages_up_survive(kind: Up, pairs: list[tuple[int, int]]) -> None:
    parsed, found = channel.parse_up(channel.pack_up(kind, pairs))
    assert parsed == kind
    assert list(found) == pairs


def test_of_what_comes_up_only_the_bytes_are_taken() -> None:
    """A worker runs its users' code, which may send anything: no fd of it may pile up in the master."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    room = bytearray(65536)
    with ours, theirs, open("/dev/null", "rb") as null:
        before = own_fds()
        with pytest.raises(BlockingIOError):
            channel.receive_up(ours, room)
        handoff.send_handoff(theirs, channel.pack_up(Up.READY), [null.fileno()])
        theirs.send(channel.pack_up(Up.FINISHED, [(1, 2)]))
        theirs.close()
        assert channel.receive_up(ours, room) == channel.pack_up(Up.READY)
        assert channel.receive_up(ours, room) == channel.pack_up(Up.FINISHED, [(1, 2)])
        assert own_fds() == before - 1  # theirs
        assert channel.receive_up(ours, room) == b""


def test_the_largest_end_fits_into_a_workers_room() -> None:
    """The worker's room is for the largest payload beside the longest code."""
    from forkd.reasons import REASONS  # noqa: PLC0415

    longest = max(REASONS, key=len)
    assert len(channel.end_body(7, longest, b"x" * handoff.MAX_INLINE_BYTES)) <= channel.MAX_BODY_BYTES
