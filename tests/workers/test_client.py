"""The client's socket: write, backpressure, disconnect, end. The other end is a real socket."""

import os
import select
import socket
from collections.abc import Iterator

import pytest

from forkd.board import State
from tests.harness import own_fds, reset, tcp_pair
from tests.workers.kit import World, read_now
from workers.client import DISCARD_BYTES, Client, RelayedClient

SLOT = 5


class Owner:
    """Is told about a client, and does what its owner does."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.client: Client

    def client_drained(self) -> None:
        self.told.append("drained")

    def client_gone(self, code: str) -> None:
        self.told.append(code)
        self.client.abort()

    def client_closed(self) -> None:
        self.told.append("closed")

    def crashed(self, error: Exception) -> None:
        raise error


@pytest.fixture(autouse=True)
def no_fd_leaks(world: World) -> Iterator[None]:
    before = own_fds()
    yield
    assert own_fds() == before


def make(world: World, server: socket.socket, kind: type[Client] = Client) -> tuple[Client, Owner]:
    owner = Owner()
    world.board.states[SLOT] = State.OPEN
    owner.client = kind(world.context, owner, server.detach(), SLOT)
    return owner.client, owner


def narrow_pair() -> tuple[socket.socket, socket.socket]:
    peer, server = socket.socketpair()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    peer.setblocking(False)
    return peer, server


def test_what_fits_is_written_at_once(world: World) -> None:
    peer, server = socket.socketpair()
    client, owner = make(world, server)
    client.write(b"one")
    client.write(b"two")
    assert peer.recv(10) == b"onetwo"
    assert client.sent == 6
    assert client.held is None
    assert client.stalled_secs(world.loop.now + 100) == 0
    client.abort()
    assert owner.told == ["closed"]
    assert peer.recv(1) == b""
    peer.close()


def test_what_does_not_fit_is_held_in_order(world: World) -> None:
    peer, server = narrow_pair()
    client, owner = make(world, server)
    data = os.urandom(100_000)
    for start in range(0, len(data), 1000):
        client.write(data[start : start + 1000])
    assert client.held
    assert client.stalled_secs(world.loop.now + 7) == 7
    got = b""
    while client.held is not None:
        got += read_now(peer)
        world.loop.turn()
    got += read_now(peer)
    assert got == data
    assert client.sent == len(data)
    assert owner.told == ["drained"]
    client.abort()
    peer.close()


def test_the_end_waits_for_what_is_held(world: World) -> None:
    peer, server = narrow_pair()
    client, owner = make(world, server)
    client.write(b"x" * 50_000)
    client.end()
    assert world.state(SLOT) == State.PARTIAL
    got = b""
    while world.state(SLOT) != State.ENDED:
        got += read_now(peer)
        world.loop.turn()
    got += read_now(peer)
    assert got == b"x" * 50_000
    assert client.lingering
    peer.close()
    world.until(lambda: client.fd < 0)
    assert owner.told == ["drained", "closed"]


def test_a_drained_owner_may_write_more_and_end(world: World) -> None:
    """As a source does that was paused: what it says then is not cut off by the end."""
    peer, server = narrow_pair()
    client, owner = make(world, server)

    def more() -> None:
        owner.told.append("drained")
        if owner.told == ["drained"]:
            client.write(b"y" * 50_000)
            client.end()

    owner.client_drained = more  # type: ignore[method-assign]
    client.write(b"x" * 50_000)
    got = b""
    while world.state(SLOT) != State.ENDED:
        got += read_now(peer)
        world.loop.turn()
    got += read_now(peer)
    assert got == b"x" * 50_000 + b"y" * 50_000
    peer.close()
    world.until(lambda: client.fd < 0)


def test_an_end_is_seen_although_others_hold_the_socket(world: World) -> None:
    peer, server = socket.socketpair()
    with server.dup():  # the master's
        client, owner = make(world, server)
        client.write(b"all")
        client.end()
        assert peer.recv(10) == b"all"
        assert peer.recv(10) == b""
        assert owner.told == []
        peer.close()
        world.until(lambda: client.fd < 0)
    assert owner.told == ["closed"]


def test_lingering_ends_in_time_with_a_client_that_stays(world: World) -> None:
    peer, server = socket.socketpair()
    client, owner = make(world, server)
    client.end()
    world.advance(1.9)
    assert client.lingering
    world.advance(0.5)
    assert client.fd == -1
    assert owner.told == ["closed"]
    peer.close()


def test_a_relayed_client_that_is_slow_to_read_finds_the_end_and_not_a_closed_socket(world: World) -> None:
    """The module's pump takes POLLHUP for a daemon that was killed."""
    peer, server = socket.socketpair()
    client, owner = make(world, server, RelayedClient)
    client.write(b"all")
    client.end()
    world.advance(20)
    assert client.lingering
    poll = select.poll()
    poll.register(peer, select.POLLIN | select.POLLRDHUP)
    assert peer.recv(10) == b"all"
    assert peer.recv(10) == b""
    assert poll.poll(0) == [(peer.fileno(), select.POLLIN | select.POLLRDHUP)]
    world.advance(20)
    assert owner.told == ["closed"]
    assert poll.poll(0)[0][1] & select.POLLHUP
    peer.close()


