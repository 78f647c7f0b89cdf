"""HTTP/2, the server's side, by h2; and below h2, for what a server must not do."""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from tests.fake_api.exchange import SSE_FIELDS, Exchange, Fields
from tests.fake_api.pipe import PIECE, Pipe
from tests.fake_api.records import Connection, Seen

if TYPE_CHECKING:
    from tests.fake_api.server import FakeApi

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER_BYTES: Final = 9
_PING_TYPE: Final = 6
_ACK: Final = 1
_STREAMS: Final = SettingCodes.MAX_CONCURRENT_STREAMS
_NO_LIMIT: Final = 2**31 - 1


class Http2Exchange(Exchange):
    """One stream."""

    padding: int | None = None
    """So many bytes of padding in each DATA frame; None: the frames have no such field."""

    def __init__(self, connection: "Http2Connection", seen: Seen) -> None:
        super().__init__(connection.api, seen, connection.pipe)
        self.connection = connection
        self.h2 = connection.h2
        self.stream_id = seen.stream_id

    async def head(self, status: int = 200, fields: Fields = SSE_FIELDS, *, last: bool = False) -> None:
        """As everywhere; `last`: END_STREAM is on it."""
        self.h2.send_headers(self.stream_id, [(":status", str(status)), *fields], end_stream=last)
        await self._flush()
        self._headed()

    async def inform(self, status: int, fields: Fields = ()) -> None:
        self.h2.send_headers(self.stream_id, [(":status", str(status)), *fields])
        await self._flush()

    async def send(self, data: bytes, *, last: bool = False) -> None:
        """As everywhere; waits for WINDOW_UPDATE. `last`: END_STREAM is on the last frame."""
        extra = 0 if self.padding is None else self.padding + 1
        while data:
            room = min(self.window, self.h2.max_outbound_frame_size) - extra
            if room <= 0:
                self.seen.stalled_since = time.monotonic()
                self.api.changed()
                await self.connection.window_grew.wait()
                self.seen.stalled_since = None
                continue
            piece, data = data[:room], data[room:]
            self.h2.send_data(self.stream_id, piece, end_stream=last and not data, pad_length=self.padding)
            await self._flush()
            self.seen.body_sent += len(piece)
            self.api.changed()

    async def end(self, trailers: Fields = ()) -> None:
        """By trailers, or by an empty DATA frame."""
        if trailers:
            self.h2.send_headers(self.stream_id, trailers, end_stream=True)
        else:
            self.h2.end_stream(self.stream_id)
        await self._flush()

    @property
    def window(self) -> int:
        """What may be sent now, by the smaller of the stream's and the connection's windows."""
        return self.h2.local_flow_control_window(self.stream_id)

    async def rst(self, code: h2.errors.ErrorCodes) -> None:
        self.h2.reset_stream(self.stream_id, code)
        await self._flush()

    async def frame(self, frame: Frame) -> None:
        """A frame that h2 does not know of, and would not send."""
        await self.raw(frame.serialize())

    async def goaway(self, last_stream_id: int, code: h2.errors.ErrorCodes = h2.errors.ErrorCodes.NO_ERROR) -> None:
        """Say that no stream above this one was or will be looked at; see Http2Connection.goaway."""
        await self.connection.goaway(last_stream_id, code, self)

    async def _flush(self) -> None:
        self.connection.flush()
        await self._drain()


