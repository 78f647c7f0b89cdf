"""The head of the answer: status line and fields (RFC 9112), with the application's own fields let through safely."""

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Final

OURS: Final = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
    | {"content-length", "content-encoding", "content-type", "content-range", "accept-ranges", "etag", "last-modified"}
    | {"cache-control", "pragma", "expires", "x-accel-buffering", "x-request-id", "date", "server", "x-powered-by"}
    | {"x-socket-handoff", "x-handoff-data", "x-handoff-data-source"}
)
"""Fields that an application's response may not carry over: framing (RFC 9110, 7.6.1), what describes a body that is
not sent, and what forkd says itself."""
MAX_FIELDS_BYTES: Final = 32768

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")  # RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_STREAM_FIELDS: Final = (
    b"\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nConnection: close"
    b"\r\nX-Accel-Buffering: no\r\nX-Request-Id: "
)
_STATUS_LINES: Final = {int(status): f"HTTP/1.1 {status:d} {status.phrase}".encode("ascii") for status in HTTPStatus}
_ERROR_FIELDS: Final = b"\r\nCache-Control: no-store\r\nConnection: close\r\nX-Request-Id: "


def fields(pairs: Iterable[Sequence[object]]) -> tuple[bytes, list[str]]:
    """Field lines (each ended by CRLF) for the (name, value) pairs that may pass, and the names of those that may not.

    A name must be a token and a value free of control characters, or else a value that came from a user could end the
    head and begin a body of its own.
    """
    lines: list[bytes] = []
    refused: list[str] = []
    size = 0
    for pair in pairs:
        name, value = (pair[0], pair[1]) if len(pair) == 2 and isinstance(pair[0], str) else ("", None)
        text = str(value) if isinstance(value, (str, int, float)) else None
        if text is None or not _TOKEN.fullmatch(name) or _CONTROL.search(text):
            refused.append(name[:64])
            continue
        if name.lower() in OURS:
            continue
        line = f"{name}: {text}\r\n".encode("utf-8", "replace")
        size += len(line)
        if size > MAX_FIELDS_BYTES:
            refused.append(name[:64])
            break
        lines.append(line)
    return b"".join(lines), refused


def stream_head(request_id: str, extra: bytes, status: int = 200) -> bytes:
    """The head of an event stream; `extra` are field lines from `fields`."""
    return b"%b%b%b\r\n%b\r\n" % (_STATUS_LINES[status], _STREAM_FIELDS, request_id.encode("ascii"), extra)


def error_response(status: int, request_id: str, extra: bytes, body: bytes, retry_after_secs: int = 0) -> bytes:
    """A whole error answer with a JSON body."""
    head = "\r\nContent-Type: application/json"
    if retry_after_secs:
        head += f"\r\nRetry-After: {retry_after_secs}"
    head += f"\r\nContent-Length: {len(body)}"
    front = _STATUS_LINES[status] + head.encode("ascii")
    return b"%b%b%b\r\n%b\r\n%b" % (front, _ERROR_FIELDS, request_id.encode("ascii"), extra, body)
