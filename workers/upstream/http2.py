"""HTTP/2 (RFC 9113): one connection, many exchanges.

Theory of operation. `h2` knows the protocol; it also spends ten times as long on a DATA frame as everything else here
does on the token inside. So the frames are told apart first, by their nine-byte heads:

    DATA of an exchange whose head has come    taken here; only an END_STREAM is passed on, as an empty frame
    DATA of an exchange that is over           counted for the connection's window, and dropped
    GOAWAY                                     taken here: h2 would end the connection, though the exchanges that the
                                               upstream still answers go on (6.8)
    all else, and all between HEADERS and      given to h2, in order
    its last CONTINUATION

h2 therefore knows nothing of what was received, and must not compare it with a content-length (`_response`), which
nobody needs here: END_STREAM says where a body ends. Flow control (6.9) is ours: what arrives is counted for the stream
and for the connection; half a window of it is given back by one WINDOW_UPDATE; a paused exchange gives nothing back,
so that the upstream stops with this one and goes on with the others. An upstream that sends more to a paused one than
it was given is in breach, and the stream is reset. (The connection's window is given back as fast as bytes are read, so
that to exceed it would harm nobody.)

A connection is ready when the upstream's SETTINGS are there, since they say how many exchanges it takes. It ends when
it is lost or in breach (every exchange fails), or after a GOAWAY with its last exchange.
"""

from struct import Struct
from typing import Final, Protocol

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from forkd.settings import Http2 as Http2Settings
from workers.loop import Loop, to_ticks
from workers.upstream.exchange import NOBODY, Exchange, Failure, ReleaseEnd
from workers.upstream.fields import FieldEncoder
from workers.upstream.message import HttpRequest
from workers.upstream.transport import Transport

FRAME_MAX_BYTES: Final = 16384
HEAD_MAX_BYTES: Final = 65536
DEFAULT_WINDOW_BYTES: Final = 65535
RELEASE_TICKS: Final = to_ticks(1.0)
READY_SECS: Final = 10.0
"""How long the upstream may take for its SETTINGS."""
OWED_MAX_BYTES: Final = 1 << 20
"""So much may wait of what h2 answers to frames (PING, SETTINGS). Who asks on and never reads would fill the memory."""
TIDY_EVERY: Final = 32
"""Streams are opened before h2 forgets those that are closed."""
LAST_NUMBER: Final = 2**31 - 1
"""Of a stream: 5.1.1."""

_HEAD: Final = Struct(">HBBBL")  # length (two parts), type, flags, stream: 4.1
_WINDOW_UPDATE: Final = Struct(">HBBBLL")
_DATA, _HEADERS, _PUSH_PROMISE, _GOAWAY, _CONTINUATION = 0x0, 0x1, 0x5, 0x7, 0x9
_HEAD_FRAMES: Final = frozenset({_HEADERS, _PUSH_PROMISE, _CONTINUATION})
_END_STREAM, _END_HEADERS, _PADDED = 0x1, 0x4, 0x8

_CONFIG: Final = h2.config.H2Configuration(
    client_side=True,
    header_encoding=None,  # a field may hold any bytes, and h2 would raise what is no error of the protocol
    # What goes out was looked at by the pool; of what comes in, only the status and four fields are ever used, and
    # those are looked at where they are.
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
)


class Owner(Protocol):
    """The pool."""

    def ready(self, connection: "Http2") -> None:
        """It takes exchanges."""

    def roomier(self, connection: "Http2") -> None:
        """An exchange has ended, or the upstream takes more of them."""

    def gone(self, connection: "Http2", failure: Failure) -> None:
        """It is no more. Said once."""


class _Connection(h2.connection.H2Connection):
    """h2's connection, which goes through all its streams before it opens one: to count them, and to forget the closed
    ones. The pool counts, too, so that once in a while is enough.
    """

    _opened = 0

    @property
    def open_outbound_streams(self) -> int:
        """How many there are at most; that this is not too many is for `Http2.room` to say."""
        self._opened += 1
        return super().open_outbound_streams if self._opened % TIDY_EVERY == 0 else 0


