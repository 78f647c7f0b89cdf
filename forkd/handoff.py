"""The wire between Apache and forkd: one message, its payload, and the file descriptors that travel with it.

One handoff is one message: at least one byte of payload and the client's fd in SCM_RIGHTS (unix(7)). The payload is

* one NUL byte: no data;
* SOH (0x01), a flag byte, one line of JSON, LF, then the data verbatim: an *envelope*;
* anything else: the data itself.

When the envelope's flag `DATA_IN_MEMFD` is set the data is not behind the LF but in the message's second fd, a memfd
sealed against writing and shrinking, so that nobody can change it, or cut it short under our mapping, after the check.

fd ownership: `receive` returns fds that the caller owns from then on; `send_handoff` only borrows. Whatever a message
carries beyond two fds never reaches us: the kernel drops what does not fit the room given to it.

No policy and no loop here: who may send, how much, and what a refusal means are decided elsewhere.
"""

import fcntl
import os
import socket
import struct
import termios
from collections.abc import Sequence
from socket import SocketType
from typing import Any, Final

import msgspec

SOH: Final = 0x01
DATA_IN_MEMFD: Final = 0x01
CLIENT_UNDER_TLS: Final = 0x02
CLIENT_RELAYED: Final = 0x04

NO_DATA: Final = b"\0"
MAX_INLINE_BYTES: Final = 65536
"""Data longer than this travels in a memfd: a message takes 212,960 bytes at most with default buffers."""
ENVELOPE_MAX_BYTES: Final = 131072
"""Room for an envelope beside the data, where both come as one."""
MAX_MESSAGE_BYTES: Final = 262144
"""Room for one received message; more than the kernel lets a sender with default buffers send."""

_CLIENT_FAMILIES: Final = (int(socket.AF_INET), int(socket.AF_INET6), int(socket.AF_UNIX))
_ANCILLARY_ROOM: Final = socket.CMSG_SPACE(2 * struct.calcsize("i"))
_RECEIVE_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_SOL_SOCKET: Final = int(socket.SOL_SOCKET)
_SCM_RIGHTS: Final = int(socket.SCM_RIGHTS)
_MSG_TRUNC: Final = int(socket.MSG_TRUNC)
_MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)
_FD: Final = struct.Struct("i")
_NONE: Final = bytes(_FD.size)
_LINGER_NOT: Final = struct.pack("ii", 1, 0)
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK


class BadEnvelope(ValueError):
    """The payload begins like an envelope and is none."""


class BadDataFd(ValueError):
    """The second fd is no memfd sealed against writing and shrinking."""


class DataTooLarge(ValueError):
    """The data exceeds `max_data_bytes`."""


class NotAClient(ValueError):
    """The fd is no connected stream socket of AF_INET, AF_INET6 or AF_UNIX."""


class ClientGone(NotAClient):
    """It was one, and has reset the connection."""


class Message:
    """What one recvmsg(2) returned. The receiver owns `fds`."""

    __slots__ = ("fds", "fds_truncated", "payload", "truncated")

    def __init__(self, payload: bytes, fds: tuple[int, ...], truncated: bool, fds_truncated: bool) -> None:
        self.payload = payload
        self.fds = fds
        self.truncated = truncated
        """The message was longer than the room for it (MSG_TRUNC)."""
        self.fds_truncated = fds_truncated
        """More fds were sent than arrived (MSG_CTRUNC): three were sent, or this process has no fd left."""


def receive(sock: SocketType, room: bytearray | memoryview) -> Message | None:
    """Read one message into `room` (scratch memory, at least MAX_MESSAGE_BYTES) and return it; None at end of file.

    Raises BlockingIOError when there is none, OSError otherwise. `socket.recv_fds` is not used because it ignores its
    flags, and without MSG_CMSG_CLOEXEC a program started meanwhile would inherit the client.
    """
    length, ancillary, flags, _ = sock.recvmsg_into([room], _ANCILLARY_ROOM, _RECEIVE_FLAGS)
    if not length and not ancillary:
        # The kernel looks for a message first and for the end of file then, and a sender that sends and closes between
        # the two seems to have sent nothing (measured on 6.18: 1 in 4,000 at the worst moment, 1 in 200 on a busy CPU).
        # What was sent before the close is there by now.
        length, ancillary, flags, _ = sock.recvmsg_into([room], _ANCILLARY_ROOM, _RECEIVE_FLAGS)
        if not length and not ancillary:
            return None
    fds: tuple[int, ...] = ()
    for level, kind, data in ancillary:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            fds += _FD.unpack(data) if len(data) == _FD.size else tuple(fd for (fd,) in _FD.iter_unpack(data))
    return Message(bytes(room[:length]), fds, bool(flags & _MSG_TRUNC), bool(flags & _MSG_CTRUNC))


