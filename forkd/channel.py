"""The wire between the master and one worker: a SEQPACKET socketpair.

Down, one message each: a fixed head, then a body, and the fds that belong to it.

    ASSIGN  body: the handoff's payload as it came. fds: the client, then perhaps a memfd.
    END     body: one byte (the state the client was left in), the code, LF, the payload if still kept. fd: the client.
            Someone else could not go on with this client: tell it, in the way that state calls for.
    DRAIN   no more handoffs will come: finish what there is, then exit.
    STOP    end every stream now, with `code: shutdown`, then exit.

Up: one kind byte, then (slot, attempt) pairs.

    READY     the worker can take handoffs.
    FINISHED  these slots are done: their client is closed on the worker's side.
    RETURNED  this worker had no fd to receive these clients with: give them to another.
    DRAINING  the worker was told by a signal to go: give it nothing more.

The end of file says the same as DRAIN: a worker whose master died finishes its streams and goes.
A pair names the attempt because a slot is used again: a late report must not cross out the next client.
"""

import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from socket import SocketType
from typing import Final


class Down(IntEnum):
    """Messages from the master to a worker."""

    ASSIGN = 1
    END = 2
    DRAIN = 3
    STOP = 4


class Up(IntEnum):
    """Messages from a worker to the master."""

    READY = 1
    FINISHED = 2
    RETURNED = 3
    DRAINING = 4


PAYLOAD_IN_MEMFD: Final = 0x01
"""The whole payload is in the second fd (it was too long for a message); the body is empty."""
DATA_FD: Final = 0x02
"""The second fd is the sender's own memfd with the data that the envelope announces."""

_HEAD: Final = struct.Struct("<IIBBHd")
HEAD_BYTES: Final = _HEAD.size
MAX_BODY_BYTES: Final = 65536 + 256
_FD: Final = struct.Struct("i")
_TWO_FDS: Final = struct.Struct("ii")
_SOL_SOCKET: Final = int(socket.SOL_SOCKET)
_SCM_RIGHTS: Final = int(socket.SCM_RIGHTS)
SEND_FLAGS: Final = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_MSG_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_PAIR: Final = struct.Struct("<II")


@dataclass(slots=True, init=False)  # the __init__ that is made would not be compiled
class Assignment:
    """The head of a down message. `received_at` is CLOCK_MONOTONIC, which all processes of a machine share."""

    slot: int
    attempt: int
    kind: int
    flags: int
    listener: int
    received_at: float

    def __init__(self, slot: int, attempt: int, kind: int, flags: int, listener: int, received_at: float) -> None:
        self.slot = slot
        self.attempt = attempt
        self.kind = kind
        self.flags = flags
        self.listener = listener
        self.received_at = received_at


def send_down(sock: SocketType, head: Assignment, body: bytes, fds: Sequence[int]) -> None:
    """Send one message; the fds stay the caller's. Raises OSError: EAGAIN, ENOBUFS, ETOOMANYREFS all mean "full"."""
    rights = [(_SOL_SOCKET, _SCM_RIGHTS, (_FD if len(fds) == 1 else _TWO_FDS).pack(*fds))] if fds else []
    packed = _HEAD.pack(head.slot, head.attempt, head.kind, head.flags, head.listener, head.received_at)
    sock.sendmsg([packed, body], rights, SEND_FLAGS)


def parse_down(message: bytes) -> tuple[Assignment, bytes]:
    """Split a down message into its head and its body."""
    return Assignment(*_HEAD.unpack_from(message)), message[HEAD_BYTES:]


def end_body(state: int, code: str, payload: bytes) -> bytes:
    """The body of an END message."""
    return bytes((state,)) + code.encode("ascii") + b"\n" + payload


def parse_end_body(body: bytes) -> tuple[int, str, bytes]:
    """The state, the code and the payload ("" if it was not kept) of an END message."""
    code, _, payload = body[1:].partition(b"\n")
    return body[0], code.decode("ascii"), payload


def pack_up(kind: Up, pairs: Iterable[tuple[int, int]] = ()) -> bytes:
    """One up message; `pairs` are (slot, attempt)."""
    return bytes((kind,)) + b"".join([_PAIR.pack(slot, attempt) for slot, attempt in pairs])


def parse_up(message: bytes) -> tuple[int, Iterable[tuple[int, int]]]:
    """The kind of an up message (see Up) and its (slot, attempt) pairs."""
    return message[0], _PAIR.iter_unpack(message[1:])


def receive_up(sock: SocketType, room: bytearray) -> bytes:
    """Read one up message into `room` (scratch memory) and return it; b"" at the end of file.

    It has no room for fds: were any sent this way, the kernel would close them. Raises BlockingIOError when there is no
    message, OSError otherwise.
    """
    length = sock.recv_into(room, 0, _MSG_DONTWAIT)
    if not length:  # or a message and then the end came while the kernel looked: see `handoff.receive`
        length = sock.recv_into(room, 0, _MSG_DONTWAIT)
    return bytes(room[:length])
