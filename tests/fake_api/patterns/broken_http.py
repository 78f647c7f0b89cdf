"""Answers that are no HTTP, or bad HTTP. What is a head in HTTP/1.1 is frames in HTTP/2."""

from hyperframe.frame import ContinuationFrame, HeadersFrame

from tests.fake_api.exchange import SSE_FIELDS, Exchange
from tests.fake_api.http1 import Http1Exchange
from tests.fake_api.patterns.parts import begin, body, speak

__all__ = [
    "bad_chunk",
    "bad_status_line",
    "endless_header",
    "garbage",
    "huge_chunk_size",
    "huge_head",
    "length_too_long",
    "length_too_short",
    "two_lengths",
]

_GARBAGE = b"\x00\xff\xfe not any protocol \x80\x81\r\n" * 8
_ALL_HEADERS_FOLLOW = b"\x88"  # HPACK: indexed field 8, ":status: 200"
_FIELD = b"\x00\x01x" + b"\x7f\x81\x07" + b"a" * 1024  # HPACK: literal, not indexed: x, and a value of 1024 characters


async def garbage(ask: Exchange) -> None:
    """Bytes that are no HTTP."""
    await ask.raw(_GARBAGE)
    await ask.forever()


async def bad_status_line(ask: Exchange) -> None:
    """HTTP/1.1 in its form, but not in its words."""
    await ask.raw(b"HTTP/1.1 OK 200\r\ncontent-length: 0\r\n\r\n")
    await ask.forever()


async def endless_header(ask: Exchange) -> None:
    """A head without end, as fast as it is taken."""
    if isinstance(ask, Http1Exchange):
        await ask.raw(b"HTTP/1.1 200 OK\r\nx-endless: ")
        while True:
            await ask.raw(b"a" * 1024)
    await ask.raw(HeadersFrame(ask.seen.stream_id, _ALL_HEADERS_FOLLOW).serialize())
    while True:
        await ask.raw(ContinuationFrame(ask.seen.stream_id, _FIELD).serialize())


async def huge_head(ask: Exchange, *, size: int = 1_000_000) -> None:
    """A head with so many bytes of fields, whole and correct, and a good body."""
    fields = [(f"x-filler-{number}", "a" * 1000) for number in range(size // 1000)]
    await ask.head(200, [*SSE_FIELDS, *fields])
    await ask.send(body(ask, 5))
    await ask.end()


async def length_too_long(ask: Exchange) -> None:
    """A content-length of more than comes, and then the end."""
    whole = body(ask, 5)
    await ask.head(200, [*SSE_FIELDS, ("content-length", str(len(whole) + 1000))])
    await ask.send(whole)
    await ask.end()
    if isinstance(ask, Http1Exchange):
        ask.close_after = True


async def length_too_short(ask: Exchange, *, missing: int = 100) -> None:
    """A content-length of less than comes."""
    whole = body(ask, 5)
    await ask.head(200, [*SSE_FIELDS, ("content-length", str(len(whole) - missing))])
    await ask.send(whole)
    await ask.end()


async def two_lengths(ask: Exchange) -> None:
    """Two content-lengths that differ."""
    await ask.head(200, [*SSE_FIELDS, ("content-length", "10"), ("content-length", "20")])
    await ask.send(b"data: {}\n\n")
    await ask.end()


async def bad_chunk(ask: Exchange) -> None:
    """HTTP/1.1: words, and then a chunk whose size is no number."""
    assert isinstance(ask, Http1Exchange), "a pattern for HTTP/1.1"
    await begin(ask)
    await speak(ask, ["two ", "words "])
    await ask.raw(b"zz\r\ndata: {}\n\n\r\n0\r\n\r\n")
    await ask.forever()


async def huge_chunk_size(ask: Exchange) -> None:
    """HTTP/1.1: words, and then a chunk whose size is beyond 64 bits."""
    assert isinstance(ask, Http1Exchange), "a pattern for HTTP/1.1"
    await begin(ask)
    await speak(ask, ["two ", "words "])
    await ask.raw(b"f" * 20 + b"\r\ndata: {}\n\n")
    await ask.forever()
