"""A site whose clients cannot be handed off (TLS, HTTP/2), and a client that reads its answers as they come."""

import contextlib
import http.client
import json
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlencode

import h2.events
import h2.exceptions
from harness import Apache, free_port

from tests.fake_api.certificates import Certificates
from tests.fake_api.h2_client import H2Client

PATIENCE_SECS = 20.0


class Broken(Exception):
    """The answer did not come to its end."""


class SecureSite:
    """A running Apache with a TLS port beside the plain one."""

    def __init__(self, apache: Apache, port: int, ca_file: Path, prefix: Path, docroot: Path) -> None:
        self.apache = apache
        self.port = port
        self.ca_file = ca_file
        self.prefix = prefix
        self.docroot = docroot
        self.url = f"https://localhost:{port}"

    @property
    def sock(self) -> Path:
        return self.prefix / "s"


@contextlib.contextmanager
def secure_site(mpm: str, docroot: Path, prefix: Path, extra_conf: str = "", **how: Any) -> Iterator[SecureSite]:
    """Start it. HTTP/2 is spoken where mod_http2 can: not under prefork. `extra_conf` is for both ports."""
    port = free_port()
    certificates = Certificates(prefix)
    protocols = "" if mpm == "prefork" else "Protocols h2 h2c http/1.1"
    conf = f"""{extra_conf}
{protocols}
SSLSessionCache none
Listen 127.0.0.1:{port}
<VirtualHost 127.0.0.1:{port}>
    DocumentRoot {docroot}
    SSLEngine on
    SSLCertificateFile {certificates.server()}
</VirtualHost>
"""
    modules = how.pop("modules", ()) + (() if mpm == "prefork" else ("http2",))
    with Apache(mpm, docroot, prefix, conf, modules=modules, **how) as apache:
        yield SecureSite(apache, port, certificates.ca_file, prefix, docroot)


class Answer(Protocol):
    """One answer, as it comes."""

    status: int

    def header(self, name: str) -> list[str]:
        """The values of a field."""

    def read(self) -> bytes:
        """The next bytes of the body, b"" at its end. Raises Broken if it was cut."""

    def close(self) -> None:
        """Go away: over HTTP/2 by resetting the stream if it is not over, else with the connection."""


def read_all(answer: Answer) -> bytes:
    """The body up to its end."""
    return b"".join(iter(answer.read, b""))


class Http1:
    """An answer by HTTP/1.1 under TLS."""

    def __init__(self, site: SecureSite, target: str, body: bytes | None = None, *, narrow: bool = False) -> None:
        """With `narrow` little of the answer fits between the two ends."""
        sock = socket.socket()
        sock.settimeout(PATIENCE_SECS)
        if narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", site.port))
        context = ssl.create_default_context(cafile=str(site.ca_file))
        self.connection = http.client.HTTPConnection("localhost", site.port)
        self.connection.sock = context.wrap_socket(sock, server_hostname="localhost")
        self.connection.request("GET" if body is None else "POST", target, body)
        self._response: http.client.HTTPResponse | None = None

    @property
    def response(self) -> http.client.HTTPResponse:
        if self._response is None:
            self._response = self.connection.getresponse()
        return self._response

    @property
    def status(self) -> int:
        return self.response.status

    def header(self, name: str) -> list[str]:
        return self.response.headers.get_all(name, [])

    def read(self) -> bytes:
        try:
            length = self.response.length
            piece = self.response.read1(65536)
        except (http.client.IncompleteRead, ssl.SSLError, ConnectionError) as error:
            raise Broken from error
        if not piece and length:
            raise Broken(f"{length} bytes are missing")
        return piece

    def close(self) -> None:
        self.connection.close()
        if self._response is not None:
            self._response.close()

    hang_up = close


class Http2:
    """An answer by HTTP/2 under TLS."""

    def __init__(self, site: SecureSite, target: str, body: bytes | None = None, *, narrow: bool = False) -> None:
        """`narrow` or not: the windows of HTTP/2 are small as they are."""
        self.client = H2Client(
            SimpleNamespace(unix_path=None, host="127.0.0.1", port=site.port, ca_file=str(site.ca_file))
        )
        self.number = self.client.h2.get_next_available_stream_id()
        fields = [(":method", "GET" if body is None else "POST"), (":scheme", "https"), (":authority", "localhost")]
        self.client.h2.send_headers(self.number, [*fields, (":path", target)], end_stream=body is None)
        if body is not None:
            self.client.h2.send_data(self.number, body, end_stream=True)
        self.client.flush()
        self._taken = 0

    @property
    def _headers(self) -> list[tuple[str, str]]:
        return self.client.until(h2.events.ResponseReceived, self.number).headers

    @property
    def status(self) -> int:
        return int(dict(self._headers)[":status"])

    def header(self, name: str) -> list[str]:
        return [value for key, value in self._headers if key == name.lower()]

    def read(self) -> bytes:
        client = self.client
        while True:
            piece = client.body(self.number)[self._taken :]
            if piece:
                self._taken += len(piece)
                return piece
            mine = [event for event in client.events if getattr(event, "stream_id", None) == self.number]
            if any(isinstance(event, h2.events.StreamReset) for event in mine) or client.ended:
                raise Broken
            if any(isinstance(event, h2.events.StreamEnded) for event in mine):
                return b""
            client.read()

    def close(self) -> None:
        try:
            self.client.h2.reset_stream(self.number)
            self.client.flush()
        except h2.exceptions.StreamClosedError:
            self.hang_up()

    def hang_up(self) -> None:
        """End the whole connection."""
        self.client.sock.close()


def curl(site: SecureSite, target: str, *options: str) -> list[str]:
    """The command line of a curl that prints the answer as it comes."""
    program = shutil.which("curl") or "curl"
    return [program, "-sS", "-N", "--cacert", str(site.ca_file), *options, site.url + target]


def query(where: str, **parameters: object) -> str:
    """A target."""
    return f"{where}?{urlencode(parameters, doseq=True)}"


def code(answer: Answer) -> tuple[int, str]:
    """Status and code of a refusal, which must be JSON in the promised shape."""
    assert answer.header("Content-Type") == ["application/json"]
    body = json.loads(read_all(answer))
    assert set(body) == {"error", "code"}
    return answer.status, body["code"]
