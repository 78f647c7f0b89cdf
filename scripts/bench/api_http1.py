"""HTTP/1.1 as the fake API speaks it: keep-alive, content-length in, chunked out. No pipelining: nobody does it."""

import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from api_answer import TRIAL_MODEL, answer
from api_loop import Acceptor, Connection, Loop

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TRIAL: Final = f'"{TRIAL_MODEL}"'.encode()


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer, framed."""

    chunks: tuple[bytes, ...]
    ending: tuple[bytes, ...]


def http1(words: Sequence[str]) -> Acceptor:
    """The protocol, saying `words`."""

    def encoded(usage: bool) -> Encoded:
        plain = answer(words, usage=usage)
        return Encoded(
            tuple(_chunk(event) for event in plain.chunks),
            (*(_chunk(event) for event in plain.ending[:-1]), _chunk(plain.ending[-1]) + b"0\r\n\r\n"),
        )

    answers = (encoded(False), encoded(True))
    return lambda loop, sock: Http1(loop, sock, answers)


class Http1(Connection):
    """A connection, which is its own stream: it carries one at a time."""

    __slots__ = ("_answer", "_answers", "_busy", "_input", "_sent", "due")

    def __init__(self, loop: Loop, sock: socket.socket, answers: tuple[Encoded, Encoded]) -> None:
        super().__init__(loop, sock)
        self._answers = answers
        self._answer = answers[0]
        self._input = b""
        self._busy = False
        self._sent = 0
        self.due = 0.0

    def received(self, data: bytes) -> None:
        """Answer as soon as the request is whole."""
        self._input += data
        head, separator, rest = self._input.partition(b"\r\n\r\n")
        if self._busy or not separator:
            return
        length = _LENGTH.search(head)
        if length is None or not head.startswith(b"POST /v1/chat/completions "):
            self.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.close()
        elif len(rest) >= int(length[1]):
            self._input = rest[int(length[1]) :]
            self._begin(rest)

    def _begin(self, body: bytes) -> None:
        loop, totals = self._loop, self._loop.totals
        self._answer = self._answers[b'"include_usage"' in body]
        self.send(_HEAD)
        if _TRIAL in body:
            for event in (*self._answer.chunks, *self._answer.ending):
                self.send(event)
            return
        self.count()
        totals.streams += 1
        self._busy = True
        self._sent = 1
        self.send(self._answer.chunks[0])
        totals.chunks += 1
        totals.first.append(time.monotonic() - loop.now)
        loop.begin(self)

    def step(self) -> bool:
        """The next chunk, or the ending."""
        if not self.alive:
            return False
        answer, totals = self._answer, self._loop.totals
        if self._sent < len(answer.chunks):
            self.send(answer.chunks[self._sent])
            self._sent += 1
            totals.chunks += 1
            return True
        for event in answer.ending:
            self.send(event)
        totals.whole += self.alive
        self._busy = False
        if self._input:
            self.received(b"")
        return False


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
