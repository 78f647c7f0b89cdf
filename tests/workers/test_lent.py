"""A client's socket that a program has: how it is ended."""

import select
import socket
import time
from collections.abc import Iterator

import pytest

from tests.workers.kit import World
from workers.lent import Lent


class Owner:
    """Who is told."""

    slot = 3

    def __init__(self) -> None:
        self.told: list[str] = []

    def client_gone(self, code: str) -> None:
        self.told.append(code)

    def client_closed(self) -> None:
        self.told.append("closed")

    def crashed(self, error: Exception) -> None:
        raise error


@pytest.fixture
def impatient() -> Iterator[None]:
    """As a handler's module may leave it."""
    socket.setdefaulttimeout(5)
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("impatient")
def test_a_timeout_for_all_new_sockets_does_not_hold_up_the_loop(world: World) -> None:
    peer, server = socket.socketpair()
    owner = Owner()
    lent = Lent(world.context, owner, server.detach())
    lent.lend()
    begun = time.monotonic()
    assert lent.hung_up() == ""
    lent.end()
    world.advance(1)
    assert time.monotonic() - begun < 1
    peer.close()
    world.advance(1)
    assert owner.told == ["closed"]


def test_a_relayed_client_that_is_slow_to_read_finds_the_end_and_not_a_closed_socket(world: World) -> None:
    """As in `workers.client`: the module's pump takes POLLHUP for a daemon that was killed."""
    peer, server = socket.socketpair()
    owner = Owner()
    lent = Lent(world.context, owner, server.detach(), relayed=True)
    lent.lend()
    lent.end()
    world.advance(20)
    poll = select.poll()
    poll.register(peer, select.POLLIN | select.POLLRDHUP)
    assert peer.recv(10) == b""
    assert poll.poll(0) == [(peer.fileno(), select.POLLIN | select.POLLRDHUP)]
    world.advance(20)
    assert owner.told == ["closed"]
    peer.close()