def test_no_reset_for_a_client_that_has_sent_much(world: World) -> None:
    peer, server = tcp_pair()
    client, _ = make(world, server)
    peer.setblocking(False)
    to_send = 4_000_000
    client.write(b"the answer")
    while client._discarded <= DISCARD_BYTES:
        to_send -= peer.send(b"x" * 65536)
        world.loop.turn()
    client.end()
    while to_send > 0:
        try:
            to_send -= peer.send(b"x" * min(65536, to_send))
        except BlockingIOError:
            world.loop.turn()
        assert client.fd >= 0
    peer.setblocking(True)
    assert peer.recv(100) == b"the answer"
    assert peer.recv(100) == b""
    peer.close()
    world.until(lambda: client.fd < 0)


def test_what_a_client_sends_is_read_and_then_no_more(world: World) -> None:
    peer, server = socket.socketpair()
    peer.setblocking(False)
    client, owner = make(world, server)
    sent = 0
    with pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            sent += peer.send(b"x" * 4096)
            for _ in range(3):
                world.loop.turn()
    assert sent > DISCARD_BYTES
    assert owner.told == []
    assert world.loop.selector.registered == 0
    client.write(b"still there")
    assert peer.recv(100) == b"still there"
    client.abort()
    peer.close()


@pytest.mark.parametrize("half", [False, True])
def test_an_end_of_file_is_a_disconnect(world: World, half: bool) -> None:
    peer, server = socket.socketpair()
    client, owner = make(world, server)
    peer.shutdown(socket.SHUT_WR) if half else peer.close()
    world.loop.turn()
    assert owner.told == ["client_disconnected", "closed"]
    assert client.fd == -1
    peer.close()


def test_a_reset_is_a_disconnect_whenever_it_comes(world: World) -> None:
    for act in ("read", "write", "flush", "linger"):
        peer, server = tcp_pair()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client, owner = make(world, server)
        if act == "flush":
            while client.held is None:
                client.write(b"x" * 100_000)
        if act == "linger":
            client.end()
        reset(peer)
        if act == "write":
            while client.fd >= 0:
                client.write(b"x")
        world.until(lambda client=client: client.fd < 0)
        assert owner.told == (["closed"] if act == "linger" else ["client_disconnected", "closed"])


def test_a_timeout_of_the_kernels_is_a_write_timeout(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, server = socket.socketpair()
    client, owner = make(world, server)

    def timed_out(_fd: int, _data: bytes) -> int:
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr("workers.client.write", timed_out)
    client.write(b"x")
    assert owner.told == ["write_timeout", "closed"]
    peer.close()


def test_after_its_end_nothing_does_anything(world: World) -> None:
    peer, server = socket.socketpair()
    client, owner = make(world, server)
    client.abort()
    client.abort()
    client.end()
    client.write(b"x")
    client.on_ready(3)
    client.tick()
    assert owner.told == ["closed"]
    assert peer.recv(10) == b""
    peer.close()


def test_the_board_says_who_is_in_hand(world: World) -> None:
    peer, server = socket.socketpair()
    client, _ = make(world, server)
    peer.send(b"x")
    world.loop.turn()
    assert world.board.row(1).current == SLOT + 1
    client.abort()
    peer.close()
