"""Server-Sent Events as bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from typing import Final, NamedTuple

import msgspec

_encode = msgspec.json.Encoder().encode

DONE: Final = b"data: [DONE]\n\nevent: done\ndata: {}\n\n"
"""Both endings that the reference's pages wait for: `fetch` readers look for the first, EventSource for the second."""
HEARTBEAT: Final = b": keep-alive\n\n"


class Event(NamedTuple):
    """One event that was received."""

    name: str
    """The `event` field; "" is an unnamed one (a "message")."""
    data: bytes
    """The `data` lines, joined by LF."""
    raw: bytes
    """The event as it came, with the empty line that ends it."""


def content_event(text: str) -> bytes:
    r"""`data: {"content":"…"}` and a blank line. JSON escapes line ends, so any text is one line."""
    return b'data: {"content":' + _encode(text) + b"}\n\n"


def error_body(code: str, message: str, request_id: str) -> bytes:
    """The JSON that tells a client what went wrong, as the body of an error status or the data of an error event."""
    return _encode({"error": message, "code": code, "request_id": request_id})


def error_event(body: bytes) -> bytes:
    """`event: error` with the JSON of `error_body`."""
    return b"event: error\ndata: %b\n\n" % body
