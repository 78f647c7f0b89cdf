"""The parts of a good answer, from which patterns are made."""

import asyncio

from tests.fake_api.dialects import words
from tests.fake_api.exchange import Exchange


async def begin(ask: Exchange) -> None:
    """The head, and what the API says before the first word."""
    await ask.head()
    await ask.say(*ask.dialect.opening())


async def speak(ask: Exchange, pieces: list[str], delay: float = 0) -> None:
    """These pieces of text, each sent by itself, `delay` seconds before each."""
    for piece in pieces:
        if delay:
            await asyncio.sleep(delay)
        await ask.say(*ask.dialect.text(piece))


async def conclude(ask: Exchange, reason: str = "") -> None:
    """The finish reason, the usage, the API's own end, and the body's."""
    await ask.say(*ask.dialect.finish(reason))
    await ask.say(*ask.dialect.closing())
    await ask.end()


def body(ask: Exchange, number: int) -> bytes:
    """The whole good answer of so many words, as bytes."""
    say = ask.dialect
    events = [*say.opening(), *(event for word in words(number) for event in say.text(word))]
    return ask.encode(*events, *say.finish(), *say.closing())
