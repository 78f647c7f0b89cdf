"""What only an HTTP/2 server can do, right or wrong."""

from h2.errors import ErrorCodes
from hyperframe.frame import DataFrame, RstStreamFrame, WindowUpdateFrame

from tests.fake_api.dialects import words as words_of
from tests.fake_api.exchange import Exchange
from tests.fake_api.http2 import Http2Exchange
from tests.fake_api.patterns.good import ok
from tests.fake_api.patterns.parts import begin, body, conclude, speak

__all__ = [
    "bad_frame",
    "data_before_headers",
    "end_on_data",
    "end_on_headers",
    "few_streams",
    "flow_violation",
    "frame_on_idle_stream",
    "goaway_after",
    "goaway_error",
    "goaway_refuse",
    "goaway_two_step",
    "no_ping_answer",
    "oversized_frame",
    "padding",
    "rst",
    "rst_after_end",
    "rst_refused",
    "server_ping",
    "silent_goaway",
    "unknown_frame",
    "window_overflow",
]

_ALL_STREAMS = 2**31 - 1


async def rst_refused(ask: Exchange) -> None:
    """RST_STREAM with REFUSED_STREAM instead of an answer."""
    await _h2(ask).rst(ErrorCodes.REFUSED_STREAM)


async def rst(ask: Exchange, *, after: int = 2, code: str = "INTERNAL_ERROR") -> None:
    """RST_STREAM with that code after so many words; after=0: instead of an answer."""
    stream = _h2(ask)
    if after:
        await begin(ask)
        await speak(ask, words_of(after))
    await stream.rst(ErrorCodes[code])


async def rst_after_end(ask: Exchange, *, words: int = 5) -> None:
    """A whole answer, and RST_STREAM with NO_ERROR behind it, as RFC 9113, 8.1 allows."""
    await ok(ask, words=words)
    await _h2(ask).frame(RstStreamFrame(ask.seen.stream_id, error_code=ErrorCodes.NO_ERROR))


async def goaway_after(ask: Exchange, *, words: int = 5) -> None:
    """GOAWAY in the middle of this answer, which is finished. No new streams; then the connection is closed."""
    stream = _h2(ask)
    await begin(ask)
    await speak(ask, words_of(words)[:1])
    await stream.goaway(stream.stream_id)
    await speak(ask, words_of(words)[1:])
    await conclude(ask)


async def goaway_two_step(ask: Exchange, *, words: int = 5) -> None:
    """The same as servers do it that are in no hurry: first GOAWAY for all streams, and past the gate the true one."""
    stream = _h2(ask)
    await begin(ask)
    await speak(ask, words_of(words)[:1])
    await stream.goaway(_ALL_STREAMS)
    await ask.gate()
    await stream.goaway(stream.stream_id)
    await speak(ask, words_of(words)[1:])
    await conclude(ask)


async def goaway_refuse(ask: Exchange) -> None:
    """GOAWAY that says that this stream was not looked at, nor those above it. Those below go on."""
    stream = _h2(ask)
    await stream.goaway(max(stream.stream_id - 2, 0))


async def goaway_error(ask: Exchange, *, code: str = "INTERNAL_ERROR", words: int = 0) -> None:
    """After so many words GOAWAY with that code, although this stream was looked at, and the connection's end."""
    stream = _h2(ask)
    if words:
        await begin(ask)
        await speak(ask, words_of(words))
    await stream.goaway(stream.stream_id, ErrorCodes[code])
    ask.hang_up()


async def silent_goaway(ask: Exchange, *, words: int = 5) -> None:
    """A whole answer, and GOAWAY behind it, on a connection that stays open."""
    await ok(ask, words=words)
    stream = _h2(ask)
    await stream.goaway(stream.stream_id)
    await ask.forever()


async def few_streams(ask: Exchange, *, limit: int = 1, words: int = 5) -> None:
    """From now on SETTINGS_MAX_CONCURRENT_STREAMS is `limit`. Past the gate the answer."""
    _h2(ask).connection.limit_streams(limit)
    await ask.gate()
    await ok(ask, words=words)


async def flow_violation(ask: Exchange) -> None:
    """More than the window allows, by one byte."""
    stream = _h2(ask)
    await ask.head()
    left = stream.window + 1
    while left:
        size = min(left, stream.h2.max_outbound_frame_size)
        await stream.frame(DataFrame(stream.stream_id, b":" + b" " * (size - 2) + b"\n" if size > 1 else b"\n"))
        left -= size
    await ask.forever()


async def window_overflow(ask: Exchange) -> None:
    """WINDOW_UPDATEs that take the connection's window beyond 2^31-1."""
    for _ in range(2):
        await _h2(ask).frame(WindowUpdateFrame(0, window_increment=2**31 - 1))
    await ask.forever()


async def padding(ask: Exchange, *, words: int = 5, size: int = 255) -> None:
    """So many bytes of padding in every DATA frame."""
    _h2(ask).padding = size
    await ok(ask, words=words)


async def no_ping_answer(ask: Exchange, *, words: int = 2) -> None:
    """So many words, then nothing more, and no acknowledgement of a PING either: the server hangs."""
    _h2(ask).connection.answer_pings = False
    if words:
        await begin(ask)
        await speak(ask, words_of(words))
    await ask.forever()


async def server_ping(ask: Exchange, *, words: int = 5) -> None:
    """A PING of ours before the answer; see `Connection.ping_acks`."""
    stream = _h2(ask)
    stream.h2.ping(b"fake api")
    stream.connection.flush()
    await ok(ask, words=words)


async def unknown_frame(ask: Exchange, *, words: int = 5) -> None:
    """Frames of a type that nobody knows, which are to be ignored (RFC 9113, 4.1), and the answer."""
    await ask.raw(b"\x00\x00\x04\xbb\x00\x00\x00\x00\x00abcd")
    await ok(ask, words=words)


async def bad_frame(ask: Exchange) -> None:
    """A PING of the wrong length."""
    _h2(ask)
    await ask.raw(b"\x00\x00\x03\x06\x00\x00\x00\x00\x00abc")
    await ask.forever()


async def oversized_frame(ask: Exchange) -> None:
    """A DATA frame above the peer's SETTINGS_MAX_FRAME_SIZE."""
    stream = _h2(ask)
    await ask.head()
    size = stream.h2.max_outbound_frame_size + 1
    await stream.frame(DataFrame(stream.stream_id, b" " * size))
    await ask.forever()


async def data_before_headers(ask: Exchange) -> None:
    """A body before the head."""
    stream = _h2(ask)
    await stream.frame(DataFrame(stream.stream_id, body(ask, 5)))
    await ask.forever()


async def frame_on_idle_stream(ask: Exchange) -> None:
    """DATA on a stream that nobody opened."""
    stream = _h2(ask)
    await stream.frame(DataFrame(stream.stream_id + 100, b"data: {}\n\n"))
    await ask.forever()


async def end_on_headers(ask: Exchange, *, code: int = 200) -> None:
    """END_STREAM on HEADERS: an answer without a body, but with a content type."""
    await _h2(ask).head(code, last=True)


async def end_on_data(ask: Exchange, *, words: int = 5) -> None:
    """END_STREAM on the last event's DATA frame, instead of an empty one."""
    stream = _h2(ask)
    await begin(ask)
    await speak(ask, words_of(words))
    say = ask.dialect
    await stream.send(ask.encode(*say.finish(), *say.closing()), last=True)


def _h2(ask: Exchange) -> Http2Exchange:
    assert isinstance(ask, Http2Exchange), "a pattern for HTTP/2"
    return ask
