"""Feeds a stream from an HTTP API: asks, tries again, takes the events apart, hands the text on.

Theory of operation. A RelaySource asks its pool for an exchange, up to 1 + `retries` times. Its phases:

    ASKING     no answer yet, or one that will be tried again: see `_again`
    ANSWERED   200, and its body is a stream of events: each goes through the backend's `translate`
    REFUSED    any other answer: its body is read, as far as ERROR_BODY_BYTES, for the name of the error
    ENDED      the stream has its outcome, and whatever comes is ignored

Nothing is tried again once the client has seen a byte of the answer, and nothing that may have been done already if
the backend says that it must not be done twice.

The answer is complete when the API says so ("[DONE]" and its like), or when its body ends in order behind a finish
reason. A body that ends without either was cut short, and the client is told so.
"""

import email.utils
import random
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from forkd.board import State
from workers import sse
from workers.attachments import AttachmentError
from workers.backends.base import BadRequest, Done, Extra, Failure, Finish, HttpBackend, Piece, Usage
from workers.loop import to_ticks
from workers.request import Request
from workers.upstream import exchange as upstream
from workers.upstream.exchange import Exchange
from workers.upstream.message import HttpRequest

if TYPE_CHECKING:
    from workers.context import Context
    from workers.stream import Stream

ERROR_BODY_BYTES: Final = 65536
PARTS_MAX: Final = 1000
"""So many parts of an answer have their tokens counted. An upstream that made up more would fill the memory."""
OUTRUN_MAX: Final = 16
"""So often a request is asked again because its connection ran out of requests before it."""
BACKOFF_SECS: Final = 0.5
BACKOFF_MAX_SECS: Final = 8.0
DAY_SECS: Final = 86400.0
_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_RETRIED_STATUSES: Final = frozenset({429, 500, 502, 503, 504, 529})
_RETRIED_CODES: Final = frozenset({"backend_unavailable", "backend_unresolved", "backend_reset"})
_STATUS_CODES: Final = {
    401: "backend_unauthorized",
    403: "backend_unauthorized",
    408: "backend_timeout",
    429: "backend_rate_limited",
    503: "backend_overloaded",
    504: "backend_timeout",
    529: "backend_overloaded",
}
_NO_STREAM: Final = ("text/html", "application/json", "text/xml", "application/xml")


