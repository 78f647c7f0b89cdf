"""What the API remembers of its clients. Written by its thread, read by the test's."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Connection:
    """One accepted connection. Times are of time.monotonic()."""

    id: int
    opened_at: float
    protocol: str = ""
    """ "http1" or "h2", once it is known (after the TLS handshake, or the first bytes)."""
    tls_version: str = ""
    server_name: str | None = None
    """What the client asked for by SNI."""
    closed_at: float | None = None
    closed_by_client: bool = False
    fault: str = ""
    """What the client did wrong, or that it broke off the TLS handshake; or "" if all was well."""
    requests: int = 0
    streams_open: int = 0
    streams_peak: int = 0
    refused: int = 0
    """Streams beyond `max_streams`."""
    pings: int = 0
    """PING frames from the client, without its acknowledgements."""
    ping_acks: int = 0
    window_updates: int = 0
    """WINDOW_UPDATE frames from the client."""
    goaway_code: int | None = None
    """The error code of the client's GOAWAY."""
    settings: dict[int, int] = field(default_factory=dict)
    """The client's HTTP/2 settings, by their codes."""


@dataclass(eq=False)
class Seen:
    """One request, and how its answer went. Times are of time.monotonic()."""

    number: int
    """From 0, over all connections, in the order in which they were complete."""
    connection: Connection
    method: str
    path: str
    fields: list[tuple[str, str]]
    """The header fields as they came; names in lower case."""
    body: bytes
    received_at: float
    stream_id: int = 0
    pattern: str = ""
    head_sent_at: float | None = None
    body_sent: int = 0
    """Bytes of the answer's body that the kernel took (HTTP/2: that the windows let through)."""
    stalled_since: float | None = None
    """The client takes no more since then. Never long, where nothing is wrong: ask for its age, or for `body_sent`."""
    ended_at: float | None = None
    """The pattern has done all it does, be it a whole answer or a broken one."""
    cancelled_at: float | None = None
    """The client reset the stream or closed the connection before that."""
    cancel_code: int | None = None
    """The code of its RST_STREAM."""

    @property
    def protocol(self) -> str:
        return self.connection.protocol

    @property
    def headers(self) -> dict[str, str]:
        """Of a repeated field the last."""
        return dict(self.fields)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def over(self) -> bool:
        return self.ended_at is not None or self.cancelled_at is not None
