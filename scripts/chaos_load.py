"""The load of `chaos.py`: new streams at a steady rate, each read to its end and judged.

A process of its own, so that its clients are never kept waiting by what is done to the daemon. Each stream is a TCP
connection over the loopback, one end of which is handed over as the Apache module does it: connect, one sendmsg of data
and fd, close. EAGAIN (the backlog is full) is tried again a millisecond later and EPIPE (the master that accepted the
connection accepts no more) at once. That nobody listens (ENOENT, ECONNREFUSED) is a fault of its own, whatever becomes
of the stream.

    chaos_load.py SOCKET RATE EXPECTED RESULT

EXPECTED is a file: what each stream must say after its head. It says "ready" on standard output, then reads commands,
one a line: `go`, `pause`, `end` (no new streams; finish those there are, write RESULT, leave). RESULT is a file too,
with one JSON object: see `Result`.
"""

import contextlib
import errno
import gc
import json
import os
import re
import select
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Final, NamedTuple

DATA: Final = b'{"prompt":"Hello"}'
PATIENCE_SECS: Final = 30.0
"""After `end`, before what has not ended is given up."""
RETRY_SECS: Final = 0.001
BURST: Final = 8
LISTENERS: Final = 4
"""Ports of our own, because the kernel keeps each pair of ports for a minute after its connection."""
COMPLETE: Final = "complete"
COMPLETE_AND_MORE: Final = "complete, and more"
"""Behind the last word came `event: error`: a worker died between that word and the end of the connection."""

_STRAY_HEAD: Final = re.compile(rb"HTTP/1\.1 502 [^\0]*\r\n\r\n\Z")


class Outcome(NamedTuple):
    """One stream. Times are monotonic seconds, which all processes of a machine share; -1: never."""

    sent_at: float
    late: float
    """Handed over so long after it was due."""
    first_at: float
    ended_at: float
    verdict: str


@dataclass(slots=True)
class Result:
    """All streams, and what happened when they were handed over."""

    outcomes: list[Outcome] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    """When nobody listened."""
    backlog_full: int = 0
    broken_pipes: int = 0
    explanation: str = ""
    """The first stream whose end nobody can explain, as it was read."""


def verdict(raw: bytes, expected: bytes, *, reset: bool) -> str:
    """What a strict client makes of an answer: COMPLETE, the code that it was told, or what is wrong with it."""
    if reset:
        return "reset"
    head, end, body = raw.partition(b"\r\n\r\n")
    if not end:
        return "silent end"
    if not head.startswith(b"HTTP/1.1 200 ") and b"application/json" in head:
        return _code(body)
    if body == expected:
        return COMPLETE
    if body.startswith(expected):
        # Perhaps behind a line end, in case what was said last had been cut.
        return COMPLETE_AND_MORE if body[len(expected) :].lstrip(b"\n").startswith(b"event: error\n") else "garbled"
    text, error, told = body.partition(b"event: error\ndata: ")
    if not error:
        return "silent end" if expected.startswith(body) else "garbled"
    # The head of a 502 may stand before it, when the worker died with its own head half said.
    text = _STRAY_HEAD.sub(b"", text).rstrip(b"\n")
    return _code(told) if expected.startswith(text) else "garbled"


def _code(text: bytes) -> str:
    try:
        code = json.loads(text)["code"]
    except (ValueError, KeyError, TypeError):
        return "garbled"
    return code if isinstance(code, str) else "garbled"


class _Stream:
    """One that has been handed over."""

    __slots__ = ("first_at", "late", "pieces", "sent_at", "sock")

    def __init__(self, sock: socket.socket, late: float) -> None:
        self.sock = sock
        self.late = late
        self.sent_at = time.monotonic()
        self.first_at = -1.0
        self.pieces: list[bytes] = []