def more_waits(sock: SocketType) -> bool:
    """Whether another message waits to be read, for a fraction of what it costs to try in vain (unix(7), SIOCINQ).

    Not told of: one without a single byte, and the end of file. They keep the socket readable.
    """
    length = bytearray(_FD.size)
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, length)
    return length != _NONE


def expects_data_fd(payload: bytes, *, envelopes: bool) -> bool:
    """Whether a second fd belongs to this payload: all that must be known of it before it is parsed."""
    return envelopes and len(payload) > 1 and payload[0] == SOH and bool(payload[1] & DATA_IN_MEMFD)


def understands_flags(payload: bytes, *, envelopes: bool) -> bool:
    """Whether the envelope, if it is one, asks for nothing that is unknown here (a client under TLS, as of now)."""
    known = DATA_IN_MEMFD | CLIENT_RELAYED
    return not envelopes or len(payload) < 2 or payload[0] != SOH or not payload[1] & ~known


def is_relayed(payload: bytes, *, envelopes: bool) -> bool:
    """Whether the client's end is Apache, which passes the answer on to a client that cannot be handed off."""
    return envelopes and len(payload) > 1 and payload[0] == SOH and bool(payload[1] & CLIENT_RELAYED)


def split_envelope(payload: bytes) -> tuple[int, bytes, bytes]:
    """Take an envelope apart: its flags, its line of JSON, and the data behind it. Raises BadEnvelope."""
    end = payload.find(b"\n", 2)
    if end < 0:
        raise BadEnvelope("no end of line after the JSON")
    return payload[1], payload[2:end], payload[end + 1 :]


def encode_envelope(envelope: dict[str, Any], data: bytes, *, data_in_memfd: bool = False) -> bytes:
    """The payload that carries `envelope` and `data`; with `data_in_memfd`, `data` is left out and only announced."""
    head = bytes((SOH, DATA_IN_MEMFD if data_in_memfd else 0)) + msgspec.json.encode(envelope) + b"\n"
    return head if data_in_memfd else head + data


def sealed_memfd(data: bytes) -> int:
    """A memfd that holds `data`, sealed for good, to be read from its start. The caller owns it."""
    fd = os.memfd_create("handoff-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            written = os.write(fd, view)
            view = view[written:]
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_sealed_memfd(fd: int, max_bytes: int) -> bytes:
    """The whole content of a sealed memfd; `fd` stays the caller's.

    Raises BadDataFd when it is anything else (a pipe would block, an unsealed file could change under us), and
    DataTooLarge.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise BadDataFd("not a memfd") from error
    if seals & _SEALS != _SEALS:
        raise BadDataFd("not sealed against writing and shrinking")
    size = os.fstat(fd).st_size
    if size > max_bytes:
        raise DataTooLarge(f"{size} bytes, the limit is {max_bytes}")
    try:
        data = os.pread(fd, size, 0)
    except OSError as error:  # opened for writing only, before it was sealed
        raise BadDataFd("not readable") from error
    if len(data) != size:
        raise BadDataFd("shorter than it says")
    return data


def send_handoff(sock: socket.socket, payload: bytes, fds: Sequence[int]) -> None:
    """Send one handoff, as one message (a stream socket may take it in pieces; the fds go with the first).

    The fds stay the caller's, who must close them: the receiver has its own now.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sent = sock.sendmsg([payload], rights, socket.MSG_NOSIGNAL)
    if sent != len(payload):
        sock.sendall(payload[sent:], socket.MSG_NOSIGNAL)


def reset_on_close(fd: int) -> None:
    """Make the last close of this socket, in whatever process, reset the connection instead of ending it in order.

    For a body without a length (RFC 9112, 6.3: it ends with the connection), where a reset alone tells a client that
    it is not whole. `fd` stays the caller's. Raises OSError.
    """
    sock = SocketType(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    finally:
        sock.detach()


def check_client(fd: int) -> tuple[int, str]:
    """The address family and the peer's address ("" for AF_UNIX) of a client's fd, which stays the caller's.

    Raises NotAClient for everything that is not a connected stream socket of a family HTTP clients come by, and
    ClientGone for one that was.
    """
    try:
        sock = SocketType(-1, -1, 0, fd)  # family and type are asked for, the protocol is nothing to us
    except OSError as error:
        raise NotAClient("not a socket") from error
    try:
        family = sock.family
        if sock.type != socket.SOCK_STREAM:
            raise NotAClient(f"socket type {sock.type}")
        if family not in _CLIENT_FAMILIES:
            raise NotAClient(f"address family {family}")
        try:
            peer = sock.getpeername()
        except OSError as error:
            gone = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise ClientGone(os.strerror(gone)) if gone else NotAClient("not connected") from error
        return family, "" if family == socket.AF_UNIX else peer[0]
    finally:
        sock.detach()
