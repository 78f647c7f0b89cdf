"""One stream: its client, what answers it, its deadlines, its outcome.

Theory of operation. A stream is made for a client that arrived, is fed by a *source* (text, then done, or a failure),
and ends once. Three questions decide what each act means, and each has one field:

    status   0 until the head is written: a failure is still an HTTP status; then 200: a failure is an event
    outcome  "" while it lives; then the code it ended with ("ok" or one of `forkd.reasons`): whatever a source still
             says is ignored
    client   owns the fd, and may outlive the outcome by what is held for a slow reader and by the linger

What the board says of the slot is stored before each act, here and in `client`; `forkd.board` has the table.
"""

import math
import time
from collections.abc import Callable
from typing import ClassVar, Final, Protocol

from forkd.board import State
from forkd.logs import Access
from forkd.reasons import REASONS
from workers import response, sse
from workers.backends.base import Backend
from workers.client import Client, RelayedClient
from workers.context import Context
from workers.loop import TICKS_PER_SEC
from workers.request import Request, choose_id

_OPENING: Final = int(State.OPENING)
_OPEN: Final = int(State.OPEN)
HIGH_WATER_BYTES: Final = 65536
RETRY_AFTER_SECS: Final = 1


class Source(Protocol):
    """What feeds a stream."""

    def start(self) -> None:
        """Begin. May feed the stream at once, and may end it."""

    def pause(self) -> None:
        """The client is slow: feed nothing more, soon."""

    def resume(self) -> None:
        """The client has caught up."""

    def cancel(self) -> None:
        """Nobody listens any more: stop and free everything. Called once for every source that was started."""

    def check(self, now: float) -> float:
        """Look at your deadlines, and say in how many seconds to look again at the latest."""


