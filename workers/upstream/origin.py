"""Where a backend's API is, and what it takes to get there.

The route is made when it is first wanted: the name is looked up beside the loop, and so are the system's certificates
loaded, which takes tens of milliseconds and a megabyte that a worker without such a backend has no use for. Where it is
certain that there will be streams, `prepare` loads them before the first.
"""

import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TypeAlias
from urllib.parse import urlsplit

from forkd.settings import HttpBackend as Settings
from workers.offload import Offload
from workers.upstream.dns import Address, Resolver
from workers.upstream.exchange import Failure
from workers.upstream.transport import Route, Sessions

Answer: TypeAlias = Callable[[Route | Failure], None]


class Origin:
    """One API's place."""

    def __init__(self, settings: Settings, resolver: Resolver, offload: Offload) -> None:
        url = urlsplit(settings.api_base)
        self.scheme = url.scheme
        self.authority = url.netloc.lower()
        self.base_path = url.path.rstrip("/")
        self._host = url.hostname or ""
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._settings = settings
        self._resolver = resolver
        self._offload = offload
        self._tls: ssl.SSLContext | None = None
        self._sessions = Sessions()
        self._loading = False
        self._waiting: list[Answer] = []
        """Those who wait for the certificates."""

    @property
    def protocol(self) -> str:
        """What is spoken there: "http/1.1", "h2", or "" when TLS will tell."""
        http2 = self._settings.http2.enabled
        if not http2:
            return "http/1.1"
        if self.scheme == "https":
            return ""
        return "h2" if http2 == "force" else "http/1.1"

    def reach(self, answer: Answer) -> None:
        """Call `answer` with the route, at once or later."""
        if self.scheme == "https" and self._tls is None:
            self._waiting.append(answer)
            self.prepare()
            return
        if self._settings.api_socket is not None:
            answer(self._route([Address(socket.AF_UNIX, self._settings.api_socket)]))
            return

        def resolved(addresses: Sequence[Address], fault: str) -> None:
            detail = f"{self._host}: {fault}"
            answer(self._route(addresses) if addresses else Failure("backend_unresolved", detail, unseen=True))

        self._resolver.resolve(self._host, self._port, resolved)

    def prepare(self) -> None:
        """Load what it takes for TLS, so that the first who asks need not wait for it."""
        if self.scheme == "https" and self._tls is None and not self._loading:
            self._loading = True
            self._offload.run(self._context, self._trusting)

    def reached(self, address: Address) -> None:
        """A connection to `address` succeeded."""
        if address.family != socket.AF_UNIX:
            self._resolver.prefer(self._host, self._port, address)

    def _route(self, addresses: Sequence[Address]) -> Route:
        return Route(addresses, self._tls, self._host, self._settings.connect_timeout_secs, self._sessions)

    def _context(self) -> ssl.SSLContext:
        """Blocks: reads files."""
        settings = self._settings
        context = ssl.create_default_context(cafile=settings.ca_file)
        if settings.insecure_ssl:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION  # amid which nothing could be written
        context.set_alpn_protocols(["h2", "http/1.1"] if settings.http2.enabled else ["http/1.1"])
        return context

    def _trusting(self, context: ssl.SSLContext | Exception) -> None:
        self._loading = False
        waiting, self._waiting = self._waiting, []
        if not isinstance(context, Exception):
            self._tls = context
        for answer in waiting:
            if isinstance(context, Exception):
                answer(Failure("backend_untrusted", f"the trusted certificates: {context}", unseen=True))
            else:
                self.reach(answer)
