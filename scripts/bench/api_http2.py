"""HTTP/2 (RFC 9113) as the fake API speaks it: as much as a client's requests need, and no library.

Every request is the same POST, so its header block is never decoded, and the block of the answer is a constant that
uses no dynamic table (RFC 7541, 6.1 and 6.2.2): neither side has state to keep. Flow control is kept to the letter for
what is sent: a frame that does not fit a window waits, in order with the others of its stream, for WINDOW_UPDATE.
Each event is one DATA frame and one write.
"""

import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from api_answer import TRIAL_MODEL, answer
from api_loop import Acceptor, Connection, Loop, Totals

MAX_CONCURRENT_STREAMS: Final = 128
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 0x1, 0x1, 0x4, 0x8
_SETTINGS_MAX_CONCURRENT_STREAMS, _SETTINGS_INITIAL_WINDOW_SIZE = 3, 4
_DEFAULT_WINDOW: Final = 65_535
_RENEW_AT: Final = 16_384
_CONTENT_TYPE: Final = b"text/event-stream; charset=utf-8"
# ":status: 200" is entry 8 of the static table; "content-type" is entry 31, its value a literal without indexing.
_HEAD: Final = b"\x88\x0f\x10" + bytes((len(_CONTENT_TYPE),)) + _CONTENT_TYPE
_TRIAL: Final = f'"{TRIAL_MODEL}"'.encode()


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer as (length, type and flags; payload) of DATA frames, which lack the stream's id between the two."""

    chunks: tuple[tuple[bytes, bytes], ...]
    ending: tuple[tuple[bytes, bytes], ...]


def http2(words: Sequence[str]) -> Acceptor:
    """The protocol, saying `words`."""

    def encoded(usage: bool) -> Encoded:
        plain = answer(words, usage=usage)
        ending = [_head(_DATA, 0, event) for event in plain.ending[:-1]]
        ending.append(_head(_DATA, _END_STREAM, plain.ending[-1]))
        return Encoded(
            tuple((_head(_DATA, 0, event), event) for event in plain.chunks),
            tuple(zip(ending, plain.ending, strict=True)),
        )

    answers = (encoded(False), encoded(True))
    return lambda loop, sock: Http2(loop, sock, answers)


