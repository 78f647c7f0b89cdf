"""The transport over real sockets. TLS is tested with the fake API, whose certificates it needs."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workers.upstream.owner import Owner
from workers.loop import Loop
from workers.upstream.dns import Address
from workers.upstream.transport import READ_BYTES, Route, Transport


class Keeper(Owner):
    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    def crashed(self, error: Exception) -> None:
        self.error = error


class World:
    def __init__(self) -> None:
        self.loop = Loop()
        self.owner = Keeper()
        self.reached: list[Address] = []
        self.transport = Transport(self.loop, self.owner, self.reached.append)

    def open(self, *addresses: Address, connect_secs: float = 10) -> None:
        self.transport.open(Route(addresses, None, "api.test", connect_secs))

    def until(self, condition: Callable[[], bool]) -> None:
        """Turn the loop until `condition`; the test's own timeout is the limit."""
        while not condition():
            self.loop.turn()
            if self.owner.error is not None:
                raise self.owner.error


@pytest.fixture
def world() -> Iterator[World]:
    before = len(os.listdir("/proc/self/fd"))
    world = World()
    yield world
    world.transport.close()
    assert not world.loop.selector.registered
    world.loop.close()
    assert len(os.listdir("/proc/self/fd")) == before


def refusing() -> Address:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Address(socket.AF_INET, server.getsockname())


def listening(server: socket.socket) -> Address:
    return Address(server.family, server.getsockname())


def test_both_ways_and_an_orderly_end(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.open(listening(server))
        world.until(lambda: world.owner.protocol is not None)
        assert world.owner.protocol == ""
        peer, _ = server.accept()
        with peer:
            world.transport.write(b"ask")
            assert peer.recv(10) == b"ask"
            peer.sendall(b"answer")
            peer.shutdown(socket.SHUT_WR)
            world.until(lambda: world.owner.end is not None)
    assert world.owner.data == b"answer"
    assert world.owner.end == ("", "it closed the connection")
    assert world.transport.fd == -1


def test_the_next_address_is_tried_and_the_one_that_works_is_told(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        good = listening(server)
        world.open(refusing(), Address(socket.AF_INET6, ("::1", refusing().sockaddr[1], 0, 0)), good)
        world.until(lambda: world.owner.protocol is not None)
        assert world.reached == [good]


def test_no_address_answers(world: World) -> None:
    world.open(refusing(), refusing())
    assert world.owner.end is None  # never from within the call
    world.until(lambda: world.owner.end is not None)
    assert world.owner.end == ("backend_unavailable", "Connection refused")


def test_no_address_at_all(world: World) -> None:
    world.open()
    world.until(lambda: world.owner.end is not None)
    assert world.owner.end == ("backend_unavailable", "there is no address")


def test_an_address_that_never_answers_costs_its_time_only(world: World) -> None:
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = []
    try:
        for _ in range(4):  # until its queue is full: a connection attempt then gets no answer
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        with socket.create_server(("127.0.0.1", 0)) as server:
            world.open(listening(full), listening(server), connect_secs=0.05)
            world.until(lambda: world.owner.protocol is not None)
            assert world.reached == [listening(server)]
    finally:
        for sock in (*fillers, full):
            sock.close()


def test_a_unix_socket_whose_backlog_is_full_is_tried_again(world: World, tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        with socket.socket(socket.AF_UNIX) as filler:
            filler.connect(path)
            world.open(Address(socket.AF_UNIX, path))
            for _ in range(3):
                world.loop.turn()
            assert world.owner.protocol is None
            server.accept()[0].close()
            world.until(lambda: world.owner.protocol is not None)


def test_what_the_kernel_does_not_take_is_kept_in_order(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.open(listening(server))
        world.until(lambda: world.owner.protocol is not None)
        peer, _ = server.accept()
        sent = os.urandom(1 << 20) * 16
        got = bytearray()

        def read() -> None:
            while data := peer.recv(1 << 20):
                got.extend(data)

        world.transport.write(sent[: len(sent) // 2])
        world.transport.write(sent[len(sent) // 2 :])
        assert world.transport.unsent_bytes > 0
        reader = threading.Thread(target=read)
        reader.start()
        world.until(lambda: world.transport.unsent_bytes == 0)
        world.transport.close()
        reader.join()
        peer.close()
        assert bytes(got) == sent


def test_paused_reads_nothing(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.open(listening(server))
        world.until(lambda: world.owner.protocol is not None)
        peer, _ = server.accept()
        with peer:
            world.transport.pause()
            peer.sendall(b"x")
            world.loop.turn()
            assert world.owner.data == b""
            world.transport.resume()
            world.until(lambda: world.owner.data == b"x")


@pytest.mark.parametrize("extra", [0, 1])
def test_more_than_one_read_takes_arrives_without_more_behind_it(world: World, extra: int) -> None:
    """Nothing else would ever say that there is more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.open(listening(server))
        world.until(lambda: world.owner.protocol is not None)
        peer, _ = server.accept()
        with peer:
            sent = os.urandom(3 * READ_BYTES + extra)
            peer.sendall(sent)
            world.until(lambda: len(world.owner.data) >= len(sent))
            peer.sendall(b"x")
            world.until(lambda: len(world.owner.data) > len(sent))
            assert world.owner.data == sent + b"x"
            assert world.owner.end is None


def test_paused_amid_what_is_there_the_rest_comes_later(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.open(listening(server))
        world.until(lambda: world.owner.protocol is not None)
        peer, _ = server.accept()
        sent = os.urandom(3 * READ_BYTES)
        peer.sendall(sent)
        peer.close()
        world.until(lambda: bool(world.owner.data))
        world.transport.pause()
        got = len(world.owner.data)
        world.loop.turn()
        assert len(world.owner.data) == got
        world.transport.resume()
        world.until(lambda: world.owner.end is not None)
        assert world.owner.data == sent
        assert world.owner.end == ("", "it closed the connection")


@pytest.mark.parametrize("before", [b"", b"last words"])
def test_a_reset_is_told_behind_what_came_before_it(world: World, before: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.open(listening(server))
        world.until(lambda: world.owner.protocol is not None)
        peer, _ = server.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.sendall(before)
        peer.close()
        world.until(lambda: world.owner.end is not None)
        assert world.owner.data == before
        assert world.owner.end == ("backend_reset", "Connection reset by peer")


def test_close_says_nothing_more(world: World) -> None:
    world.open(refusing())
    world.transport.close()
    for _ in range(3):
        world.loop.turn()
    assert world.owner.end is None
