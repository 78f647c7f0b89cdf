"""The transport under TLS: that all arrives, and that the end is told, when nothing more comes to say so."""

import os
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from tests.fake_api.certificates import Certificates
from tests.workers.upstream.owner import Owner
from workers.loop import Loop
from workers.upstream.dns import Address
from workers.upstream.transport import READ_BYTES, Route, Transport

SENT = os.urandom(20 * READ_BYTES)


class Server:
    """Sends SENT at once, and when it is told to, closes its socket without a word of TLS."""

    def __init__(self, certificates: Certificates) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates.server("good"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(socket.AF_INET, self._listener.getsockname())
        self.may_close = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with self._context.wrap_socket(peer, server_side=True) as tls:
            tls.sendall(SENT)
            self.may_close.wait()

    def close(self) -> None:
        self.may_close.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def server(certificates: Certificates) -> Iterator[Server]:
    server = Server(certificates)
    yield server
    server.close()


@pytest.mark.parametrize("close_at_once", [False, True])
def test_all_of_many_records_arrives_and_then_the_end(
    server: Server, certificates: Certificates, close_at_once: bool
) -> None:
    loop, owner = Loop(), Owner()
    if close_at_once:
        server.may_close.set()
    transport = Transport(loop, owner)
    context = ssl.create_default_context(cafile=certificates.ca_file)
    transport.open(Route([server.address], context, "localhost", 10))
    while len(owner.data) < len(SENT):
        loop.turn()
        assert close_at_once or owner.end is None
    assert owner.data == SENT
    server.may_close.set()
    while owner.end is None:
        loop.turn()
    assert owner.end == ("", "it closed the connection")
    assert not loop.selector.registered
    loop.close()
