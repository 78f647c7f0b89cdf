"""A daemon that receives handoffs for a test and lets the test, or a script, play forkd's part."""

import json
import os
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import PATIENCE_SECS

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\nX-Request-Id: fake-1\r\n\r\n"


class Handoff:
    """One received message. Owns the client's socket and, if there is one, the data's fd."""

    def __init__(self, payload: bytes, fds: list[int]) -> None:
        self.payload = payload
        self.fds = len(fds)
        self.client = socket.socket(fileno=fds[0])
        self.client.settimeout(PATIENCE_SECS)
        self.data_fd = fds[1] if len(fds) > 1 else -1

    @property
    def flags(self) -> int:
        assert self.payload[0] == 1, "not an envelope"
        return self.payload[1]

    @property
    def envelope(self) -> dict[str, Any]:
        parsed = json.loads(self.payload[2:].partition(b"\n")[0])
        assert isinstance(parsed, dict)
        return parsed

    @property
    def data(self) -> dict[str, Any]:
        inline = self.payload.partition(b"\n")[2]
        raw = inline if self.data_fd < 0 else os.pread(self.data_fd, os.fstat(self.data_fd).st_size, 0)
        parsed = json.loads(raw)
        assert isinstance(parsed, dict)
        return parsed

    def say(self, data: bytes) -> None:
        """Write to the client, who may have gone."""
        with suppress(OSError):
            self.client.sendall(data)

    def end(self, *, reset: bool = False) -> None:
        """End the stream as forkd does, or with a reset."""
        with suppress(OSError):
            if reset:
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            else:
                self.client.shutdown(socket.SHUT_WR)
                while self.client.recv(65536):
                    pass
        self.close()

    def close(self) -> None:
        self.client.close()
        if self.data_fd >= 0:
            os.close(self.data_fd)
            self.data_fd = -1


class FakeDaemon:
    """Listens at `path`. Handoffs go to `take`, or each to a thread that runs `script` and then closes it."""

    def __init__(self, path: str | Path, script: Callable[[Handoff], None] | None = None) -> None:
        self.path = str(path)
        self.script = script
        self._received: queue.Queue[Handoff] = queue.Queue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._spawn(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RD)
        for thread in self._threads:
            thread.join(PATIENCE_SECS)
        self._listener.close()
        Path(self.path).unlink()
        while not self._received.empty():
            self._received.get().close()

    def take(self) -> Handoff:
        """The next handoff, which is the caller's to close."""
        return self._received.get(timeout=PATIENCE_SECS)

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sender, _ = self._listener.accept()
            except OSError:
                return
            with sender:
                payload, fds, _, _ = socket.recv_fds(sender, 262144, 4)
            if not fds:
                continue
            handoff = Handoff(payload, fds)
            if self.script is None:
                self._received.put(handoff)
            else:
                self._spawn(self._play, handoff)

    def _play(self, handoff: Handoff) -> None:
        assert self.script is not None
        try:
            self.script(handoff)
        finally:
            handoff.close()
