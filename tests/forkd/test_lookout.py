"""Who listens, found from outside."""

import socket
from pathlib import Path

import pytest

from forkd.lookout import described, holder, listens


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
@pytest.mark.parametrize("name", ["forkd.sock", "two words", "ü"])
def test_a_listener_is_seen_and_not_disturbed(tmp_path: Path, kind: socket.SocketKind, name: str) -> None:
    path = str(tmp_path / name)
    with socket.socket(socket.AF_UNIX, kind) as listener:
        assert not listens(path)
        listener.bind(path)
        assert not listens(path)
        listener.listen()
        listener.setblocking(False)
        assert listens(path)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not listens(path)  # the file is still there: stale
    assert Path(path).exists()


def test_a_longer_path_is_another(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a b"))
        listener.listen()
        assert not listens("b")
        assert not listens(str(tmp_path / "a"))


def test_the_lock_tells_the_pid(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert holder(str(path)) is None
    lock = tmp_path / "s.lock"
    lock.write_bytes(b"")
    assert holder(str(path)) is None
    lock.write_bytes(b"4711\n")
    assert holder(str(path)) == 4711
    assert described(str(path)) == ""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert described(str(path)) == "forkd (pid 4711)"
        lock.write_bytes(b"")
        assert described(str(path)) == "forkd"
        lock.unlink()
        assert described(str(path)) == "another program"
