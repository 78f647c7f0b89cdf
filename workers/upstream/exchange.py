"""One request and its answer, whatever carries it.

Theory of operation. Whoever asks (the receiver) holds the Exchange; the connection that carries it reports to it:

    response(status, fields)   once, the final head; 1xx ones are not told
    body(data)                 any number of times
    complete()                 the answer is whole        } one of the two, once, and then nothing more
    failed(failure)            there will be no answer     }

From the asker's side `cancel` ends it at once, and `release` lets an answer that says all it has to say run to its end,
so that its connection can be used again. After either, nothing is told any more.
"""

from typing import Final, NamedTuple, Protocol

from workers.upstream.message import HttpRequest


class Failure(NamedTuple):
    """Why there is no answer."""

    code: str
    """Of `forkd.reasons`."""
    detail: str
    """For the log: no part of a request or an answer."""
    unseen: bool = False
    """The upstream has certainly not begun to work on the request."""
    stale: bool = False
    """A connection that had been used before died before it answered: it was most likely dead already."""
    outrun: bool = False
    """The upstream was closing the connection in good order, and came to others on it but not to this request."""


class Receiver(Protocol):
    """Who asked."""

    def response(self, status: int, fields: dict[str, str]) -> None:
        """Names in lower case; of a repeated field the last."""

    def body(self, data: bytes) -> None: ...
    def complete(self) -> None: ...
    def failed(self, failure: Failure) -> None: ...
    def crashed(self, error: Exception) -> None: ...


class Carrier(Protocol):
    """What a connection is to the exchange that it carries."""

    def pause(self, exchange: "Exchange", /) -> None: ...
    def resume(self, exchange: "Exchange", /) -> None: ...
    def cancel(self, exchange: "Exchange", /) -> None: ...
    def release(self, exchange: "Exchange", /) -> None: ...
    def release_ended(self, exchange: "Exchange", /) -> None: ...
    def crashed(self, error: Exception) -> None: ...


class Exchange:
    """One request under way. `number`, `taken` and `paused` are HTTP/2's: see `http2`."""

    __slots__ = ("carrier", "fresh", "number", "paused", "receiver", "request", "status", "taken", "unsent")

    def __init__(self, request: HttpRequest, receiver: Receiver, *, fresh: bool) -> None:
        """`fresh`: not on a connection that was used before."""
        self.request: HttpRequest | None = request
        self.receiver: Receiver = receiver
        self.fresh = fresh
        self.carrier: Carrier | None = None
        self.status = 0
        self.number = 0
        self.taken = 0
        self.paused = False
        self.unsent: memoryview | None = None

    @property
    def over(self) -> bool:
        """Nobody listens any more."""
        return self.receiver is NOBODY

    def pause(self) -> None:
        """Tell as little more as possible: the receiver is slow."""
        self.paused = True
        if self.carrier is not None:
            self.carrier.pause(self)

    def resume(self) -> None:
        """The receiver has caught up."""
        self.paused = False
        if self.carrier is not None:
            self.carrier.resume(self)

    def cancel(self) -> None:
        """End it now, upstream too."""
        self.receiver = NOBODY
        if self.carrier is not None:
            self.carrier.cancel(self)

    def release(self) -> None:
        """Let the answer end by itself, for a moment."""
        self.receiver = NOBODY
        if self.carrier is not None:
            self.carrier.release(self)

    def fail(self, failure: Failure) -> None:
        """Tell the receiver, at most once."""
        receiver, self.receiver = self.receiver, NOBODY
        self.carrier = None
        try:
            receiver.failed(failure)
        except Exception as error:
            receiver.crashed(error)


class ReleaseEnd:
    """Timed: the end of the moment that a released exchange has to end by itself."""

    __slots__ = ("_carrier", "_exchange")

    def __init__(self, carrier: Carrier, exchange: Exchange) -> None:
        self._carrier = carrier
        self._exchange = exchange

    def tick(self) -> None:
        """The moment is over."""
        self._carrier.release_ended(self._exchange)

    def crashed(self, error: Exception) -> None:
        """Called by the loop."""
        self._carrier.crashed(error)


class _Nobody:
    """Listens to what nobody wants to hear."""

    def response(self, status: int, fields: dict[str, str]) -> None: ...
    def body(self, data: bytes) -> None: ...
    def complete(self) -> None: ...
    def failed(self, failure: Failure) -> None: ...
    def crashed(self, error: Exception) -> None: ...


NOBODY: Final = _Nobody()