class Stream:
    """One client's stream. `attempt` and `slot` name it to the master."""

    __slots__ = (
        "_client",
        "_context",
        "_encode",
        "_fields",
        "_method",
        "_paused",
        "attempt",
        "backend",
        "chunks",
        "first_at",
        "input_tokens",
        "model",
        "outcome",
        "output_tokens",
        "remote",
        "request_id",
        "slot",
        "source",
        "started_at",
        "status",
        "user_id",
    )

    comments: ClassVar[bool] = True
    """A quiet answer may have comments put into it."""
    begun: ClassVar[State] = State.OPEN
    """What the board says between two pieces of the answer."""

    def __init__(
        self, context: Context, fd: int, slot: int, attempt: int, remote: str, received_at: float, request: Request
    ) -> None:
        """Takes over `fd`. `received_at` is when the handoff reached the master (monotonic seconds)."""
        self._context = context
        self.slot = slot
        self.attempt = attempt
        self.remote = request.line.remote_addr or remote
        self.request_id = choose_id(request, slot, received_at)
        self.user_id = request.data.user_id
        self.backend: Backend | None = None
        self.source: Source | None = None
        self.status = 0
        self.outcome = ""
        self.chunks = 0
        self.started_at = received_at
        self.model: str | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self._encode: Callable[[str], bytes] = sse.content_event
        self.first_at = 0.0
        self._paused = False
        self._fields = request.fields
        self._method = request.line.method
        self._client = (RelayedClient if request.relayed else Client)(context, self, fd, slot)
        context.streams.add(self)
        context.started += 1

    @property
    def live(self) -> bool:
        """Whether a source may still feed it."""
        return not self.outcome

    def begin(self, backend: Backend, source: Source) -> None:
        """Let `source` feed the stream."""
        self.backend = backend
        self.source = source
        self._encode = backend.encode
        if self._method == "HEAD":
            self._context.loop.after(self._context.timings.checkup_ticks, self)
            self._open(b"")
            self._finish("ok")
            return
        source.start()
        context = self._context
        self._come_again(source.check(context.loop.now) if self.source is not None else float("inf"))

    def hand_over(self) -> int:
        """Give the client's fd to the caller, who owns it and answers for the slot from now on. Instead of `begin`."""
        self.outcome = "ok"
        self._context.streams.discard(self)
        return self._client.release()

    # What a source says.

    def text(self, text: str) -> None:
        """A piece of the answer."""
        if not self.chunks or self.outcome:
            self.event(self._encode(text))
            return
        self.chunks += 1
        self._client.queue(self._encode(text))

    def event(self, event: bytes) -> None:
        """A whole event, already in the form that the client gets."""
        if self.outcome:
            return
        self.chunks += 1
        if not self.first_at:
            self.first_at = self._context.loop.now
        if not self.status:
            self._open(event)
            return
        self._client.queue(event)

    def done(self, ending: bytes = sse.DONE) -> None:
        """The answer is complete."""
        if self.outcome:
            return
        if not self.status:
            self._open(ending)
        elif ending:
            self._client.write(ending)
        else:
            self._client.flush()
        self._finish("ok")

    def fail(self, code: str, retry_after_secs: float = 0.0) -> None:
        """The answer failed: tell the client, by a status if there is still time for one, else by an event.

        `retry_after_secs` goes into the answer if its status is 429 or 503.
        """
        if self.outcome:
            return
        reason = REASONS[code]
        body = sse.error_body(code, reason.text, self.request_id)
        if self.status:
            self._client.write(sse.error_event(body))
        else:
            self.status = reason.status or 500
            self._context.states[self.slot] = State.OPENING
            retry = math.ceil(retry_after_secs) or RETRY_AFTER_SECS if self.status in (429, 503) else 0
            answer = response.error_response(self.status, self.request_id, self._fields, body, retry)
            self._client.write(answer.removesuffix(body) if self._method == "HEAD" else answer)
        self._finish(code)

    def take_up(self, state: int, code: str) -> None:
        """End, with `code`, a client that another worker left in `state` (see `forkd.board`)."""
        body = sse.error_body(code, REASONS[code].text, self.request_id)
        if state in (State.GIVEN, State.COMMITTED):
            self.fail(code)
            return
        self.status = 200
        event = sse.error_event(body)
        if state == State.OPENING:
            self.status = REASONS[code].status or 502
            event = response.stream_head(self.request_id, self._fields, self.status) + event
        else:
            # In PARTIAL half an event must be ended. In OPEN it may have to be (that a write was cut short is noted
            # after it); to a reader of whole events one LF more means nothing.
            event = b"\n" + event
        self._client.write(event)
        self._finish(code)

    # What the client says.

    def client_slow(self) -> None:
        """The kernel takes no more for it just now: pause the source if too much is held."""
        held = self._client.held
        if held is not None and len(held) > HIGH_WATER_BYTES and not self._paused and self.source:
            self._paused = True
            self.source.pause()

    def client_drained(self) -> None:
        """Nothing is held for the client any more."""
        if self.outcome:
            self._account()
            return
        if self._context.states[self.slot] != State.ENDED:
            self._context.states[self.slot] = self.begun
        if self._paused and self.source is not None:
            self._paused = False
            self.source.resume()

    def client_gone(self, code: str) -> None:
        """The client cannot be spoken to: stop whatever feeds it."""
        if self.outcome and self._client.held is not None:  # all was said, and not all of it arrived
            self.outcome = code
            self._account()
        self._finish(code, gone=True)
        self._client.abort()

    def client_closed(self) -> None:
        """The fd is closed: the slot is free for the master to use again."""
        if not self.outcome:  # only a bug closes a client under a living stream; the books must still balance
            self._finish("internal_error")
        self._context.finished.append((self.slot, self.attempt))
        self._context.streams.discard(self)

    def crashed(self, error: Exception) -> None:
        """A callback of ours raised: a bug. This stream pays for it, no other does."""
        self._context.log.error("stream %s crashed", self.request_id, exc_info=error)
        if self.outcome:
            self.client_gone("internal_error")
        else:
            self.fail("internal_error")

    # Deadlines.

    def tick(self) -> None:
        """Look at every slow deadline of the stream, and come again when the next one may be due."""
        context = self._context
        client = self._client
        if client.fd < 0 or client.lingering:
            return
        context.words[context.current] = self.slot + 1
        now = context.loop.now
        timings = context.timings
        stalled = client.stalled_secs(now)
        wait = float("inf")
        if timings.write_timeout:
            if stalled >= timings.write_timeout:
                self.client_gone("write_timeout")
                return
            if stalled:
                wait = timings.write_timeout - stalled
        if self.outcome:  # only waiting for a slow reader to take the end
            self._come_again(wait)
            return
        if timings.max_duration:
            left = self.started_at + timings.max_duration - now
            if left <= 0:
                self.fail("max_duration")
                left = 0.0
            wait = min(wait, left)
        if timings.headers_after and not self.status and not self.outcome:
            left = self.started_at + timings.headers_after - now
            if left <= 0:
                # The model thinks for long: balancers in between want to see something.
                self._open(sse.HEARTBEAT)
            else:
                wait = min(wait, left)
        if self.source is not None:
            wait = min(wait, self.source.check(now))
        if timings.heartbeat and self.status and self.comments and not stalled and not self.outcome:
            quiet = now - client.progress_at
            if quiet >= timings.heartbeat:
                client.write(sse.HEARTBEAT)
                quiet = 0.0
            wait = min(wait, timings.heartbeat - quiet)
        self._come_again(wait)

    def _come_again(self, wait: float) -> None:
        context = self._context
        context.loop.after(int(min(wait * TICKS_PER_SEC + 1, context.timings.checkup_ticks)), self)

    # Inside.

    def _open(self, first: bytes) -> None:
        """Write the head, and the first event with it: one system call, one packet."""
        context = self._context
        self.status = 200
        head = response.stream_head(self.request_id, self._fields)
        self._fields = b""
        context.states[self.slot] = _OPENING
        client = self._client
        client.write(head + first)
        if client.held is None:
            if client.fd >= 0:
                context.states[self.slot] = _OPEN
        elif client.sent:
            # Cut within the head nothing can be said that the client would understand; cut behind it, an LF helps.
            context.states[self.slot] = State.PARTIAL if client.sent >= len(head) else State.FOREIGN

    def _finish(self, code: str, *, gone: bool = False) -> None:
        """The outcome is known: stop the source, and end the client unless it is gone. Happens once.

        The books are closed at once, or if something is still held for a slow client, when that is written or lost.
        """
        if self.outcome:
            return
        self.outcome = code
        source, self.source = self.source, None
        if source is not None:
            source.cancel()
        client = self._client
        if gone or client.held is None:
            self._account()
        if not gone:
            client.end()

    def _account(self) -> None:
        """The access line and the metrics."""
        context = self._context
        now = context.loop.now
        code = self.outcome
        sent = self._client.sent
        duration = now - self.started_at
        ttfb = self.first_at - self.started_at if self.first_at else -1.0
        backend = self.backend.name if self.backend is not None else ""
        context.metrics.stream_ended(backend, sent, self.chunks, duration, ttfb)
        context.sent_bytes += sent
        if code == "ok":
            context.completed += 1
        else:
            context.failed += 1
            context.metrics.stream_failed(code)
            if backend and code == "internal_error":
                context.metrics.count("daemon_backend_errors_total", backend)
        if context.logs.wants_access:
            context.logs.access(
                time.time(),
                Access(
                    self.request_id,
                    self.user_id,
                    self.remote,
                    backend,
                    self.model,
                    self.status,
                    sent,
                    self.chunks,
                    int(ttfb * 1000) if ttfb >= 0 else None,
                    int(duration * 1000),
                    context.index,
                    code,
                    self.input_tokens,
                    self.output_tokens,
                ),
            )
