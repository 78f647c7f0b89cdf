"""Listeners: whose the path is, who may connect, how one closes. `tests/system/test_config_cli.py` has the daemon's."""

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.listener import Listener, ListenError
from forkd.settings import FileMode, ListenerSettings
from tests.harness import connect, own_fds


@pytest.fixture(autouse=True)
def no_fd_leaks() -> Iterator[None]:
    before = own_fds()
    yield
    assert own_fds() == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forkd.sock"


def settings(path: Path, **more: Any) -> ListenerSettings:
    return ListenerSettings(path=str(path), **more)


def test_it_listens_and_leaves_nothing_but_its_lock(path: Path) -> None:
    listener = Listener(3, settings(path, mode=FileMode(0o640)))
    assert listener.index == 3
    assert not listener.is_stream
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert Path(f"{path}.lock").read_text() == f"{os.getpid()}\n"
    assert stat.S_IMODE(os.stat(f"{path}.lock").st_mode) == 0o600
    assert not os.get_inheritable(listener.sock.fileno())
    with connect(path) as sender:
        sock, _ = listener.sock.accept()
        sender.send(b"x")
        assert sock.recv(1) == b"x"
        sock.close()
    listener.close()
    assert [each.name for each in path.parent.iterdir()] == ["forkd.sock.lock"]


@pytest.mark.parametrize("passed_on", [False, True])
def test_it_knows_whether_another_waits(path: Path, passed_on: bool) -> None:
    listener = before = Listener(0, settings(path))
    if passed_on:
        listener = Listener(0, settings(path), before.sock, before.lock_fd)
    assert not listener.waits()
    with connect(path), connect(path):
        for more in (True, False):
            assert listener.waits()
            listener.sock.accept()[0].close()
            assert listener.waits() is more
    before.close()


def test_the_umask_is_given_back(path: Path) -> None:
    before = os.umask(0o027)
    try:
        Listener(0, settings(path, mode=FileMode(0o666))).close()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_only_one_may_have_a_path(path: Path) -> None:
    first = Listener(0, settings(path))
    with pytest.raises(ListenError, match=f"belongs to another forkd .pid {os.getpid()}."):
        Listener(1, settings(path))
    with connect(path):
        first.sock.accept()[0].close()
    first.close()
    Listener(1, settings(path)).close()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as dead:
            dead.bind(str(path))
        listener = Listener(0, settings(path))
        connect(path).close()
        listener.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("own", ["stream", "seqpacket"])
def test_a_living_socket_never(path: Path, kind: socket.SocketKind, own: str) -> None:
    with socket.socket(socket.AF_UNIX, kind) as alive:
        alive.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            alive.listen(0)
        with pytest.raises(ListenError, match="in use by another program"):
            Listener(0, settings(path, type=own))
    assert path.exists()


