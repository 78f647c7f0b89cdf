"""TLS sessions are taken up again: who connects for the second time is spared the certificates."""

import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from forkd.settings import OpenAiBackend
from tests.fake_api.certificates import Certificates
from workers.loop import Loop
from workers.upstream.dns import Address
from workers.upstream.origin import Origin
from workers.upstream.transport import Transport


class Server:
    """Says "hello" to whoever connects, and remembers whether it knew them."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self.renew()
        self.known: list[bool | None] = []
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def renew(self) -> None:
        """Start again, as it were: with other keys for the tickets."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self._certificates.server("good"))

    def _run(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with sock:
                try:
                    with self._context.wrap_socket(sock, server_side=True) as tls:
                        self.known.append(tls.session_reused)
                        tls.sendall(b"hello")
                        tls.recv(1)
                except OSError:  # it went before the handshake
                    if self._closing:
                        return

    def close(self) -> None:
        self._closing = True
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join()
        self._listener.close()


class Owner:
    def __init__(self) -> None:
        self.data = b""

    def connected(self, protocol: str) -> None: ...

    def received(self, data: bytes) -> None:
        self.data += data

    def lost(self, code: str, detail: str) -> None:
        raise AssertionError(f"{code}: {detail}")

    def crashed(self, error: Exception) -> None:
        raise error


class Names:
    def __init__(self, port: int) -> None:
        self._addresses = [Address(socket.AF_INET, ("127.0.0.1", port))]

    def resolve(self, _host: str, _port: int, answer: Any) -> None:
        answer(self._addresses, "")

    def prefer(self, *_: Any) -> None: ...


class AtOnce:
    def run(self, act: Any, answer: Any) -> None:
        answer(act())


@pytest.fixture
def server(certificates: Certificates) -> Iterator[Server]:
    server = Server(certificates)
    yield server
    server.close()


def test_the_second_connection_takes_up_the_session_of_the_first(server: Server, certificates: Certificates) -> None:
    settings = OpenAiBackend(api_base="https://localhost/", ca_file=str(certificates.ca_file))
    names: Any = Names(server.port)
    offload: Any = AtOnce()
    origin = Origin(settings, names, offload)
    loop = Loop()

    def greeted() -> None:
        owner = Owner()
        transport = Transport(loop, owner)
        origin.reach(transport.open)  # type: ignore[arg-type]
        while owner.data != b"hello":
            loop.turn()
        transport.close()

    greeted()
    greeted()
    greeted()
    assert server.known == [False, True, True]
    failed = Transport(loop, Owner())
    origin.reach(failed.open)  # type: ignore[arg-type]
    while failed._tls is None:
        loop.turn()
    failed.close()  # whatever it was that ended it: the session may have been the reason
    greeted()
    assert server.known.pop() is False
    server.renew()  # it does not know the tickets any more: all is as the first time
    greeted()
    greeted()
    assert server.known == [False, True, True, False, True]
    loop.close()