class Http2:
    """One connection. It takes over `transport`, which is connected."""

    __slots__ = (
        "_asked",
        "_authority",
        "_base_path",
        "_exchanges",
        "_going",
        "_h2",
        "_heard_at",
        "_in_headers",
        "_loop",
        "_most",
        "_next_number",
        "_owed",
        "_owner",
        "_partial",
        "_pinged_at",
        "_ready",
        "_scheme",
        "_settings",
        "_stream_window",
        "_taken",
        "_transport",
        "_used",
        "_window",
        "idle_since",
    )

    def __init__(
        self,
        loop: Loop,
        owner: Owner,
        transport: Transport,
        settings: Http2Settings,
        scheme: str,
        authority: str,
        base_path: str,
    ) -> None:
        self._loop = loop
        self._owner = owner
        self._transport = transport
        self._settings = settings
        self._scheme = scheme
        self._authority = authority
        self._base_path = base_path
        self._exchanges: dict[int, Exchange] = {}
        self._next_number = 1
        self._partial = b""
        self._in_headers = False
        self._asked = False
        """h2 was given something, and may have something to say to it."""
        self._ready = False
        self._most = 0
        """So many exchanges at once."""
        self._going = False
        """The upstream takes no more exchanges on this connection."""
        self._used = False
        self._stream_window = settings.initial_stream_window_kb * 1024
        self._window = max(settings.initial_connection_window_kb * 1024, DEFAULT_WINDOW_BYTES)
        self._taken = 0
        self._owed = 0
        self._heard_at = self.idle_since = loop.now
        self._pinged_at = 0.0
        """When the PING that is not answered yet was sent; 0: none is out."""
        transport.owner = self
        connection = self._h2 = _Connection(_CONFIG)
        connection.encoder = FieldEncoder()  # type: ignore[assignment]
        connection.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: self._stream_window,
                SettingCodes.MAX_FRAME_SIZE: FRAME_MAX_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: HEAD_MAX_BYTES,
            },
        )
        connection.initiate_connection()
        if self._window > DEFAULT_WINDOW_BYTES:
            connection.increment_flow_control_window(self._window - DEFAULT_WINDOW_BYTES)
        self._flush()
        loop.after(to_ticks(READY_SECS), _Late(self))

    @property
    def room(self) -> int:
        """How many more exchanges it takes now."""
        return 0 if self._going else self._most - len(self._exchanges)

    @property
    def live(self) -> int:
        """How many exchanges it carries."""
        return len(self._exchanges)

    @property
    def used(self) -> bool:
        """It has carried an exchange before."""
        return self._used

    def send(self, exchange: Exchange) -> None:
        """Carry `exchange`. There must be room."""
        request, exchange.request = exchange.request, None
        assert request is not None
        number = exchange.number = self._next_number
        self._next_number += 2
        if self._next_number > LAST_NUMBER:
            self._going = True
        exchange.carrier = self
        self._exchanges[number] = exchange
        self._used = True
        self._h2.send_headers(number, self._fields(request), end_stream=False)
        exchange.unsent = memoryview(request.body)
        self._send_body(exchange)
        self._flush()

    def pause(self, _exchange: Exchange) -> None:
        """Nothing to do: the window is not given back while `exchange.paused`."""

    def resume(self, exchange: Exchange) -> None:
        """Give back what was held."""
        self._give_back(exchange)

    def cancel(self, exchange: Exchange) -> None:
        """Reset the stream."""
        if self._forget(exchange):
            self._reset(exchange, ErrorCodes.CANCEL)
            self._ended()

    def release(self, exchange: Exchange) -> None:
        """Nobody listens any more; the end of the stream is most likely on its way."""
        exchange.paused = False
        self._give_back(exchange)
        self._loop.after(RELEASE_TICKS, ReleaseEnd(self, exchange))

    def check(self, now: float) -> None:
        """Called about once a second: keep-alive by PING while there are exchanges."""
        settings = self._settings
        if not settings.keep_alive_interval_secs or not self._ready:
            return
        if self._pinged_at:
            if now - self._pinged_at >= settings.keep_alive_timeout_secs:
                self._break("backend_silent", "no answer to a PING")
        elif self._exchanges and now - self._heard_at >= settings.keep_alive_interval_secs:
            self._pinged_at = now
            self._h2.ping(b"forkd   ")
            self._flush()

    def late(self) -> None:
        """The time for the upstream's SETTINGS is up."""
        if not self._ready and self._transport.fd >= 0:
            self._break("backend_timeout", "HTTP/2: no SETTINGS in time")

    def close(self) -> None:
        """Close an idle connection with a GOAWAY; nothing is told."""
        if self._transport.fd >= 0:
            try:
                self._h2.close_connection()
                self._flush()
            except h2.exceptions.H2Error:
                pass
            self._transport.close()
            self._let_go()

    # The transport's.

    def connected(self, protocol: str) -> None:
        """Never: the transport was connected before."""

    def received(self, data: bytes) -> None:
        """Take the frames apart."""
        self._heard_at = self._loop.now
        self._pinged_at = 0.0
        if self._partial:
            data = self._partial + data
            self._partial = b""
        position = passed = 0
        end = len(data)
        unpack = _HEAD.unpack_from
        try:
            while end - position >= 9:
                high, low, kind, flags, number = unpack(data, position)
                length = high << 8 | low
                if length > FRAME_MAX_BYTES:
                    if not self._ready:
                        self._break("backend_garbled", "it does not speak HTTP/2")
                    else:
                        self._break("backend_garbled", "HTTP/2: a frame is too large", ErrorCodes.FRAME_SIZE_ERROR)
                    return
                following = position + 9 + length
                if following > end:
                    break
                if kind == _DATA and not self._in_headers:
                    if position > passed:
                        self._pass(data[passed:position])
                        passed = position
                    if self._data(data, position + 9, length, flags, number & 0x7FFFFFFF):
                        passed = following
                elif kind == _GOAWAY and not self._in_headers and length >= 8 and not number:
                    if position > passed:
                        self._pass(data[passed:position])
                    passed = following
                    self._goaway(data[position + 9 : following])
                elif kind in _HEAD_FRAMES:
                    self._in_headers = not flags & _END_HEADERS
                if self._transport.fd < 0:
                    return
                position = following
            if position > passed:
                self._pass(data[passed:position])
                passed = position
        except h2.exceptions.ProtocolError as error:
            self._break("backend_garbled", f"HTTP/2: {error}"[:200], None)
            return
        if position < end:
            self._partial = data[position:]
        if self._asked and self._transport.fd >= 0:
            self._asked = False
            self._reply()
        if self._going and not self._exchanges:
            self._ended()

    def lost(self, code: str, detail: str) -> None:
        """The transport is closed."""
        self._fail_all(code or "backend_reset", detail)

    def crashed(self, error: Exception) -> None:
        """A bug of ours. The exchanges' own are caught where they are called."""
        for exchange in list(self._exchanges.values()):
            exchange.receiver.crashed(error)
        self._break("internal_error", "a bug")

    # Frames.

    def _data(self, data: bytes, start: int, length: int, flags: int, number: int) -> bool:
        """A DATA frame (6.1), whose payload starts at `start`. False: it is for h2 to judge."""
        exchange = self._exchanges.get(number)
        if exchange is None:
            if not 0 < number < self._next_number or not number & 1:
                return False  # a stream that never was
        elif not exchange.status:
            return False  # before its head
        self._taken += length
        if self._taken > self._window // 2:
            self._transport.write(_WINDOW_UPDATE.pack(0, 4, 8, 0, 0, self._taken))
            self._taken = 0
        if exchange is None:
            return True
        exchange.taken += length
        if exchange.taken > self._stream_window // 2:
            if exchange.taken > self._stream_window:
                self._forget(exchange)
                self._reset(exchange, ErrorCodes.FLOW_CONTROL_ERROR)
                exchange.fail(Failure("backend_garbled", "HTTP/2: more data than the window allows"))
                self._owner.roomier(self)
                return True
            if not exchange.paused and not flags & _END_STREAM:
                self._give_back(exchange)
        end = start + length
        if flags & _PADDED:
            padding = data[start] if length else 0
            start += 1
            end -= padding
            if end < start:
                self._break("backend_garbled", "HTTP/2: more padding than data", ErrorCodes.PROTOCOL_ERROR)
                return True
        if end > start:
            try:
                exchange.receiver.body(data[start:end])
            except Exception as error:
                exchange.receiver.crashed(error)
        if flags & _END_STREAM and self._transport.fd >= 0 and number in self._exchanges:
            self._data_ended(number)
        return True

    def _data_ended(self, number: int) -> None:
        """END_STREAM: h2's stream is to know; as far as it knows, nothing was in it."""
        stream = self._h2.streams.get(number)
        if stream is None:  # h2 has closed it: it is to judge what that means
            self._pass(_HEAD.pack(0, 0, _DATA, _END_STREAM, number))
            return
        _, events = stream.receive_data(b"", True, 0)
        self._heed(events)

    def _give_back(self, exchange: Exchange) -> None:
        if exchange.taken > self._stream_window // 2 and exchange.number in self._exchanges:
            self._transport.write(_WINDOW_UPDATE.pack(0, 4, 8, 0, exchange.number, exchange.taken))
            exchange.taken = 0

    def _goaway(self, payload: bytes) -> None:
        """GOAWAY (6.8): what is above the last stream was not looked at; the rest is still being answered.

        Servers say it in good order after so many requests on a connection (nginx: keepalive_requests), or before they
        restart. Where many ask at once that may happen to some of them again and again, though each time to fewer.
        """
        self._going = True
        last = int.from_bytes(payload[:4]) & 0x7FFFFFFF
        code = int.from_bytes(payload[4:8])
        failure = Failure(
            "backend_unavailable",
            f"HTTP/2: GOAWAY, {_named(code)}",
            unseen=True,
            outrun=code == ErrorCodes.NO_ERROR and last > 0,
        )
        for exchange in list(self._exchanges.values()):
            if exchange.number > last:
                self._forget(exchange)
                exchange.fail(failure)
        self._owner.roomier(self)

    def _pass(self, data: bytes) -> None:
        """Give frames to h2, and do what it says."""
        self._asked = True
        self._heed(self._h2.receive_data(data))

    def _heed(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.StreamEnded):
                self._stream_ended(event)
            elif isinstance(event, h2.events.ResponseReceived):
                self._response(event)
            elif isinstance(event, h2.events.StreamReset):
                self._stream_reset(event)
            elif isinstance(event, h2.events.WindowUpdated):
                self._window_updated(event)
            elif isinstance(event, h2.events.RemoteSettingsChanged):
                self._settings_changed()

    def _response(self, event: h2.events.ResponseReceived) -> None:
        exchange = self._exchanges.get(event.stream_id or 0)
        if exchange is None:
            return
        fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers or ()}
        status = fields.pop(":status", "")
        if not (len(status) == 3 and status.isascii() and status.isdigit()):
            raise h2.exceptions.ProtocolError("no status")
        exchange.status = int(status)
        if "content-length" in fields and (stream := self._h2.streams.get(exchange.number)) is not None:
            stream._expected_content_length = None  # it sees no body, and would end the connection over that
        try:
            exchange.receiver.response(exchange.status, fields)
        except Exception as error:
            exchange.receiver.crashed(error)

    def _stream_ended(self, event: h2.events.StreamEnded) -> None:
        exchange = self._exchanges.get(event.stream_id or 0)
        if exchange is None:
            return
        self._forget(exchange)
        if exchange.unsent is not None:  # it wants no more of the request: 8.1
            self._reset(exchange, ErrorCodes.NO_ERROR)
        receiver, exchange.receiver = exchange.receiver, NOBODY
        try:
            receiver.complete()
        except Exception as error:
            receiver.crashed(error)
        self._ended()

    def _stream_reset(self, event: h2.events.StreamReset) -> None:
        exchange = self._exchanges.get(event.stream_id or 0)
        if exchange is None:
            return
        self._forget(exchange)
        code = int(event.error_code or 0)
        refused = code == ErrorCodes.REFUSED_STREAM
        detail = f"HTTP/2: stream reset, {_named(code)}"
        exchange.fail(Failure("backend_unavailable" if refused else "backend_reset", detail, unseen=refused))
        self._ended()

    def _window_updated(self, event: h2.events.WindowUpdated) -> None:
        exchanges = self._exchanges
        waiting = [exchanges.get(event.stream_id)] if event.stream_id else list(exchanges.values())
        for exchange in waiting:
            if exchange is not None and exchange.unsent is not None:
                self._send_body(exchange)
                self._flush()

    def _settings_changed(self) -> None:
        self._most = min(self._settings.max_streams, self._h2.remote_settings.max_concurrent_streams)
        if not self._ready:
            self._ready = True
            self._owner.ready(self)
            return
        for exchange in list(self._exchanges.values()):  # the windows may have grown
            if exchange.unsent is not None:
                self._send_body(exchange)
        self._owner.roomier(self)

    # Sending.

    def _fields(self, request: HttpRequest) -> list[tuple[str, str]]:
        return [
            (":method", "POST"),
            (":scheme", self._scheme),
            (":authority", self._authority),
            (":path", self._base_path + request.path),
            *request.headers,
            ("accept-encoding", "identity"),
            ("content-length", str(len(request.body))),
        ]

    def _send_body(self, exchange: Exchange) -> None:
        """As much of the request as the upstream's windows allow."""
        unsent = exchange.unsent
        assert unsent is not None
        connection, number = self._h2, exchange.number
        while True:
            amount = min(len(unsent), connection.local_flow_control_window(number), connection.max_outbound_frame_size)
            if amount <= 0 and unsent:
                exchange.unsent = unsent
                return
            connection.send_data(number, bytes(unsent[:amount]), end_stream=amount == len(unsent))
            unsent = unsent[amount:]
            if not unsent:
                exchange.unsent = None
                return

    def _reset(self, exchange: Exchange, code: ErrorCodes) -> None:
        try:
            self._h2.reset_stream(exchange.number, code)
        except h2.exceptions.ProtocolError:  # closed already
            return
        self._flush()

    def _reply(self) -> None:
        """Send what h2 has to say to what it was given."""
        data = self._h2.data_to_send()
        if not data:
            return
        self._transport.write(data)
        if not self._transport.unsent_bytes:
            self._owed = 0
            return
        self._owed += len(data)
        if self._owed > OWED_MAX_BYTES:
            self._break("backend_garbled", "HTTP/2: it has its frames answered and reads nothing")

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._transport.write(data)

    # Endings.

    def release_ended(self, exchange: Exchange) -> None:
        """The moment of a released exchange is over."""
        self.cancel(exchange)

    def _forget(self, exchange: Exchange) -> bool:
        exchange.carrier = None
        return self._exchanges.pop(exchange.number, None) is not None

    def _ended(self) -> None:
        """An exchange is over."""
        if self._transport.fd < 0:
            return
        if not self._exchanges:
            self.idle_since = self._loop.now
            if self._going:
                self.close()
                self._owner.gone(self, Failure("backend_unavailable", "HTTP/2: GOAWAY", unseen=True))
                return
        self._owner.roomier(self)

    def _break(self, code: str, detail: str, error: ErrorCodes | None = ErrorCodes.NO_ERROR) -> None:
        """End the connection, telling the upstream `error` (None: h2 has done so)."""
        if self._transport.fd < 0:
            return
        try:
            if error is not None:
                self._h2.close_connection(error)
            self._flush()
        except h2.exceptions.H2Error:
            pass
        self._transport.close()
        self._fail_all(code, detail)

    def _fail_all(self, code: str, detail: str) -> None:
        exchanges, self._exchanges = self._exchanges, {}
        self._owner.gone(self, Failure(code, detail, unseen=True))
        for exchange in exchanges.values():
            # One that has no head yet, on a connection that carried others before, met a dead connection.
            stale = self._used and not exchange.status and exchange.number > 1 and code == "backend_reset"
            exchange.fail(Failure(code, detail, stale=stale))
        self._let_go()

    def _let_go(self) -> None:
        """Of h2's state, which holds its own bound methods: a circle, and there may be no collection for weeks."""
        self._going = True
        vars(self._h2).clear()


def _named(code: int) -> str:
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"error {code}"


class _Late:
    """The deadline for the SETTINGS."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Http2) -> None:
        self._connection = connection

    def tick(self) -> None:
        self._connection.late()

    def crashed(self, error: Exception) -> None:
        self._connection.crashed(error)
