"""Server-Sent Events as bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Theory of operation of the parser. An event is a block of lines that ends with an empty line. Blocks know nothing of
each other, so each is cut out of the bytes first, and taken apart by itself. What is behind the last whole block is
kept, and searched for its end no byte twice, so that an event of any size that comes byte by byte costs no more than
its size.

A line ends with LF, CRLF or CR, and after a CR nobody knows whether an LF is still to come. It is not waited for: the
CR ends the event, and an LF that comes later is an empty line in front of the next block, which means nothing.

Nearly always a piece of the body is one whole event: a line of data, perhaps with a name before it. That case is told
apart first, by what costs the least to look at.
"""

import re
from typing import Final

import msgspec

_encode = msgspec.json.Encoder().encode

DONE: Final = b"data: [DONE]\n\nevent: done\ndata: {}\n\n"
"""Both endings that the reference's pages wait for: `fetch` readers look for the first, EventSource for the second."""
HEARTBEAT: Final = b": keep-alive\n\n"
MAX_EVENT_BYTES: Final = 8 << 20

_BOM: Final = b"\xef\xbb\xbf"
_LINE_END: Final = re.compile(r"\r\n|\r|\n")
_BLOCK_END: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n?|\n)")
_LONGEST_END: Final = 4
_LF: Final = 10
_CR: Final = 13
"""As numbers: `in` finds one four times as fast as a byte string."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event that was received."""

    name: str
    """The `event` field; "" is an unnamed one (a "message")."""
    data: bytes
    """The `data` lines, joined by LF."""
    raw: bytes
    """The event as it came, with the empty line that ends it."""


class EventTooLarge(Exception):
    """An event has more than `max_event_bytes`. The parser that says so is of no more use."""


class Parser:
    """The events of one body. Holds nothing while no event is cut in two."""

    __slots__ = ("_max_event_bytes", "_rest")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest: bytearray | bytes | None = b""
        """The beginning of the next event, None if there is nothing of it; `bytes` as long as a byte order mark may
        come.
        """

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete. Raises EventTooLarge, in which case those before it are lost.

        An event that the body's end cuts off is none, says the standard: there is nothing to call at the end.
        """
        if self._rest is not None:
            return self._join(data)
        line, _, end = data.partition(b"\n")
        name = ""
        if line[:7] == b"event: " and _CR not in line:
            name = line[7:].decode(errors="replace")
            line, _, end = end.partition(b"\n")
        if end == b"\n" and line[:6] == b"data: " and _CR not in line and len(data) <= self._max_event_bytes:
            return [Event(name, line[6:], data)]
        return self._cut(data)

    def _join(self, data: bytes) -> list[Event]:
        """`data` behind what was kept."""
        rest = self._rest
        assert rest is not None
        if isinstance(rest, bytes):
            data = rest + data
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._rest = data
                return []
            self._rest = None
            return self.feed(data.removeprefix(_BOM))
        searched = max(len(rest) - _LONGEST_END + 1, 0)
        rest += data
        if data.endswith(b"\n\n") or _BLOCK_END.search(rest, searched) is not None:
            self._rest = None
            return self._cut(bytes(rest))
        if len(rest) > self._max_event_bytes:
            raise EventTooLarge
        return []

    def _cut(self, data: bytes) -> list[Event]:
        """Cut into blocks, from the beginning of one; keep what is left."""
        events = []
        start = 0
        for block_end, end in _ends(data):
            if end - start > self._max_event_bytes:
                raise EventTooLarge
            event = _taken_apart(data[start:block_end], data[start:end])
            if event is not None:
                events.append(event)
            start = end
        if start < len(data):
            if len(data) - start > self._max_event_bytes:
                raise EventTooLarge
            self._rest = bytearray(data[start:])
        return events


def _ends(data: bytes) -> list[tuple[int, int]]:
    """Where each block ends: before and behind the end of its last line and the empty line."""
    if _CR not in data:
        empty_line = b"\n\n"
    elif data.count(b"\r\n") == data.count(b"\r") == data.count(b"\n"):
        empty_line = b"\r\n\r\n"
    else:
        return [match.span() for match in _BLOCK_END.finditer(data)]
    ends = []
    find, width = data.find, len(empty_line)
    at = find(empty_line)
    while at >= 0:
        ends.append((at, at + width))
        at = find(empty_line, at + width)
    return ends


def _taken_apart(block: bytes, raw: bytes) -> Event | None:
    """The event that the lines of a block make; None without data. `raw`: the block with its empty line."""
    if block[:6] == b"data: " and _LF not in block and _CR not in block:
        return Event("", block[6:], raw)
    name = b""
    data: list[bytes] = []
    for line in block.splitlines():
        field, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    if not data:
        return None
    return Event(name.decode(errors="replace"), data[0] if len(data) == 1 else b"\n".join(data), raw)


def content_event(text: str) -> bytes:
    r"""`data: {"content":"…"}` and a blank line. JSON escapes line ends, so any text is one line."""
    return b'data: {"content":' + _encode(text) + b"}\n\n"


def text_event(text: str) -> bytes:
    """The text itself as data, each of its lines a line of data: a receiver joins them by LF."""
    if "\n" in text or "\r" in text:
        text = "\ndata: ".join(_LINE_END.split(text))
    return b"data: " + text.encode() + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """An event with a name, its data a single line of JSON."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def error_body(code: str, message: str, request_id: str) -> bytes:
    """The JSON that tells a client what went wrong, as the body of an error status or the data of an error event."""
    return _encode({"error": message, "code": code, "request_id": request_id})


def error_event(body: bytes) -> bytes:
    """`event: error` with the JSON of `error_body`."""
    return named_event("error", body)
