"""The line of JSON that the Apache module writes before the data, typed."""

import msgspec


class RequestLine(msgspec.Struct, kw_only=True):
    """The client's request as Apache saw it."""

    method: str = "GET"
    uri: str = ""
    host: str = ""
    remote_addr: str = ""
    request_id: str | None = None
    protocol: str = ""
    headers: dict[str, str] = {}


class Envelope(msgspec.Struct, kw_only=True):
    """The line of JSON that the module writes before the data."""

    request: RequestLine = msgspec.field(default_factory=RequestLine)
    response_headers: list[tuple[str, str]] = []
