"""What the requests to all APIs have in common: their header, the checks on what goes into it, and their body."""

import math
import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import msgspec

from forkd import __version__
from workers.backends.base import BadRequest
from workers.request import HandoffData, Request

Headers: TypeAlias = tuple[tuple[str, str], ...]

STATIC: Final[Headers] = (
    ("content-type", "application/json"),
    ("accept", "text/event-stream"),
    ("user-agent", f"forkd/{__version__}"),
)
_TEST_PATTERN: Final = re.compile(r"[\x20-\x7e]{1,256}")
_encode = msgspec.json.Encoder().encode
_keys_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def headers(fixed: Headers, data: HandoffData, request_id: str) -> Headers:
    """`fixed` and what belongs to one request. `request_id` is one of `choose_id`, and so needs no check."""
    fields = (*fixed, ("x-request-id", request_id))
    pattern = data.test_pattern
    if pattern is None:
        return fields
    if not _TEST_PATTERN.fullmatch(pattern):
        raise BadRequest("bad_handoff", "test_pattern: expected up to 256 printable ASCII characters")
    return (*fields, ("x-test-pattern", pattern))


def sampling(data: HandoffData) -> dict[str, Any]:
    """max_tokens and temperature, if the data has them."""
    body: dict[str, Any] = {}
    if data.max_tokens is not None:
        if data.max_tokens < 1:
            raise BadRequest("bad_handoff", "max_tokens: expected 1 or more")
        body["max_tokens"] = data.max_tokens
    if data.temperature is not None:
        if not math.isfinite(data.temperature):
            raise BadRequest("bad_handoff", "temperature: expected a number")
        body["temperature"] = data.temperature
    return body


def passed_through(names: tuple[str, ...], handoff: Request) -> Mapping[str, msgspec.Raw]:
    """The operator's choice of further keys, as they were written; null is handed on, too."""
    if not names:
        return {}
    try:
        written = _keys_of(handoff.raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise BadRequest("bad_handoff", "the data is no JSON object") from None
    return {name: written[name] for name in names if name in written}


def encoded(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. Its values come from a decoder, so all that can be wrong with them is their depth."""
    try:
        return _encode(body)
    except (RecursionError, msgspec.MsgspecError, UnicodeError):
        raise BadRequest("bad_handoff", "the data is nested too deeply") from None