def test_a_living_socket_with_a_full_backlog_neither(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alive, connect_room() as waiting:
        alive.bind(str(path))
        alive.listen(0)
        waiting.connect(str(path))
        with pytest.raises(ListenError, match="in use by another program"):
            Listener(0, settings(path))
    assert path.exists()


def connect_room() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_what_is_no_socket_stays(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ListenError, match="no socket"):
        Listener(0, settings(path))
    assert path.read_text() == "precious"
    path.unlink()
    path.mkdir()
    with pytest.raises(ListenError, match="no socket"):
        Listener(0, settings(path))


def test_a_path_taken_over_by_another_is_not_unlinked(path: Path) -> None:
    listener = Listener(0, settings(path))
    path.unlink()
    path.write_text("not ours")
    listener.close()
    assert path.read_text() == "not ours"


def test_a_bind_that_fails_leaves_no_socket(path: Path) -> None:
    with pytest.raises(ListenError, match="there is no group"):
        Listener(0, settings(path, group="no such group"))
    assert not path.exists()


def test_unknown_names(path: Path) -> None:
    with pytest.raises(ListenError, match="there is no user 'no such user'"):
        Listener(0, settings(path, allow_users=("no such user",)))
    with pytest.raises(ListenError, match="there is no group"):
        Listener(0, settings(path, allow_groups=("no such group",)))
    assert not path.exists()


def allows(path: Path, **who: Any) -> bool:
    listener = Listener(0, settings(path, **who))
    with connect(path):
        sock, _ = listener.sock.accept()
        try:
            return listener.allows(sock)
        finally:
            sock.close()
            listener.close()


def test_who_may_hand_over(path: Path) -> None:
    uid, gid = os.geteuid(), os.getegid()
    assert allows(path)
    assert allows(path, allow_users=(uid,))
    assert allows(path, allow_groups=(gid,))
    assert allows(path, allow_users=(uid + 1,), allow_groups=(gid,))
    assert not allows(path, allow_users=(uid + 1,))
    assert not allows(path, allow_groups=(gid + 54321,))
    assert not allows(path, allow_users=(uid + 1,), allow_groups=(gid + 54321,))


class Sender:
    """A connection whose other side has these supplementary groups, or more than can be read."""

    def __init__(self, groups: list[int] | None) -> None:
        self.groups = groups

    def getsockopt(self, _level: int, option: int, size: int) -> bytes:
        assert 0 < size <= 1024  # the most that Python passes on
        if option == socket.SO_PEERCRED:
            return struct.pack("iII", 1, 65534, 65534)
        if self.groups is None:
            raise OSError(34, "Numerical result out of range")
        return struct.pack(f"{len(self.groups)}I", *self.groups)


def test_supplementary_groups_count_too(path: Path) -> None:
    listener = Listener(0, settings(path, allow_groups=(777,)))
    for groups, allowed in (([], False), ([1, 2], False), ([1, 777], True), (None, False)):
        assert listener.allows(Sender(groups)) is allowed  # type: ignore[arg-type]
    listener.close()


def test_refusing_connections_keeps_those_that_wait(path: Path) -> None:
    listener = Listener(0, settings(path))
    with connect(path) as early:
        early.send(b"x")
        listener.refuse_connections()
        with pytest.raises(ConnectionRefusedError):
            connect(path)
        sock, _ = listener.sock.accept()
        assert sock.recv(1) == b"x"
        sock.close()
        with pytest.raises(BlockingIOError):
            listener.sock.accept()
    listener.close()


def passed_on(path: Path, **more: Any) -> tuple[Listener, Listener]:
    """A listener, and the same as the master of an upgrade has it: other fds, one socket, one lock."""
    old = Listener(0, settings(path))
    return old, Listener(0, settings(path, **more), old.sock.dup(), os.dup(old.lock_fd))


def test_a_master_that_has_not_taken_over_harms_nothing_by_leaving(path: Path) -> None:
    old, new = passed_on(path)
    assert new.shared
    new.close()
    connect(path).close()
    with pytest.raises(ListenError, match="belongs to another forkd"):
        Listener(1, settings(path))
    old.close()
    assert not path.exists()


def test_a_master_that_took_over_owns_the_path(path: Path) -> None:
    old, new = passed_on(path)
    Path(f"{path}.lock").write_text("12345\n")
    new.take_over()
    assert not new.shared
    assert Path(f"{path}.lock").read_text() == f"{os.getpid()}\n"
    old.shared = True
    old.close()
    connect(path).close()
    new.refuse_connections()
    new.close()
    assert not path.exists()


def test_a_socket_of_systemd_stays_systemds_over_an_upgrade(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as systemds:
        systemds.bind(str(path))
        systemds.listen()
        old = Listener(0, settings(path), systemds.dup())
        assert old.shared
        assert old.lent
        new = Listener(0, settings(path), old.sock.dup(), os.dup(old.lock_fd), lent=old.lent)
        old.close()
        new.take_over()
        assert new.shared
        new.close()
        connect(path).close()


def test_a_socket_does_not_change_its_type_by_being_passed_on(path: Path) -> None:
    old = Listener(0, settings(path))
    copy = old.sock.dup()
    with pytest.raises(ListenError, match="is no stream socket, and only a restart makes it one"):
        Listener(0, settings(path, type="stream"), copy, old.lock_fd)
    copy.close()
    old.close()