class Load:
    """The loop."""

    def __init__(self, path: str, rate: float, expected: bytes) -> None:
        self._path = path
        self._rate = rate
        self._expected = expected
        self._epoll = select.epoll()
        self._streams: dict[int, _Stream] = {}
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(LISTENERS)]
        self._flows = False
        self._ends = False
        self._begun_at = 0.0
        self._since = 0
        self._retry_at = 0.0
        self.result = Result()

    def run(self) -> None:
        """Obey commands until `end`, and then finish."""
        os.set_blocking(0, False)
        self._epoll.register(0, select.EPOLLIN)
        give_up = float("inf")
        while not self._ends or self._streams:
            now = time.monotonic()
            if self._ends and give_up == float("inf"):
                give_up = now + PATIENCE_SECS
            if now >= give_up:
                break
            wake = self._hand_over_due(now) if self._flows else min(give_up, now + 1)
            for fd, _ in self._epoll.poll(max(0.0, wake - time.monotonic())):
                if fd == 0:
                    self._obey()
                else:
                    self._read(self._streams[fd])
        for stream in list(self._streams.values()):
            self._end(stream, "never ended")

    def _obey(self) -> None:
        for command in os.read(0, 4096).decode().split() or ["end"]:  # end of file: whoever started us is gone
            self._flows = command == "go"
            self._ends = command == "end"
            self._begun_at, self._since = time.monotonic(), 0
        if self._ends:
            self._epoll.unregister(0)

    def _hand_over_due(self, now: float) -> float:
        """Hand over what is due, a few at most; returns when to come again."""
        for _ in range(BURST):
            due = max(self._begun_at + self._since / self._rate, self._retry_at)
            if due > now:
                return due
            if not self._hand_over(now - self._begun_at - self._since / self._rate):
                self._retry_at = now + RETRY_SECS
                return self._retry_at
            self._since += 1
        return now

    def _hand_over(self, late: float) -> bool:
        """False: the backlog is full, or nobody listens: try again."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
            sender.setblocking(False)
            try:
                sender.connect(self._path)
            except BlockingIOError:
                self.result.backlog_full += 1
                return False
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                    raise
                self.result.refused.append(time.monotonic())
                return False
            listener = self._listeners[self._since % LISTENERS]
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
            stream = _Stream(client, late)
            with server:
                try:
                    rights = struct.pack("i", server.fileno())
                    sender.sendmsg([DATA], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                except BrokenPipeError:
                    self.result.broken_pipes += 1
                    client.close()
                    return False
        client.setblocking(False)
        self._streams[client.fileno()] = stream
        self._epoll.register(client, select.EPOLLIN)
        return True

    def _read(self, stream: _Stream) -> None:
        try:
            piece = stream.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self._end(stream, "reset")
            return
        if not piece:
            self._end(stream, verdict(b"".join(stream.pieces), self._expected, reset=False))
            return
        if stream.first_at < 0:
            stream.first_at = time.monotonic()
        stream.pieces.append(piece)

    def _end(self, stream: _Stream, how: str) -> None:
        if how not in (COMPLETE, COMPLETE_AND_MORE, "worker_lost") and not self.result.explanation:
            self.result.explanation = f"{how}: {b''.join(stream.pieces)!r}"
        del self._streams[stream.sock.fileno()]
        self._epoll.unregister(stream.sock)
        stream.sock.close()
        self.result.outcomes.append(Outcome(stream.sent_at, stream.late, stream.first_at, time.monotonic(), how))


def main() -> None:
    """See the module."""
    path, rate, expected, result = sys.argv[1:]
    with open(expected, "rb") as file:
        load = Load(path, float(rate), file.read())
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a real client does not wait for a CPU that forkd's workers have
    gc.disable()  # nothing here makes cycles, and a pause would be taken for the daemon's
    print("ready", flush=True)
    load.run()
    with open(result, "w", encoding="utf-8") as output:
        json.dump(asdict(load.result), output)


if __name__ == "__main__":
    main()