class Http2(Connection):
    """A connection and its streams."""

    __slots__ = ("_answers", "_initial_window", "_input", "_requests", "_streams", "_unacknowledged", "_window")

    def __init__(self, loop: Loop, sock: socket.socket, answers: tuple[Encoded, Encoded]) -> None:
        super().__init__(loop, sock)
        self._answers = answers
        self._input = bytearray()
        self._requests: dict[int, bytes] = {}  # bodies so far, of those that are not whole
        self._streams: dict[int, Http2Stream] = {}
        self._initial_window = self._window = _DEFAULT_WINDOW
        self._unacknowledged = -len(_PREFACE)  # of the client's DATA; below 0 until the preface has come

    def opened(self) -> None:
        """Our settings come first, without waiting for the client's."""
        self.send(_frame(_SETTINGS, 0, 0, _setting(_SETTINGS_MAX_CONCURRENT_STREAMS, MAX_CONCURRENT_STREAMS)))

    def received(self, data: bytes) -> None:
        """Take whole frames out of what has come."""
        box = self._input
        box += data
        start = 0
        if self._unacknowledged < 0:
            if len(box) < len(_PREFACE):
                return
            if not box.startswith(_PREFACE):
                self.close()
                return
            start, self._unacknowledged = len(_PREFACE), 0
        while self.alive and len(box) - start >= 9:
            end = start + 9 + int.from_bytes(box[start : start + 3])
            if len(box) < end:
                break
            stream_id = int.from_bytes(box[start + 5 : start + 9]) & 0x7FFF_FFFF
            self._frame(box[start + 3], box[start + 4], stream_id, bytes(box[start + 9 : end]))
            start = end
        del box[:start]

    def write(self, stream: "Http2Stream", head: bytes, payload: bytes) -> bool:
        """Send one DATA frame if the windows allow it."""
        size = len(payload)
        if size > self._window or size > stream.window:
            return False
        self._window -= size
        stream.window -= size
        self.send(head + stream.id_bytes + payload)
        return True

    def ended(self, stream: "Http2Stream") -> None:
        """All of it has been written."""
        self._streams.pop(stream.id, None)

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == _DATA:
            self._on_data(flags, stream_id, payload)
        elif kind == _HEADERS:
            self._requests[stream_id] = b""
            if flags & _END_STREAM:
                self._begin(stream_id)
        elif kind == _WINDOW_UPDATE:
            self._on_window(stream_id, int.from_bytes(payload) & 0x7FFF_FFFF)
        elif kind == _SETTINGS and not flags & _ACK:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2]) == _SETTINGS_INITIAL_WINDOW_SIZE:
                    self._on_initial_window(int.from_bytes(payload[at + 2 : at + 6]))
            self.send(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.send(_frame(_PING, _ACK, 0, payload))
        elif kind == _RST_STREAM:
            self._requests.pop(stream_id, None)
            stream = self._streams.pop(stream_id, None)
            if stream is not None:
                stream.alive = False
        # CONTINUATION belongs to a header block that nobody decodes; PRIORITY and GOAWAY ask for nothing.

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._unacknowledged += len(payload)
        if self._unacknowledged >= _RENEW_AT:
            self.send(_frame(_WINDOW_UPDATE, 0, 0, self._unacknowledged.to_bytes(4)))
            self._unacknowledged = 0
        if stream_id in self._requests:
            self._requests[stream_id] += payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload
            if flags & _END_STREAM:
                self._begin(stream_id)

    def _on_window(self, stream_id: int, increment: int) -> None:
        if stream_id == 0:
            self._window += increment
            for stream in list(self._streams.values()):
                stream.flush()
        elif stream_id in self._streams:
            self._streams[stream_id].window += increment
            self._streams[stream_id].flush()

    def _on_initial_window(self, size: int) -> None:
        grown, self._initial_window = size - self._initial_window, size
        for stream in list(self._streams.values()):
            stream.window += grown
            stream.flush()

    def _begin(self, stream_id: int) -> None:
        loop, totals = self._loop, self._loop.totals
        body = self._requests.pop(stream_id)
        trial = _TRIAL in body
        encoded = self._answers[b'"include_usage"' in body]
        stream = Http2Stream(self, stream_id, encoded, self._initial_window, Totals() if trial else totals)
        self._streams[stream_id] = stream
        self.send(_frame(_HEADERS, _END_HEADERS, stream_id, _HEAD))
        if trial:
            while stream.step():
                pass
            return
        self.count()
        totals.streams += 1
        stream.step()
        totals.first.append(time.monotonic() - loop.now)
        loop.begin(stream)


class Http2Stream:
    """One answer."""

    __slots__ = ("_answer", "_connection", "_sent", "_totals", "_waiting", "alive", "due", "id", "id_bytes", "window")

    def __init__(self, connection: Http2, stream_id: int, encoded: Encoded, window: int, totals: Totals) -> None:
        self._connection = connection
        self._answer = encoded
        self._waiting: deque[tuple[bytes, bytes]] = deque()  # frames that no window had room for
        self._sent = 0
        self.id = stream_id
        self.id_bytes = stream_id.to_bytes(4)
        self.window = window
        self._totals = totals
        self.alive = True
        self.due = 0.0

    def step(self) -> bool:
        """The next chunk, or the ending."""
        if not (self.alive and self._connection.alive):
            return False
        chunks = self._answer.chunks
        if self._sent < len(chunks):
            self._write(chunks[self._sent])
            self._sent += 1
            self._totals.chunks += 1
            return True
        for frame in self._answer.ending:
            self._write(frame)
        self._sent += 1
        self.flush()
        return False

    def flush(self) -> None:
        """A window has grown."""
        waiting = self._waiting
        while waiting and self._connection.write(self, *waiting[0]):
            waiting.popleft()
        if not waiting and self._sent > len(self._answer.chunks) and self._connection.alive:
            self._totals.whole += 1
            self._connection.ended(self)

    def _write(self, frame: tuple[bytes, bytes]) -> None:
        if self._waiting or not self._connection.write(self, *frame):
            self._waiting.append(frame)


def _head(kind: int, flags: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags))


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return _head(kind, flags, payload) + stream_id.to_bytes(4) + payload


def _setting(name: int, value: int) -> bytes:
    return name.to_bytes(2) + value.to_bytes(4)
