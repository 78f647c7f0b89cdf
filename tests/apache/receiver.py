"""The daemon's side of the wire, as small as it can be: receives handoffs, takes them apart, answers the client.

Written against the description of the wire and not with forkd's own code, so that the two check each other.
"""

import array
import contextlib
import fcntl
import json
import os
import queue
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nfrom the daemon"
WAIT_SECS = 30.0
_ROOM = 262144


class Handoff(NamedTuple):
    """One handoff. `client` is the test's if the receiver holds (`answer=False`), else answered and closed."""

    payload: bytes
    data: bytes
    flags: int | None
    envelope: dict[str, Any] | None
    seals: int | None
    client: socket.socket

    def response_headers(self, name: str) -> list[str]:
        """The values of that response header in the envelope."""
        assert self.envelope is not None
        return [value for key, value in self.envelope["response_headers"] if key.lower() == name.lower()]


def parse(payload: bytes, memfd: int | None, client: socket.socket) -> Handoff:
    """Take a payload apart; the caller's memfd stays the caller's."""
    flags = envelope = seals = None
    data = payload
    if payload[:1] == b"\1":
        flags = payload[1]
        line, data = payload[2:].split(b"\n", 1)
        envelope = json.loads(line.decode("utf-8", "strict"))
    if memfd is not None:
        assert flags is not None
        assert flags & 1, "a memfd came without its flag"
        assert data == b""
        seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
        with os.fdopen(os.dup(memfd), "rb") as file:
            data = file.read()  # from the start: the sender leaves the offset at 0
    return Handoff(payload, data, flags, envelope, seals, client)


class Receiver:
    """Listens at `path` from `with` on (or `start()`), which may be later than somebody first connects."""

    def __init__(
        self, path: Path, kind: int = socket.SOCK_SEQPACKET, *, answer: bool = True, backlog: int = 64
    ) -> None:
        self.path = path
        self.kind = kind
        self.answer = answer
        self.backlog = backlog
        self.handoffs: queue.Queue[Handoff | BaseException] = queue.Queue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.listen()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def listen(self) -> None:
        """Bind and listen without accepting anything yet."""
        self.listener = socket.socket(socket.AF_UNIX, self.kind)
        new = self.path.with_suffix(".new")
        self.listener.bind(str(new))
        new.chmod(0o666)
        self.listener.listen(self.backlog)
        new.rename(self.path)  # Apache, who may be trying just now, must not find one that it may not open

    def start(self) -> None:
        """Begin to accept."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and take the socket away as a daemon that ends does."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        if self._thread:
            self._thread.join(WAIT_SECS)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def get(self) -> Handoff:
        """The next handoff."""
        got = self.handoffs.get(timeout=WAIT_SECS)
        if isinstance(got, BaseException):
            raise got
        return got

    def nothing_came(self) -> bool:
        """Whether no handoff is waiting. Meaningful once the client has its answer: sending comes before that."""
        return self.handoffs.empty()

    def _run(self) -> None:
        while True:
            try:
                sender, _ = self.listener.accept()
            except OSError:
                return
            try:
                self._receive(sender)
            except BaseException as error:  # the test must see it, whatever it is
                self.handoffs.put(error)

    def _receive(self, sender: socket.socket) -> None:
        # Closed before the client is answered: who has an answer may send the next handoff, and a daemon that closes
        # without a look at what came meanwhile would lose it.
        with sender:
            handoff = self._read(sender)
        if handoff is not None:
            self._take(handoff)

    def _read(self, sender: socket.socket) -> Handoff | None:
        """Read a handoff; None at the sender's end."""
        payload = b""
        fds: list[int] = []
        while True:
            part, ancillary, flags, _ = sender.recvmsg(_ROOM, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)
            assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            for _, _, raw in ancillary:
                numbers = array.array("i")
                numbers.frombytes(raw)
                fds += numbers
            payload += part
            if not part or self.kind == socket.SOCK_SEQPACKET:
                break
        if not payload:
            return None  # a probe
        client = socket.socket(fileno=fds[0])
        client.setblocking(True)
        handoff = parse(payload, fds[1] if len(fds) > 1 else None, client)
        for fd in fds[1:]:
            os.close(fd)
        return handoff

    def _take(self, handoff: Handoff) -> None:
        """Answer it, if that is not the test's."""
        if self.answer:
            with handoff.client as client:
                client.sendall(ANSWER)
                client.shutdown(socket.SHUT_WR)
        self.handoffs.put(handoff)


class PatientReceiver(Receiver):
    """Keeps each sender's connection and reads handoffs from it until its end, as forkd does."""

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, **how)
        self.senders: list[socket.socket] = []
        """Every one that ever connected, in order."""
        self._readers: list[threading.Thread] = []

    def refuse(self) -> None:
        """End the senders' connections as a daemon does that loses nobody: no more by SHUT_RD, the rest read, closed.

        The listener goes on.
        """
        for sender in self.senders:
            with contextlib.suppress(OSError):
                sender.shutdown(socket.SHUT_RD)
        readers, self._readers = self._readers, []
        for reader in readers:
            reader.join(WAIT_SECS)

    def close(self) -> None:
        """Stop, losing nobody."""
        super().close()
        self.refuse()

    def _receive(self, sender: socket.socket) -> None:
        self.senders.append(sender)
        reader = threading.Thread(target=self._read_all, args=(sender,), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _read_all(self, sender: socket.socket) -> None:
        with sender:
            try:
                # The end is looked at twice: the kernel looks for a message first, and what is sent between that and
                # our SHUT_RD would be overlooked.
                while (handoff := self._read(sender) or self._read(sender)) is not None:
                    self._take(handoff)
            except BaseException as error:  # the test must see it, whatever it is
                self.handoffs.put(error)
