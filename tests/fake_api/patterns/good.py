"""Good answers, in every form in which real APIs give them."""

from dataclasses import replace

from tests.fake_api.dialects import words as words_of
from tests.fake_api.exchange import Exchange, Fields
from tests.fake_api.http1 import Http1Exchange
from tests.fake_api.patterns.parts import begin, body, conclude, speak
from tests.fake_api.wire import Event

__all__ = [
    "comment",
    "connection_close",
    "cr",
    "crlf",
    "informational",
    "known_length",
    "multi_line",
    "no_space",
    "odd_fields",
    "ok",
    "one_write",
    "reasoning",
    "tool_calls",
    "trailers",
    "until_close",
]


async def ok(ask: Exchange, *, words: int = 5, delay: float = 0, reason: str = "") -> None:
    """So many words, `delay` seconds before each; `reason` is the finish reason, if not the ordinary one."""
    await begin(ask)
    await speak(ask, words_of(words), delay)
    await conclude(ask, reason)


async def one_write(ask: Exchange, *, words: int = 5) -> None:
    """The whole body at once."""
    await ask.head()
    await ask.send(body(ask, words))
    await ask.end()


async def reasoning(ask: Exchange, *, words: int = 5, key: str = "reasoning_content") -> None:
    """Thoughts before the words; under this `key` (or "reasoning") where the API has no standard for it."""
    await begin(ask)
    for thought in ("Let me ", "think."):
        await ask.say(*ask.dialect.reasoning(thought, key))
    await speak(ask, words_of(words))
    await conclude(ask)


async def tool_calls(ask: Exchange, *, words: int = 1) -> None:
    """Words, and then the call of a tool, in pieces."""
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.say(*ask.dialect.tool_call())
    await conclude(ask, "tool_calls" if ask.seen.path.endswith("/completions") else "tool_use")


async def comment(ask: Exchange, *, words: int = 5) -> None:
    """Comments at the start and between events, as OpenRouter sends them."""
    await ask.head()
    remark = ask.spelling.comment("OPENROUTER PROCESSING")
    await ask.send(remark + remark)
    await ask.say(*ask.dialect.opening())
    for word in words_of(words):
        await speak(ask, [word])
        await ask.send(remark)
    await conclude(ask)


async def crlf(ask: Exchange, *, words: int = 5) -> None:
    """Lines that end with CRLF."""
    ask.spelling = replace(ask.spelling, line_end="\r\n")
    await ok(ask, words=words)


async def cr(ask: Exchange, *, words: int = 5) -> None:
    """Lines that end with CR."""
    ask.spelling = replace(ask.spelling, line_end="\r")
    await ok(ask, words=words)


async def no_space(ask: Exchange, *, words: int = 5) -> None:
    """`data:{…}` without a space."""
    ask.spelling = replace(ask.spelling, space=False)
    await ok(ask, words=words)


async def multi_line(ask: Exchange, *, words: int = 5) -> None:
    """Each JSON over several data lines, broken where a line may be."""
    await begin(ask)
    for word in words_of(words):
        for event in ask.dialect.text(word):
            await ask.say(Event(event.data.replace('{"', '{\n"'), event.name, event.id))
    await conclude(ask)


async def odd_fields(ask: Exchange, *, words: int = 5) -> None:
    """A byte order mark first, and between the events fields without meaning, and events without data."""
    await ask.head()
    await ask.send(b"\xef\xbb\xbfretry: 3000\n\n")
    await ask.say(*ask.dialect.opening())
    for word in words_of(words):
        await ask.send(b"id\nevent: nothing\n\nfoo: bar\ndatum: 1\n\n\n")
        await speak(ask, [word])
    await conclude(ask)


async def known_length(ask: Exchange, *, words: int = 5) -> None:
    """A body with a true content-length."""
    await ask.whole(200, "text/event-stream", body(ask, words))


async def connection_close(ask: Exchange, *, words: int = 5) -> None:
    """HTTP/1.1: `Connection: close`, and it is."""
    if isinstance(ask, Http1Exchange):
        ask.keep_alive = False
    await ok(ask, words=words)


async def until_close(ask: Exchange, *, words: int = 5) -> None:
    """HTTP/1.1: neither length nor chunks; the body ends with the connection."""
    if isinstance(ask, Http1Exchange):
        ask.until_close = True
    await ok(ask, words=words)


async def informational(ask: Exchange, *, words: int = 5, gated: int = 0) -> None:
    """100 (HTTP/1.1 only) and 103 before the answer; `gated=1`: the gate between."""
    if isinstance(ask, Http1Exchange):
        await ask.inform(100)
    await ask.inform(103, [("link", "</style.css>; rel=preload")])
    if gated:
        await ask.gate()
    await ok(ask, words=words)


async def trailers(ask: Exchange, *, words: int = 5) -> None:
    """Fields behind the body."""
    fields: Fields = [("x-checksum", "none")]
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.say(*ask.dialect.finish(), *ask.dialect.closing())
    await ask.end(fields)
