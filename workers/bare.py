"""A stream whose client has its response head already: what it gets is the body, bare (mod_proxy_fdpass).

Theory of operation. Apache has sent `200 OK` without a length and given the connection away, so the body ends with the
connection (RFC 9112, 6.3), and no word of ours could be told from the answer. What is left to say is how it ends:

    done    in order: the answer is whole
    failed  by a reset: it is not, whatever of it has arrived. Before the first byte too, or a failure would be an empty
            success. The log and the metrics have the code

The text goes out as it is. Events have no place in it, but for an upstream's own where the operator wants them as they
are (`format: raw`); comments, the endings and `event: error` have none at all.

On the board a bare body is FOREIGN from its first byte on. Until then the handoff can be given to another worker,
whole, as any other.
"""

from forkd.board import State
from workers import sse
from workers.backends.base import HttpBackend
from workers.context import Context
from workers.request import Request
from workers.stream import Stream


class BareStream(Stream):
    """One client's stream, without a head."""

    __slots__ = ()

    comments = False
    begun = State.FOREIGN

    def __init__(
        self, context: Context, fd: int, slot: int, attempt: int, remote: str, received_at: float, request: Request
    ) -> None:
        """Takes over `fd`; see `Stream`."""
        super().__init__(context, fd, slot, attempt, remote, received_at, request)
        self.status = 200  # Apache's

    def text(self, text: str) -> None:
        """A piece of the answer."""
        if not self.outcome:
            self._say(text.encode())

    def event(self, event: bytes) -> None:
        """An event: the upstream's own if that is what is wanted, else nothing that the body has a place for."""
        if not self.outcome and isinstance(self.backend, HttpBackend) and self.backend.raw:
            self._say(event)

    def done(self, ending: bytes = sse.DONE) -> None:
        """The answer is complete."""
        if not self.outcome:
            self._client.flush()
            self._finish("ok")

    def fail(self, code: str, retry_after_secs: float = 0.0) -> None:
        """The answer failed: end it so that the client does not take it for whole."""
        if self.outcome:
            return
        self._client.flush()
        self.client_gone(code)

    def take_up(self, state: int, code: str) -> None:
        """End, with `code`, a client that somebody else could not go on with."""
        self.fail(code)

    def client_gone(self, code: str) -> None:
        """The client cannot be spoken to, or not any more: stop whatever feeds it."""
        self._client.reset_on_close()
        super().client_gone(code)

    def _say(self, data: bytes) -> None:
        context, client = self._context, self._client
        self.chunks += 1
        if self.first_at:
            client.queue(data)
            return
        self.first_at = context.loop.now
        context.states[self.slot] = self.begun
        client.queue(data)
        client.flush()
