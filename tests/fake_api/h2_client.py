"""A tiny blocking HTTP/2 client, to try the fake API with."""

import contextlib
import json
import socket
import ssl
from typing import Any, Final

import h2.config
import h2.connection
import h2.events

_PATIENCE_SECS: Final = 20.0
_HEADER_BYTES: Final = 9


class H2Client:
    """One connection. `events` are all that ever came, in order."""

    def __init__(self, api: Any, *, renew_windows: bool = True) -> None:
        """With `renew_windows=False` what was read is never acknowledged."""
        if api.unix_path:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_PATIENCE_SECS)
            sock.connect(api.unix_path)
        else:
            sock = socket.create_connection((api.host, api.port), _PATIENCE_SECS)
        if api.ca_file:
            context = ssl.create_default_context(cafile=api.ca_file)
            context.set_alpn_protocols(["h2"])
            sock = context.wrap_socket(sock, server_hostname="localhost")
        self.sock = sock
        self.events: list[h2.events.Event] = []
        self.ended = False
        """The server closed the connection."""
        self._buffer = b""
        self._renew = renew_windows
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()

    def __enter__(self) -> "H2Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, pattern: str = "", path: str = "/v1/chat/completions", **body: Any) -> int:
        """Send a request; returns its stream."""
        stream_id = self.h2.get_next_available_stream_id()
        fields = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", path)]
        fields += [("x-test-pattern", pattern)] if pattern else []
        self.h2.send_headers(stream_id, fields)
        self.h2.send_data(stream_id, json.dumps(body).encode(), end_stream=True)
        self.flush()
        return stream_id

    def flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())

    def read(self) -> None:
        """Take in what came, or wait for something. Raises ProtocolError."""
        data = self.sock.recv(65536)
        self.ended = not data
        self._buffer += data
        while frame := self._frame():
            for event in self.h2.receive_data(frame):
                self._take(event)
        if not self.ended:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # closed meanwhile: the next read tells
                self.flush()

    def _frame(self) -> bytes:
        """The next whole frame that came."""
        end = _HEADER_BYTES + int.from_bytes(self._buffer[:3])
        if len(self._buffer) < max(end, _HEADER_BYTES):
            return b""
        frame, self._buffer = self._buffer[:end], self._buffer[end:]
        return frame

    def _take(self, event: h2.events.Event) -> None:
        self.events.append(event)
        match event:
            case h2.events.DataReceived(stream_id=number, flow_controlled_length=length):
                if self._renew and number in self.h2.streams:
                    self.h2.acknowledge_received_data(length, number)
            case h2.events.ConnectionTerminated():
                # The streams that the server let live go on (RFC 9113, 6.8), but h2 hears nothing after a GOAWAY.
                self.h2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN

    def until(self, kind: type[h2.events.Event], stream_id: int | None = None) -> Any:
        """Read until there is an event of this kind (of this stream), and return it."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                    return event
            assert not self.ended, f"no {kind.__name__} before the end: {self.events}"
            self.read()

    def body(self, stream_id: int) -> bytes:
        """A stream's body so far."""
        return b"".join(
            event.data
            for event in self.events
            if isinstance(event, h2.events.DataReceived) and event.stream_id == stream_id
        )

    def answer(self, stream_id: int) -> bytes:
        """A stream's body, to its end."""
        self.until(h2.events.StreamEnded, stream_id)
        return self.body(stream_id)
