"""The sender's side of the wire: what Apache's module does, for those of us who hand over without Apache."""

import contextlib
import errno
import os
import socket
import struct
from typing import Any

from forkd import handoff


def hand_over(path: str, client: socket.socket, envelope: dict[str, Any] | None, data: bytes, patience: float) -> None:
    """Give `client` to the daemon that listens on `path`, with `data`, in an envelope or (None) by itself.

    On return the daemon has a copy of the client, whose every byte is its business from now on; `client` stays the
    caller's to close. Whatever is raised, the daemon has nothing: BlockingIOError if it took nothing for `patience`
    seconds, OSError (connect(2), sendmsg(2)) otherwise.
    """
    in_memfd = len(data) > handoff.MAX_INLINE_BYTES
    if envelope is not None or in_memfd:  # data by itself has no other way to travel in a memfd
        payload = handoff.encode_envelope(envelope or {}, data, data_in_memfd=in_memfd)
    else:
        payload = data or handoff.NO_DATA
    with contextlib.ExitStack() as stack:
        fds = [client.fileno()]
        if in_memfd:
            memfd = handoff.sealed_memfd(data)
            stack.callback(os.close, memfd)
            fds.append(memfd)
        sock = stack.enter_context(_connected(path, patience))
        handoff.send_handoff(sock, payload, fds)


def _connected(path: str, patience: float) -> socket.socket:
    """A connection of the type that the listener has."""
    try:
        return _connect(path, socket.SOCK_SEQPACKET, patience)
    except OSError as error:
        if error.errno != errno.EPROTOTYPE:
            raise
        return _connect(path, socket.SOCK_STREAM, patience)


def _connect(path: str, kind: socket.SocketKind, patience: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        # Not settimeout: non-blocking, connect(2) fails with EAGAIN when the backlog is full instead of waiting.
        seconds, fraction = divmod(patience, 1)
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(fraction * 1_000_000))
        )
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
