"""What the tests of the upstream's protocols share: a transport without a socket, and a receiver that writes down."""

from workers.upstream.exchange import Failure
from workers.upstream.message import HttpRequest

REQUEST = HttpRequest("/chat", (("content-type", "application/json"), ("x-request-id", "r1")), b'{"a":1}')


class FakeTransport:
    """Keeps what is written. `fd` is -1 when it was closed."""

    def __init__(self) -> None:
        self.fd = 99
        self.owner: object = None
        self.written = bytearray()
        self.paused = False
        self.unsent_bytes = 0

    def write(self, data: bytes) -> None:
        assert self.fd >= 0
        self.written += data

    def take(self) -> bytes:
        data = bytes(self.written)
        self.written.clear()
        return data

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.fd = -1


class Listener:
    """Writes down what it is told, in the form that the tests compare."""

    def __init__(self) -> None:
        self.status = 0
        self.fields: dict[str, str] = {}
        self.data = b""
        self.ended = False
        self.failure: Failure | None = None
        self.error: Exception | None = None

    def response(self, status: int, fields: dict[str, str]) -> None:
        assert not self.status
        self.status, self.fields = status, fields

    def body(self, data: bytes) -> None:
        assert self.status
        assert not self.over
        self.data += data

    def complete(self) -> None:
        assert not self.over
        self.ended = True

    def failed(self, failure: Failure) -> None:
        assert not self.over
        self.failure = failure

    def crashed(self, error: Exception) -> None:
        self.error = error
        raise error

    @property
    def over(self) -> bool:
        return self.ended or self.failure is not None


class FakePool:
    """Stands for the pool, and notes what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.failure: Failure | None = None

    def ready(self, _connection: object) -> None:
        self.said.append("ready")

    def roomier(self, _connection: object) -> None:
        self.said.append("roomier")

    def gone(self, _connection: object, failure: Failure) -> None:
        self.said.append("gone")
        self.failure = failure

    def idle(self, _connection: object) -> None:
        self.said.append("idle")

    def closed(self, _connection: object) -> None:
        self.said.append("closed")
