"""The wire: messages, envelopes, sealed memfds, and what is a client."""

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd import handoff
from tests.harness import own_fds, reset, send, tcp_pair, wait_for

ROOM = bytearray(handoff.MAX_MESSAGE_BYTES)


@pytest.fixture(autouse=True)
def no_fd_leaks() -> Iterator[None]:
    before = own_fds()
    yield
    assert own_fds() == before


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_message_with_its_fd(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = socket.socketpair()
    with client, server:
        handoff.send_handoff(pair[0], b"data", [server.fileno()])
    message = handoff.receive(pair[1], ROOM)
    assert message is not None
    assert message.payload == b"data"
    assert not message.truncated
    assert not message.fds_truncated
    (fd,) = message.fds
    assert os.get_inheritable(fd) is False
    os.close(fd)


def test_nothing_there_and_nothing_more(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        handoff.receive(pair[1], ROOM)
    pair[0].close()
    assert handoff.receive(pair[1], ROOM) is None


class Hasty(socket.socket):
    """Its first look is what the kernel makes of a message that arrives, with the end of file behind it, while it looks
    (unix_dgram_recvmsg: the queue is seen empty, then the peer is seen closed)."""

    looks = 0

    def recvmsg_into(self, *arguments: Any) -> Any:
        self.looks += 1
        return (0, [], 0, None) if self.looks == 1 else super().recvmsg_into(*arguments)


def test_the_end_of_file_does_not_overtake_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with open("/dev/null", "rb") as null:
        send(ours, b"data", null.fileno())
    ours.close()
    with Hasty(fileno=os.dup(theirs.fileno())) as hasty:
        message = handoff.receive(hasty, ROOM)
        assert message is not None
        assert message.payload == b"data"
        os.close(*message.fds)
        assert handoff.receive(hasty, ROOM) is None


def test_what_does_not_fit_never_arrives_and_is_noticed(pair: tuple[socket.socket, socket.socket]) -> None:
    with open("/dev/null", "rb") as null:
        send(pair[0], b"x" * 100, *[null.fileno()] * 5)
    message = handoff.receive(pair[1], bytearray(10))
    assert message is not None
    assert message.payload == b"x" * 10
    assert message.truncated
    assert message.fds_truncated
    assert len(message.fds) == 2
    for fd in message.fds:
        os.close(fd)


def test_a_message_without_fds_and_an_empty_one_with(pair: tuple[socket.socket, socket.socket]) -> None:
    handoff.send_handoff(pair[0], b"\0", [])
    message = handoff.receive(pair[1], ROOM)
    assert message is not None
    assert (message.payload, message.fds, message.truncated, message.fds_truncated) == (b"\0", (), False, False)
    with open("/dev/null", "rb") as null:
        send(pair[0], b"", null.fileno())
    message = handoff.receive(pair[1], ROOM)
    assert message is not None
    assert message.payload == b""
    os.close(message.fds[0])


# Envelopes.


@given(st.dictionaries(st.text(), st.text()), st.binary(), st.booleans())
def test_an_envelope_comes_apart_as_it_was_put_together(head: dict[str, str], data: bytes, in_memfd: bool) -> None:
    payload = handoff.encode_envelope({"request": head}, data, data_in_memfd=in_memfd)
    flags, line, rest = handoff.split_envelope(payload)
    assert flags == (handoff.DATA_IN_MEMFD if in_memfd else 0)
    assert b"\n" not in line
    assert rest == (b"" if in_memfd else data)
    assert handoff.expects_data_fd(payload, envelopes=True) is in_memfd
    assert not handoff.expects_data_fd(payload, envelopes=False)


@given(st.binary(max_size=8).map(lambda rest: b"\x01" + rest))
def test_any_bytes_behind_soh_are_an_envelope_or_a_bad_one(payload: bytes) -> None:
    handoff.expects_data_fd(payload, envelopes=True)
    try:
        flags, line, data = handoff.split_envelope(payload)
    except handoff.BadEnvelope:
        assert b"\n" not in payload[2:]
    else:
        assert bytes((1, flags)) + line + b"\n" + data == payload


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\0", b"{}", b"\x02\x01", b"\x01\0"])
def test_payloads_that_announce_no_second_fd(payload: bytes) -> None:
    assert not handoff.expects_data_fd(payload, envelopes=True)


@pytest.mark.parametrize(
    ("payload", "relayed"),
    [
        (b"\x01\x04{}\n", True),
        (b"\x01\x05{}\n", True),
        (b"\x01\x01{}\n", False),
        (b"\x01", False),
        (b"", False),
        (b"{\x04}", False),
    ],
)
def test_the_flag_of_a_relayed_client(payload: bytes, relayed: bool) -> None:
    assert handoff.is_relayed(payload, envelopes=True) is relayed
    assert not handoff.is_relayed(payload, envelopes=False)


# Memfds.


@pytest.mark.parametrize("data", [b"", b"x", b"xy" * 500_000])
def test_a_sealed_memfd_reads_back_and_cannot_change(data: bytes) -> None:
    fd = handoff.sealed_memfd(data)
    assert handoff.read_sealed_memfd(fd, len(data)) == data
    with pytest.raises(PermissionError):
        os.write(fd, b"z")
    for size in {0, 1 << 24} - {len(data)}:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert handoff.read_sealed_memfd(fd, len(data)) == data
    os.close(fd)


def test_a_memfd_over_the_limit() -> None:
    fd = handoff.sealed_memfd(b"12345")
    assert handoff.read_sealed_memfd(fd, 5) == b"12345"
    with pytest.raises(handoff.DataTooLarge, match="5 bytes, the limit is 4"):
        handoff.read_sealed_memfd(fd, 4)
    os.close(fd)


def memfd(data: bytes, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def write_only() -> int:
    fd = memfd(b"data", 0)
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    os.close(fd)
    return again


def test_what_is_no_sealed_memfd(tmp_path: Path) -> None:
    bad = [
        memfd(b"data", 0),
        memfd(b"data", fcntl.F_SEAL_WRITE),
        memfd(b"data", fcntl.F_SEAL_SHRINK),
        memfd(b"data", fcntl.F_SEAL_GROW),
        write_only(),
        os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR),
        os.open("/", os.O_RDONLY),
        os.open("/dev/null", os.O_RDONLY),
        socket.socket().detach(),
        os.eventfd(0),
        *os.pipe(),
    ]
    for fd in bad:
        with pytest.raises(handoff.BadDataFd):
            handoff.read_sealed_memfd(fd, 100)
        os.close(fd)


# Clients.


def test_what_is_a_client() -> None:
    for client, server in (socket.socketpair(), tcp_pair()):
        with client, server:
            family, peer = handoff.check_client(server.fileno())
            assert family == server.family
            assert peer == ("127.0.0.1" if family == socket.AF_INET else "")
            client.close()  # in order: it may have been half closed only, and is still to be answered
            assert handoff.check_client(server.fileno()) == (family, peer)
            assert server.fileno() >= 0


def test_a_client_by_ip_of_either_version() -> None:
    families = {socket.AF_INET: "127.0.0.1"}
    if socket.has_dualstack_ipv6():
        families[socket.AF_INET6] = "::1"
    for family, address in families.items():
        with socket.socket(family) as listener:
            listener.bind((address, 0))
            listener.listen()
            with socket.create_connection(listener.getsockname()[:2]), listener.accept()[0] as server:
                assert handoff.check_client(server.fileno()) == (family, address)


def test_a_client_that_has_reset_is_told_from_what_never_was_one() -> None:
    client, server = tcp_pair()
    with server:
        reset(client)

        def gone() -> bool:
            try:
                handoff.check_client(server.fileno())
            except handoff.ClientGone:
                return True
            return False

        wait_for(gone, "the reset seen")


def test_what_is_no_client(tmp_path: Path) -> None:
    made: list[socket.socket] = [
        socket.socket(),
        socket.socket(type=socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
        *socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
        *socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ]
    listeners = [socket.socket(), socket.socket(socket.AF_UNIX)]
    listeners[0].bind(("127.0.0.1", 0))
    listeners[1].bind(str(tmp_path / "s"))
    for listener in listeners:
        listener.listen()
    for sock in made + listeners:
        with sock, pytest.raises(handoff.NotAClient) as caught:
            handoff.check_client(sock.fileno())
        assert not isinstance(caught.value, handoff.ClientGone)
    fds = [*os.pipe(), os.open("/dev/null", os.O_RDONLY), os.open("/", os.O_PATH), memfd(b"", 0), os.eventfd(0)]
    for fd in fds:
        with pytest.raises(handoff.NotAClient, match="not a socket"):
            handoff.check_client(fd)
        os.close(fd)


def test_what_waits_is_told_without_taking_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        assert not handoff.more_waits(ours)
        theirs.send(b"one")
        theirs.send(b"another")
        for expected in (b"one", b"another"):
            assert handoff.more_waits(ours)
            assert ours.recv(100) == expected
        theirs.close()
        assert not handoff.more_waits(ours)
