"""TLS 1.2 may be renegotiated in the middle: OpenSSL's own server does so when it is told "R"."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.settings import OpenAiBackend
from tests.workers.upstream.owner import Owner
from workers.loop import Loop
from workers.upstream.dns import Address
from workers.upstream.origin import Origin
from workers.upstream.transport import Route, Transport


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, Any]]:
    subject = ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", *subject], cwd=tmp_path, check=True, stderr=-3)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    command = ["openssl", "s_server", "-tls1_2", "-accept", str(port), "-key", "key.pem", "-cert", "cert.pem"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=-1, stdout=-1, stderr=-2, bufsize=0) as process:
        assert process.stdout is not None
        while b"ACCEPT" not in process.stdout.readline():
            pass
        yield port, process
        process.kill()


def test_an_upstream_that_wants_to_renegotiate_can_still_be_written_to(server: tuple[int, Any]) -> None:
    port, process = server
    settings = OpenAiBackend(api_base=f"https://127.0.0.1:{port}/", insecure_ssl=True)
    loop: Any = Loop()
    nobody: Any = None
    origin = Origin(settings, nobody, nobody)
    owner = Owner()
    transport = Transport(loop, owner)
    transport.open(Route([Address(socket.AF_INET, ("127.0.0.1", port))], origin._context(), "127.0.0.1", 10))
    while owner.protocol is None:
        loop.turn()
    process.stdin.write(b"hello\n")
    while b"hello" not in owner.data:
        loop.turn()
    process.stdin.write(b"R\n")
    for _ in range(3):  # in one of these turns it asks, and would be answered over the next ones
        loop.turn()
        transport.write(b"still here\n")
    transport.close()
    loop.close()
