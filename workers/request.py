"""What a handoff asks for: the envelope's request and the application's data, typed and checked.

Whatever is wrong with the data is an answer, never an exception that travels: `parse` returns a Request whose `fault`
names it, with everything else at its default, because backends that cost nothing answer such a handoff all the same
and because even an error answer wants the application's response headers.
"""

import re
from typing import Any, Final

import msgspec

from forkd.handoff import CLIENT_RELAYED, NO_DATA, SOH, BadEnvelope, split_envelope
from forkd.handoff_data import HandoffData as HandoffData  # noqa: PLC0414 (for the backends, which know requests)
from workers import response
from workers.envelope import Envelope, RequestLine

_REQUEST_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)


class Request(msgspec.Struct):
    """One parsed handoff. `fault` is None or says what was wrong with it; `data` is the verbatim data."""

    data: HandoffData
    line: RequestLine
    raw: bytes
    fields: bytes
    """The application's response fields, checked, as field lines."""
    fault: str | None
    refused_fields: list[str]
    bad_envelope: bool = False
    relayed: bool = False
    """The client's end is Apache, which passes the answer on."""


_NO_DATA: Final = HandoffData()
_NO_LINE: Final = RequestLine()
_decode_data = msgspec.json.Decoder(HandoffData, strict=False).decode
_decode_envelope = msgspec.json.Decoder(Envelope).decode
_BROKEN: Final = (msgspec.MsgspecError, RecursionError, UnicodeError, ValueError)


def parse(payload: bytes, *, envelopes: bool) -> Request:
    """Parse a payload whose data is inline. `envelopes` says whether this listener takes envelopes."""
    if envelopes and payload[:1] == bytes((SOH,)):
        try:
            flags, line, raw = split_envelope(payload)
            envelope = _decode_envelope(line)
        except _BROKEN as error:
            kind = "" if isinstance(error, BadEnvelope) else "envelope: "
            return Request(_NO_DATA, _NO_LINE, b"", b"", f"{kind}{_said(error)}", [], True)
    else:
        envelope, raw, flags = None, payload, 0
    fault = None
    data = _NO_DATA
    if raw in (b"", NO_DATA):
        fault = "no data"
    else:
        try:
            data = _decode_data(raw)
        except _BROKEN as error:
            fault = _said(error)
    if envelope is None and data.response_headers is None:
        return Request(data, _NO_LINE, raw, b"", fault, [])
    pairs: list[Any] = list(envelope.response_headers) if envelope is not None else []
    pairs += _pairs(data.response_headers)
    lines, refused = response.fields(pairs)
    relayed = bool(flags & CLIENT_RELAYED)
    return Request(data, _NO_LINE if envelope is None else envelope.request, raw, lines, fault, refused, False, relayed)


def _pairs(headers: dict[str, Any] | list[Any] | None) -> list[Any]:
    """(name, value) pairs from a map whose values may be lists, or from a list of pairs."""
    if not headers:
        return []
    if isinstance(headers, list):
        return [pair if isinstance(pair, list) else [] for pair in headers]
    pairs: list[Any] = []
    for name, value in headers.items():
        pairs += [(name, one) for one in value] if isinstance(value, list) else [(name, value)]
    return pairs


def _said(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def choose_id(request: Request, slot: int, received_at: float) -> str:
    """The id that log, client and upstream share: the application's if it is harmless, else Apache's, else one of ours.

    Ours is made of when and where the handoff came in (`received_at` in monotonic seconds), so every worker that ever
    sees this handoff makes the same one.
    """
    for wanted in (request.data.request_id, request.line.request_id):
        if wanted is not None and _REQUEST_ID.fullmatch(text := str(wanted)):
            return text
    return f"{int(received_at * 1e6):x}-{slot:x}"
