"""Good answers at a bad pace. Those that wait, wait at the API's gate."""

import asyncio

from tests.fake_api.dialects import words as words_of
from tests.fake_api.exchange import Exchange
from tests.fake_api.patterns.good import ok
from tests.fake_api.patterns.parts import begin, body, conclude, speak

__all__ = [
    "drip",
    "flood",
    "gate_body",
    "gate_end",
    "gate_headers",
    "gate_tokens",
    "silence",
    "silence_after",
    "split_utf8",
    "trickle",
]


async def gate_headers(ask: Exchange, *, words: int = 5) -> None:
    """Not even a head until the gate opens."""
    await ask.gate()
    await ok(ask, words=words)


async def gate_body(ask: Exchange, *, words: int = 5) -> None:
    """The head at once, the rest when the gate opens."""
    await ask.head()
    await ask.gate()
    await ask.say(*ask.dialect.opening())
    await speak(ask, words_of(words))
    await conclude(ask)


async def gate_tokens(ask: Exchange, *, words: int = 5) -> None:
    """The gate before each word."""
    await begin(ask)
    for word in words_of(words):
        await ask.gate()
        await speak(ask, [word])
    await conclude(ask)


async def gate_end(ask: Exchange, *, words: int = 5) -> None:
    """The gate after the last word, and again between all events and the body's end."""
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.gate()
    await ask.say(*ask.dialect.finish(), *ask.dialect.closing())
    await ask.gate()
    await ask.end()


async def silence(ask: Exchange) -> None:
    """No answer at all."""
    await ask.forever()


async def silence_after(ask: Exchange, *, words: int = 2) -> None:
    """So many words and then nothing more."""
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.forever()


async def trickle(ask: Exchange, *, words: int = 5, size: int = 1, delay: float = 0) -> None:
    """The body in pieces of `size` bytes, each a chunk or DATA frame of its own."""
    await ask.head()
    whole = body(ask, words)
    for start in range(0, len(whole), size):
        await ask.send(whole[start : start + size])
        await asyncio.sleep(delay)
    await ask.end()


async def drip(ask: Exchange, *, words: int = 5) -> None:
    """The connection's own bytes one by one: heads, chunk sizes, frames, TLS records of one byte. It stays so."""
    ask.pipe.drip()
    await ok(ask, words=words)


async def split_utf8(ask: Exchange, *, words: int = 5) -> None:
    """Cut in the middle of the first character that has more than one byte, and the gate there."""
    await ask.head()
    whole = body(ask, words)
    middle = next(place for place, number in enumerate(whole) if number > 0x7F) + 1
    await ask.send(whole[:middle])
    await ask.gate()
    await ask.send(whole[middle:])
    await ask.end()


async def flood(ask: Exchange, *, size: int = 10_000_000, word_size: int = 1000) -> None:
    """So many bytes of text as fast as they are taken; see `Seen.body_sent` and `Seen.stalled_since`."""
    await begin(ask)
    for _ in range(size // word_size):
        await speak(ask, ["x" * (word_size - 1) + " "])
    await conclude(ask)