class _ErrorBody(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw(b"null")
    type: str | None = None


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None


class RelaySource:
    """The source for HTTP backends."""

    __slots__ = (
        "_attempt",
        "_backend",
        "_context",
        "_deadline",
        "_exchange",
        "_files",
        "_finished",
        "_handoff",
        "_heard_at",
        "_last_at",
        "_outrun",
        "_parser",
        "_paused",
        "_pool",
        "_refusal",
        "_request",
        "_retry_after",
        "_status",
        "_stream",
        "_usage",
        "model",
    )

    def __init__(self, context: "Context", stream: "Stream", backend: HttpBackend, handoff: Request) -> None:
        self._context = context
        self._stream: Stream | None = stream
        self._backend = backend
        self._pool = context.pools[backend.name]
        self._handoff: Request | None = handoff
        self._request: HttpRequest | None = None
        self._files: dict[str, str] | None = None
        """The attachments that this stream uses up."""
        self.model = backend.model(handoff.data)
        self._exchange: Exchange | None = None
        self._parser: sse.Parser | None = None
        self._refusal: bytearray | None = None
        self._attempt = 0
        self._outrun = 0
        self._status = 0
        self._retry_after = 0.0
        self._finished = False
        self._paused = False
        self._usage: dict[str, Usage] | None = None
        """By the part of the answer that it is of."""
        now = context.loop.now
        self._deadline = now + backend.settings.first_byte_timeout_secs
        self._heard_at = now
        self._last_at = 0.0

    # The stream's.

    def start(self) -> None:
        """Ask; with attachments, when they are read."""
        handoff, self._handoff = self._handoff, None
        stream, context, backend = self._stream, self._context, self._backend
        assert handoff is not None
        assert stream is not None
        request_id = stream.request_id
        wanted = handoff.data.attachments
        if not wanted:
            try:
                self._prepared(backend.request(handoff, request_id, {}))
            except BadRequest as error:
                self._prepared(error)
            return
        if not isinstance(wanted, dict):
            self._prepared(BadRequest("bad_handoff", "attachments: expected a map of names to files"))
            return
        store, settings = context.attachments, context.settings.server
        self._files = wanted

        def prepare() -> HttpRequest:
            read = store.load(wanted, backend.settings.attachment_types, settings.max_attachment_bytes)
            return backend.request(handoff, request_id, read)

        context.files.run(prepare, self._prepared, self.crashed)

    def _prepared(self, request: HttpRequest | Exception) -> None:
        stream = self._stream
        if stream is None:
            return
        if isinstance(request, HttpRequest):
            self._request = request
            if not self._backend.repeatable:
                self._context.states[stream.slot] = State.COMMITTED
            self._ask(fresh=False)
        elif isinstance(request, (BadRequest, AttachmentError)):
            context = self._context
            context.words[context.current] = stream.slot + 1
            context.metrics.handoff_failed(request.code)
            context.log.warning("stream %s: backend %s: %s", stream.request_id, self._backend.name, request)
            stream.fail(request.code)
        else:
            stream.crashed(request)

    def pause(self) -> None:
        """The client is slow: the upstream is to wait."""
        self._paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume(self) -> None:
        """The client has caught up."""
        self._paused = False
        self._heard_at = self._context.loop.now
        if self._exchange is not None:
            self._exchange.resume()

    def cancel(self) -> None:
        """The stream has its outcome: close the books, and end the request unless it has ended by itself."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        exchange, self._exchange = self._exchange, None
        self._parser = None
        self._request = None
        if exchange is not None:
            if self._finished:
                exchange.release()
            else:
                exchange.cancel()
        files, self._files = self._files, None
        if files is not None:
            store = self._context.attachments
            self._context.files.run(lambda: store.delete(files), _deleted)
        stream.model = self.model
        if self._usage is not None:
            stream.input_tokens, stream.output_tokens = _total(self._usage)
        self._account(stream)

    def check(self, now: float) -> float:
        """Look at the deadlines; how soon to come again, in seconds."""
        stream = self._stream
        if stream is None or self._paused:
            return float("inf")
        if self._parser is None:
            left = self._deadline - now
            code = "backend_timeout"
        else:
            left = self._heard_at + self._backend.settings.idle_timeout_secs - now
            code = "backend_silent"
        if left > 0:
            return left
        self._fail(code, "no answer in time" if self._parser is None else "no byte in time")
        return float("inf")

    # The exchange's.

    def response(self, status: int, fields: dict[str, str]) -> None:
        """The head of the answer."""
        stream = self._stream
        if stream is None:
            return
        self._status = status
        kind = fields.get("content-type", "").partition(";")[0].strip().lower()
        if status == 200 and kind not in _NO_STREAM and fields.get("content-encoding", "identity") == "identity":
            self._parser = sse.Parser()
            self._heard_at = self._context.loop.now
            return
        self._retry_after = _retry_after(fields)
        self._refusal = bytearray()

    def body(self, data: bytes) -> None:
        """A piece of the answer."""
        stream = self._stream
        if stream is None:
            return
        context = self._context
        context.words[context.current] = stream.slot + 1
        now = self._heard_at = context.loop.now
        parser = self._parser
        if parser is None:
            self._refused_body(data)
            return
        try:
            events = parser.feed(data)
        except sse.EventTooLarge:
            self._fail("backend_event_too_large", "an event is too large")
            return
        translate = self._backend.translate
        raw = self._backend.raw
        for event in events:
            try:
                piece = translate(event)
            except ValueError as error:
                self._skip(error)
                continue
            if raw:
                stream.event(event.raw)
            if type(piece) is str:
                self._last_at = now
                if piece and not raw:
                    stream.text(piece)
            elif piece is not None:
                self._rare(stream, piece, raw)
            if self._stream is None:
                return

    def complete(self) -> None:
        """The answer's body has ended in order."""
        self._exchange = None
        stream = self._stream
        if stream is None:
            return
        if self._parser is None:
            self._refused()
        elif self._finished or self._backend.ends_with_body:
            self._done(stream)
        else:
            self._fail("backend_truncated", "the answer ended without its end")

    def failed(self, failure: upstream.Failure) -> None:
        """There is no answer, or no more of it."""
        exchange, self._exchange = self._exchange, None
        stream = self._stream
        if stream is None:
            return
        context = self._context
        context.words[context.current] = stream.slot + 1
        if self._parser is not None and self._finished:
            self._done(stream)  # all had been said
        elif self._parser is not None:
            self._fail(failure.code, failure.detail)
        elif self._refusal is not None:
            self._refused()
        elif (failure.outrun and self._outrun < OUTRUN_MAX) or (
            failure.stale
            and exchange is not None
            and not exchange.fresh
            and (failure.unseen or self._backend.repeatable)
        ):
            # Neither costs a retry. Connections that run out answer somebody each, so with an honest upstream it comes
            # to an end; one that died is made up for once.
            self._outrun += failure.outrun
            self._note_retry(failure.code, failure.detail)
            self._ask(fresh=True)
        else:
            may = failure.unseen or (self._backend.repeatable and failure.code == "backend_reset")
            if not (may and failure.code in _RETRIED_CODES and self._again(failure.code, failure.detail, 0.0)):
                self._fail(failure.code, failure.detail)

    def crashed(self, error: Exception) -> None:
        """A bug, found by whoever called us."""
        if self._stream is not None:
            self._stream.crashed(error)

    # Trying again.

    def tick(self) -> None:
        """The pause before the next attempt is over."""
        if self._stream is not None and self._exchange is None:
            self._ask(fresh=True)

    def _ask(self, *, fresh: bool) -> None:
        request = self._request
        assert request is not None
        self._status = 0
        self._refusal = None
        self._exchange = self._pool.ask(request, self, fresh=fresh)

    def _again(self, code: str, detail: str, after: float) -> bool:
        """Try again after so many seconds (0: as long as seems good); False if there is no attempt or time left."""
        context = self._context
        if self._attempt >= self._backend.settings.retries:
            return False
        pause = after or min(BACKOFF_SECS * 2**self._attempt, BACKOFF_MAX_SECS) * random.uniform(0.5, 1.0)
        if context.loop.now + pause >= self._deadline:
            return False
        self._attempt += 1
        self._refusal = None
        self._note_retry(code, detail)
        context.loop.after(to_ticks(pause) + 1, self)  # not a moment too early
        return True

    def _note_retry(self, code: str, detail: str) -> None:
        context, stream = self._context, self._stream
        context.metrics.count("forkd_backend_retries_total", self._backend.name, code)
        context.log.info(
            "stream %s: backend %s: %s: %s; trying again",
            stream.request_id if stream is not None else "",
            self._backend.name,
            code,
            detail,
        )

    # A refusal.

    def _refused_body(self, data: bytes) -> None:
        refusal = self._refusal
        if refusal is None:
            return
        refusal += data
        if len(refusal) > ERROR_BODY_BYTES:
            self._refused()

    def _refused(self) -> None:
        """An answer that is no stream, and whole: try again, or tell the client."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()
        status, refusal = self._status, bytes(self._refusal or b"")
        self._refusal = None
        if status == 200:
            self._fail("backend_not_a_stream", f"a body that is no event stream{_named(refusal)}")
            return
        if 300 <= status < 400:
            self._fail("backend_redirect", f"status {status}")
            return
        code = _STATUS_CODES.get(status) or ("backend_error" if status >= 500 else "backend_rejected")
        detail = f"status {status}{_named(refusal)}"
        may = self._backend.repeatable or status in (429, 503, 529)
        if status in _RETRIED_STATUSES and may and self._again(code, detail, self._retry_after):
            return
        self._fail(code, detail, self._retry_after)

    # An answer.

    def _text(self, stream: "Stream", text: str, raw: bool) -> None:
        self._last_at = self._context.loop.now
        if not raw and text:
            stream.text(text)

    def _rare(self, stream: "Stream", piece: Piece | list[Piece], raw: bool) -> None:
        """Everything but a single piece of text."""
        if isinstance(piece, list):
            for one in piece:
                if self._stream is not None:
                    self._rare(stream, one, raw)
        elif isinstance(piece, str):
            self._text(stream, piece, raw)
        elif isinstance(piece, Usage):
            self._used(piece)
        elif isinstance(piece, Finish):
            self._finished = True
        elif isinstance(piece, Extra):
            if not raw:
                stream.event(sse.named_event(piece.name, piece.data))
        elif isinstance(piece, Done):
            self._finished = True
            self._done(stream)
        elif isinstance(piece, Failure):
            self._fail(piece.code, f"in mid-answer: {_plain(piece.said)}")

    def _used(self, usage: Usage) -> None:
        parts = self._usage
        if parts is None:
            parts = self._usage = {}
        known = parts.get(usage.part)
        if known is not None:
            parts[usage.part] = Usage(
                _larger(known.input_tokens, usage.input_tokens),
                _larger(known.output_tokens, usage.output_tokens),
                usage.part,
            )
        elif len(parts) < PARTS_MAX:
            parts[usage.part] = usage

    def _skip(self, error: ValueError) -> None:
        context, stream = self._context, self._stream
        context.metrics.count("forkd_backend_events_skipped_total", self._backend.name)
        context.log.warning(
            "stream %s: backend %s: an event was skipped: %s",
            stream.request_id if stream is not None else "",
            self._backend.name,
            type(error).__name__,
        )

    def _done(self, stream: "Stream") -> None:
        # In raw format the upstream's own ending has been sent.
        stream.done(b"" if self._backend.raw else sse.DONE)

    def _fail(self, code: str, detail: str, retry_after: float = 0.0) -> None:
        context, stream = self._context, self._stream
        if stream is None:
            return
        context.metrics.count("forkd_backend_errors_total", self._backend.name, code)
        context.metrics.count("daemon_backend_errors_total", self._backend.name)
        context.log.warning("stream %s: backend %s: %s: %s", stream.request_id, self._backend.name, code, detail)
        stream.fail(code, retry_after)

    def _account(self, stream: "Stream") -> None:
        metrics = self._context.metrics
        name, label = self._backend.name, self._backend.label(self.model)
        first_at = stream.first_at
        if first_at:
            metrics.observe("forkd_backend_time_to_first_token_seconds", first_at - stream.started_at, name, label)
        if stream.input_tokens:
            metrics.count("forkd_tokens_total", name, label, "input", amount=stream.input_tokens)
        if stream.output_tokens:
            metrics.count("forkd_tokens_total", name, label, "output", amount=stream.output_tokens)
            if stream.output_tokens > 1 and self._last_at > first_at > 0:
                between = (self._last_at - first_at) / (stream.output_tokens - 1)
                metrics.observe("forkd_backend_time_per_output_token_seconds", between, name, label)


def _larger(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else max(one, other)


def _total(parts: Mapping[str, Usage]) -> tuple[int | None, int | None]:
    """The tokens of all parts, in and out; None where none of them said."""
    read = [usage.input_tokens for usage in parts.values() if usage.input_tokens is not None]
    written = [usage.output_tokens for usage in parts.values() if usage.output_tokens is not None]
    return sum(read) if read else None, sum(written) if written else None


def _deleted(_outcome: object) -> None:
    """What could not be deleted now is swept later."""


def _retry_after(fields: dict[str, str]) -> float:
    """When to try again, in seconds (RFC 9110, 10.2.3; the milliseconds are OpenAI's); 0 if it is not said."""
    try:
        written = fields.get("retry-after-ms", "").strip()
        if _NUMBER.fullmatch(written):
            return min(float(written) / 1000, DAY_SECS)
        written = fields.get("retry-after", "").strip()
        if not written:
            return 0.0
        if _NUMBER.fullmatch(written):
            return min(float(written), DAY_SECS)
        at = email.utils.parsedate_to_datetime(written).timestamp()
        return min(max(at - time.time(), 0.0), DAY_SECS)
    except (ValueError, OverflowError, TypeError):
        return 0.0


def _named(refusal: bytes) -> str:
    """The API's own name for an error. Never its message, which may quote the key or the prompt."""
    try:
        body = msgspec.json.decode(refusal, type=_ErrorBody)
        error = msgspec.json.decode(body.error, type=_Error | None) or _Error(type=body.type)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return ""
    names = [_plain(str(name)) for name in (error.type, error.code) if name]
    return f" ({', '.join(names)})" if names else ""


def _plain(name: str) -> str:
    """A name for the log: short, and without what could be read as another line."""
    return "".join(char if char.isalnum() or char in "_-. " else "?" for char in name[:64])
