"""The relay and upstreams that would be asked without end, or would have it wait without end."""

import contextlib
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.harness import PATIENCE_SECS, read_answer, reset, running, wait_for
from tests.system.relaying import relaying

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@contextlib.contextmanager
def upstream(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[int]]]:
    """A server that does `serve` with each connection. Its address, and the connections that it has had (to count)."""
    seen: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    seen.append(connection.fileno())
                    with connection, contextlib.suppress(OSError):
                        serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", seen
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def breaks_when_asked(gathered: threading.Event) -> Callable[[socket.socket], None]:
    """HTTP/2 as far as SETTINGS, once many wait for them; a request is answered by a RST of TCP."""

    def serve(connection: socket.socket) -> None:
        got = connection.recv(65536)
        assert gathered.wait(PATIENCE_SECS)
        connection.sendall(SETTINGS)
        while b"\x00\x01\x04" not in got and b"prompt" not in got and b"messages" not in got:
            if not (data := connection.recv(65536)):
                return
            got += data
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return serve


def test_an_upstream_that_breaks_every_connection_is_asked_so_many_times(tmp_path: Path) -> None:
    gathered = threading.Event()
    with upstream(breaks_when_asked(gathered)) as (base, seen):
        backend = {"provider": "openai", "api_base": base, "retries": 1, "http2": {"enabled": "force"}}
        config = {"workers": {"count": 1}, "default_backend": "openai", "backends": {"openai": backend}}
        with running(tmp_path, config=config) as forkd:
            clients = [forkd.hand_over(json.dumps({"prompt": "Hello"}).encode()) for _ in range(60)]
            gathered.set()
            for client in clients:
                assert read_answer(client).json["code"] == "backend_reset"
            forkd.wait_for_metric("daemon_backend_errors_total", len(clients), backend="openai")
            assert forkd.metric("forkd_backend_retries_total", code="backend_reset") <= 2 * len(clients)
        assert len(seen) <= 2 * len(clients)


def test_a_worker_that_goes_leaves_no_attachments_behind(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    with relaying(tmp_path, server={"data_dir": str(directory)}) as relay:
        for attempt in range(1, 4):
            names = {f"a{number}": f"{attempt}-{number}" for number in range(20)}
            for name in names.values():
                (directory / name).write_text("private")
            client = relay.begin("gate-headers", prompt="{a0}", attachments=names)
            relay.api.wait_for(lambda api, asked=attempt: len(api.requests) == asked, "the request")
            (worker,) = relay.forkd.workers()
            os.kill(worker, signal.SIGTERM)
            wait_for(lambda old=worker: set(relay.forkd.workers()) - {old}, "the next worker")
            reset(client)  # the last one of the old worker
            wait_for(lambda old=worker: old not in relay.forkd.workers(), "the worker's end")
            assert not list(directory.iterdir())
