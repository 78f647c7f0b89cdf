"""Unix listeners: owning the path, binding, permissions, peer credentials, closing without loss.

A path belongs to whoever holds the flock on `PATH.lock`. Only the holder may replace a socket file, so two daemons
started at once cannot both find the other's file stale; and a socket on which something still answers is never
replaced, lock or no lock, because programs other than forkd take no lock. The lock file itself is never removed:
removing a lock file that somebody else has open makes two locks of one.
"""

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import select
import socket
import stat
import struct
from typing import Final

from forkd.board import Kind
from forkd.settings import ListenerSettings

BACKLOG: Final = 4096
_SO_PEERGROUPS: Final = 59
_GROUPS_BYTES: Final = 1024
"""The most that getsockopt of Python reads: 256 groups."""
_UCRED: Final = struct.Struct("iII")
_TYPES: Final = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}


class ListenError(Exception):
    """The socket cannot be had; the message says why and what to do."""


class Listener:
    """One bound Unix listener. It owns its socket, its lock and its path until `close`."""

    def __init__(
        self,
        index: int,
        settings: ListenerSettings,
        inherited: socket.socket | None = None,
        lock: int = -1,
        *,
        lent: bool = False,
    ) -> None:
        """Bind, or share a socket that somebody else bound (`inherited`), with its lock if it has one.

        `index` is its place in `Settings.all_listeners`. `lent`: see there. Raises ListenError.
        """
        self.index = index
        self.shared = inherited is not None
        """Somebody else has, or will have, this socket too: it is never shut down, nor its file removed."""
        self.lent = lent or (inherited is not None and lock < 0)
        """It stays somebody else's for good: systemd's, who goes on listening when forkd is gone."""
        self.settings = settings
        self.path = settings.path
        self.type = int(_TYPES[settings.socket_type])
        self.is_stream = settings.socket_type == "stream"
        self.is_bare = settings.bare
        self.takes_envelopes = settings.takes_envelopes
        self.kind = Kind.BARE if settings.bare else Kind.PLAIN
        """Of every client that comes by it."""
        self._uids = {_user(name) for name in settings.allow_users}
        self._gids = {_group(name) for name in settings.allow_groups}
        self._backlog = select.poll()
        if inherited is not None and inherited.type != self.type:
            raise ListenError(f"{self.path} is no {settings.socket_type} socket, and only a restart makes it one")
        if inherited is not None and lock >= 0:
            self._lock, self.sock = lock, inherited
            self._backlog.register(inherited, select.POLLIN)
            self._inode = os.stat(self.path).st_ino if os.path.exists(self.path) else 0
            return
        directory = os.path.dirname(self.path)
        try:
            os.makedirs(directory or ".", mode=0o755, exist_ok=True)
            self._lock = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ListenError(f"cannot lock {self.path}.lock: {error.strerror}") from error
        try:
            self._take_lock()
            if inherited is not None:
                self.sock = inherited
                self.sock.setblocking(False)
            else:
                self._remove_stale()
                self.sock = self._bind()
        except OSError as error:
            os.close(self._lock)
            raise ListenError(f"cannot listen on {self.path}: {error.strerror}") from error
        except BaseException:
            os.close(self._lock)
            raise
        self._backlog.register(self.sock, select.POLLIN)
        self._inode = os.stat(self.path).st_ino

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            raise ListenError(
                f"{self.path} belongs to another forkd (pid {holder or 'unknown'}); stop it first, or choose another "
                "path with --socket"
            ) from error
        self._note_holder()

    def take_over(self) -> None:
        """Whoever passed this socket on is about to go, or gave it up: from now on it is ours."""
        self.shared = self.lent
        self._note_holder()

    def _note_holder(self) -> None:
        """For whoever finds the lock taken."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _remove_stale(self) -> None:
        """Remove a socket file that nobody answers on. Raises ListenError if it is alive, or no socket at all."""
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ListenError(f"{self.path} exists and is no socket; remove it, or choose another path")
        with socket.socket(socket.AF_UNIX, _TYPES[self.settings.socket_type]) as probe:
            probe.setblocking(False)
            if probe.connect_ex(self.path) != errno.ECONNREFUSED:
                raise ListenError(f"{self.path} is in use by another program; stop it first, or choose another path")
        os.unlink(self.path)

    def _bind(self) -> socket.socket:
        settings = self.settings
        sock = socket.socket(socket.AF_UNIX, _TYPES[settings.socket_type])
        try:
            sock.setblocking(False)
            # The umask makes the file appear with no more than its final permissions: there is no moment in which
            # somebody who should not connect can.
            before = os.umask(0o777 & ~settings.mode)
            try:
                sock.bind(self.path)
            finally:
                os.umask(before)
        except BaseException:
            sock.close()
            raise
        try:
            if settings.group is not None:
                self._give_to_group(settings.group)
            os.chmod(self.path, settings.mode)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            os.unlink(self.path)
            raise
        return sock

    def _give_to_group(self, group: str | int) -> None:
        try:
            os.chown(self.path, -1, _group(group))
        except PermissionError as error:
            raise ListenError(
                f"cannot give {self.path} to the group {group}: you are neither root nor in that group "
                "(socket_group of the configuration; null leaves the group as it is)"
            ) from error

    def allows(self, sender: socket.SocketType) -> bool:
        """Whether the process that connected may hand over (SO_PEERCRED, SO_PEERGROUPS; unix(7))."""
        if not self._uids and not self._gids:
            return True
        _, uid, gid = _UCRED.unpack(sender.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid in self._uids or gid in self._gids:
            return True
        if not self._gids:
            return False
        try:
            groups = sender.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        except OSError:  # ERANGE: it has more groups than we can read
            return False
        return not self._gids.isdisjoint(struct.unpack(f"{len(groups) // 4}I", groups))

    def waits(self) -> bool:
        """Whether another connection waits, for a tenth of what it costs to accept in vain."""
        return bool(self._backlog.poll(0))

    @property
    def lock_fd(self) -> int:
        """Passed on with the socket."""
        return self._lock

    def refuse_connections(self) -> None:
        """From now on connect(2) fails with ECONNREFUSED; what is in the backlog can still be accepted. Not for one
        that is shared: that would end the others' too.
        """
        self.sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Give up socket, path and lock, in this order: nobody may take the path while we might still unlink it."""
        self.sock.close()
        if not self.shared:
            with contextlib.suppress(OSError):
                if os.lstat(self.path).st_ino == self._inode:
                    os.unlink(self.path)
        os.close(self._lock)


def _user(name: str | int) -> int:
    try:
        return name if isinstance(name, int) else pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise ListenError(f"there is no user {name!r}") from error


def _group(name: str | int) -> int:
    try:
        return name if isinstance(name, int) else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ListenError(f"there is no group {name!r}") from error