class Http2Connection:
    """Has each stream answered by a task, which dies with the stream or the client."""

    def __init__(
        self, api: "FakeApi", record: Connection, reader: asyncio.StreamReader, pipe: Pipe, max_streams: int
    ) -> None:
        self.api = api
        self.record = record
        self.pipe = pipe
        self.window_grew = asyncio.Event()
        self.answer_pings = True
        self._max_streams = max_streams
        self._reader = reader
        self._requests: dict[int, tuple[list[tuple[str, str]], bytearray]] = {}
        self._answers: dict[int, tuple[Http2Exchange, asyncio.Task[None]]] = {}
        self._last_stream_id: int | None = None
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=False,
                header_encoding="utf-8",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.h2.local_settings = Settings(client=False, initial_values={_STREAMS: max_streams})
        self.h2.initiate_connection()
        # h2 ends the connection when there are too many; but a client that has not read the settings may not know.
        self.h2.local_settings = Settings(client=False, initial_values={_STREAMS: _NO_LIMIT})

    async def serve(self, data: bytes) -> None:
        """Go on, from the bytes already read, until the connection's end."""
        self.flush()
        try:
            while data:
                for event in self.h2.receive_data(data):
                    self._handle(event)
                self.flush()
                data = await self._reader.read(PIECE)
        except h2.exceptions.ProtocolError as error:
            self.record.fault = f"{type(error).__name__}: {error}"
            self.flush()
            self.pipe.close()
        except OSError:  # a reset, or TLS that ended badly
            pass
        finally:
            for exchange, _ in list(self._answers.values()):
                self._gone(exchange)

    def flush(self) -> None:
        data = self.h2.data_to_send()
        self.pipe.write(data if self.answer_pings else _without_ping_acks(data))

    async def goaway(
        self, last_stream_id: int, code: h2.errors.ErrorCodes, asking: Http2Exchange | None = None
    ) -> None:
        """Send GOAWAY, forget the streams above (but for the one that asks), ignore new ones, and close the
        connection when the last of the others has its answer. To be called again with a lower id, not a higher.
        """
        self.pipe.write(GoAwayFrame(0, last_stream_id=last_stream_id, error_code=code).serialize())
        self._last_stream_id = last_stream_id
        for stream_id, (exchange, task) in list(self._answers.items()):
            if stream_id > last_stream_id and exchange is not asking:
                exchange.seen.ended_at = time.monotonic()
                task.cancel()
        await self.pipe.drain()

    def limit_streams(self, number: int) -> None:
        """From now on so many at once; those above are refused."""
        self._max_streams = number
        self.h2.update_settings({_STREAMS: number})
        self.flush()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=number, headers=fields):
                self._begin(number, [(str(name), str(value)) for name, value in fields])
            case h2.events.DataReceived(stream_id=number, data=data, flow_controlled_length=length):
                if number in self._requests:
                    self._requests[number][1].extend(data)
                with contextlib.suppress(h2.exceptions.StreamClosedError):
                    self.h2.acknowledge_received_data(length, number)
            case h2.events.StreamEnded(stream_id=number):
                if number in self._requests:
                    self._complete(number)
            case h2.events.StreamReset(stream_id=number, error_code=code):
                self._requests.pop(number, None)
                if number in self._answers:
                    exchange, _ = self._answers[number]
                    exchange.seen.cancel_code = int(code)
                    self._gone(exchange)
            case h2.events.WindowUpdated():
                self.record.window_updates += 1
                self._wake()
            case h2.events.RemoteSettingsChanged(changed_settings=changed):
                self.record.settings |= {int(key): setting.new_value for key, setting in changed.items()}
                self._wake()
            case h2.events.PingReceived():
                self.record.pings += 1
            case h2.events.PingAckReceived():
                self.record.ping_acks += 1
            case h2.events.ConnectionTerminated(error_code=code):
                self.record.goaway_code = int(code or 0)
                for exchange, _ in list(self._answers.values()):
                    self._gone(exchange)
        self.api.changed()

    def _begin(self, number: int, fields: list[tuple[str, str]]) -> None:
        if self._last_stream_id is not None and number > self._last_stream_id:
            return
        if len(self._requests) + len(self._answers) < self._max_streams:
            self._requests[number] = fields, bytearray()
        else:
            self.h2.reset_stream(number, h2.errors.ErrorCodes.REFUSED_STREAM)
            self.record.refused += 1

    def _complete(self, number: int) -> None:
        fields, body = self._requests.pop(number)
        seen = Seen(
            len(self.api.requests),
            self.record,
            dict(fields)[":method"],
            dict(fields)[":path"],
            fields,
            bytes(body),
            time.monotonic(),
            number,
        )
        self.api.asked(seen)
        exchange = Http2Exchange(self, seen)
        task = asyncio.create_task(self.api.answer(exchange))
        self._answers[number] = exchange, task
        self.record.streams_open = len(self._answers)
        self.record.streams_peak = max(self.record.streams_peak, len(self._answers))
        task.add_done_callback(lambda _: self._answered(number))

    def _answered(self, number: int) -> None:
        del self._answers[number]
        self.record.streams_open = len(self._answers)
        if self._last_stream_id is not None and not self._answers:
            self.pipe.close()
        self.api.changed()

    def _gone(self, exchange: Http2Exchange) -> None:
        """The stream's end, by whomever."""
        if not self.pipe.closed and not exchange.seen.over:
            exchange.seen.cancelled_at = time.monotonic()
        self._answers[exchange.stream_id][1].cancel()

    def _wake(self) -> None:
        self.window_grew.set()
        self.window_grew = asyncio.Event()


def _without_ping_acks(data: bytes) -> bytes:
    kept = []
    while data:
        end = _HEADER_BYTES + int.from_bytes(data[:3])
        if not (data[3] == _PING_TYPE and data[4] & _ACK):
            kept.append(data[:end])
        data = data[end:]
    return b"".join(kept)
