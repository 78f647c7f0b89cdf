"""What the tests of the HTTP backends share: handoffs and attachments without files or sockets."""

import base64
import json
from typing import Any

from workers.attachments import Attachment
from workers.backends.base import HttpBackend
from workers.request import Request, parse

NOTES = "two\nlines {and} ü"
_PIXELS = bytes(range(256)) * 2000  # more than is encoded in one go
_PAPER = b"%PDF-1.7 paper"
IMAGE_BASE64 = base64.b64encode(_PIXELS).decode()
PDF_BASE64 = base64.b64encode(_PAPER).decode()
IMAGE = f"data:image/png;base64,{IMAGE_BASE64}"
PDF = f"data:application/pdf;base64,{PDF_BASE64}"

FILES = {
    "notes": ("text/plain", NOTES.encode()),
    "a.b": ("text/csv", NOTES.encode()),
    "a": ("text/plain", b"{b}"),
    "b": ("application/json", b"{a}"),
    "pic": ("image/png", _PIXELS),
    "paper": ("application/pdf", _PAPER),
}


def handoff_of(data: dict[str, Any] | bytes) -> Request:
    return parse(data if isinstance(data, bytes) else json.dumps(data).encode(), envelopes=True)


def attached(*files: tuple[str, str, bytes]) -> dict[str, Attachment]:
    return {name: Attachment(name, media_type, data) for name, media_type, data in files}


def asked_of(backend: HttpBackend, data: dict[str, Any], *names: str) -> Any:
    """The body of the request for `data` with these of FILES."""
    handoff = handoff_of(data)
    assert handoff.fault is None
    return json.loads(backend.request(handoff, "r", attached(*((name, *FILES[name]) for name in names))).body)
