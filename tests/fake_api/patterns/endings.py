"""Connections that end when they should not. Over HTTP/2 the whole connection goes, with all its streams."""

from tests.fake_api.dialects import words as words_of
from tests.fake_api.exchange import Exchange
from tests.fake_api.http1 import Http1Exchange
from tests.fake_api.patterns.good import ok
from tests.fake_api.patterns.parts import begin, body, speak

__all__ = [
    "close_after",
    "close_after_head",
    "close_before_answer",
    "cut_after",
    "cut_after_head",
    "cut_before_answer",
    "cut_in_head",
    "cut_in_utf8",
    "stale",
]


async def cut_before_answer(ask: Exchange) -> None:
    """RST instead of an answer."""
    ask.cut()


async def close_before_answer(ask: Exchange) -> None:
    """The end of the file instead of an answer."""
    ask.hang_up()


async def cut_in_head(ask: Exchange) -> None:
    """The end of the file in the middle of the head (HTTP/2: of a frame)."""
    await ask.raw(b"HTTP/1.1 200 OK\r\ncontent-ty" if isinstance(ask, Http1Exchange) else b"\x00\x00\x10\x01")
    ask.hang_up()


async def cut_after_head(ask: Exchange) -> None:
    """RST behind the head."""
    await ask.head()
    await ask.gate()
    ask.cut()


async def close_after_head(ask: Exchange) -> None:
    """The end of the file behind the head."""
    await ask.head()
    ask.hang_up()


async def cut_after(ask: Exchange, *, words: int = 2) -> None:
    """So many words, the gate (an RST destroys what was not yet read), and RST."""
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.gate()
    ask.cut()


async def close_after(ask: Exchange, *, words: int = 2) -> None:
    """So many words, and the end of the file, without the last chunk or END_STREAM."""
    await begin(ask)
    await speak(ask, words_of(words))
    ask.hang_up()


async def cut_in_utf8(ask: Exchange) -> None:
    """The end of the file in the middle of a character of a word."""
    await ask.head()
    whole = body(ask, 5)
    await ask.send(whole[: next(place for place, number in enumerate(whole) if number > 0x7F) + 1])
    ask.hang_up()


async def stale(ask: Exchange, *, words: int = 5) -> None:
    """A good answer, and the connection is closed behind it without a word."""
    await ok(ask, words=words)
    if isinstance(ask, Http1Exchange):
        ask.close_after = True
    else:
        ask.hang_up()
