"""A 200 whose events are not as they should be, or not as one would think."""

import json
from typing import Any

from tests.fake_api.dialects import OpenAI
from tests.fake_api.dialects import words as words_of
from tests.fake_api.exchange import Exchange
from tests.fake_api.patterns.parts import begin, conclude, speak
from tests.fake_api.wire import Event

__all__ = [
    "bad_json_event",
    "bad_utf8_event",
    "empty_body",
    "error_event",
    "error_object",
    "html_200",
    "huge_event",
    "json_200",
    "json_error_200",
    "no_done",
    "no_finish",
    "null_content",
    "other_json_event",
    "truncated",
    "usage_only_at_end",
]


async def bad_json_event(ask: Exchange, *, words: int = 4) -> None:
    """One event in the middle whose JSON is cut off."""
    await _with_one(ask, words, b'data: {"choices":[{"delta":{"content":"lost\n\n')


async def bad_utf8_event(ask: Exchange, *, words: int = 4) -> None:
    """One event in the middle whose JSON has bytes that are no UTF-8."""
    await _with_one(ask, words, ask.encode(*ask.dialect.text("lost LOST")).replace(b"LOST", b"\xff\xc3("))


async def other_json_event(ask: Exchange, *, words: int = 4, data: str = "[1]") -> None:
    """One event in the middle whose data is JSON of another kind: an array, a number, {} (no spaces)."""
    await _with_one(ask, words, ask.encode(Event(data)))


async def huge_event(ask: Exchange, *, size: int = 10_000_000) -> None:
    """One event with so many characters of text."""
    await begin(ask)
    await speak(ask, ["x" * size])
    await conclude(ask)


async def error_event(ask: Exchange, *, words: int = 2, kind: str = "server_error", more: int = 0) -> None:
    """`{"error":…}` (or the API's own way to say it) after so many words; with `more=1` the answer goes on."""
    await _with_error(ask, words, ask.dialect.failure(kind, f"said by the fake API: {kind}"), more)


async def error_object(ask: Exchange, *, words: int = 2, more: int = 0) -> None:
    """`{"object":"error"}` after so many words, as vLLM says it."""
    said = {"object": "error", "message": "said by the fake API", "type": "BadRequestError", "code": 400}
    await _with_error(ask, words, Event(json.dumps(said)), more)


async def no_done(ask: Exchange, *, words: int = 5) -> None:
    """A finish reason, but no [DONE] (message_stop, end)."""
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.say(*ask.dialect.finish())
    await ask.end()


async def no_finish(ask: Exchange, *, words: int = 5) -> None:
    """[DONE] (message_stop, end), but no finish reason."""
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.say(*ask.dialect.closing())
    await ask.end()


async def truncated(ask: Exchange, *, words: int = 5) -> None:
    """Neither: the body ends as if it were whole."""
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.end()


async def empty_body(ask: Exchange) -> None:
    """A head and no event."""
    await ask.head()
    await ask.end()


async def null_content(ask: Exchange, *, words: int = 4) -> None:
    """Chat Completions: between the words deltas whose content is null, absent, a list of parts, or that have no
    delta, an empty `choices`, or none at all. The lists' text belongs to the answer: " list".
    """
    assert isinstance(ask.dialect, OpenAI), "a pattern for Chat Completions"
    odd: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": None}}]},
        {"choices": [{"index": 0, "delta": {}}]},
        {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": " list"}]}}]},
        {"choices": [{"index": 0, "delta": None}]},
        {"choices": [{"index": 0}]},
        {"choices": []},
        {"choices": None},
        {"id": "chatcmpl-fake"},
    ]
    await begin(ask)
    await speak(ask, words_of(words))
    for chunk in odd:
        await ask.say(Event(json.dumps(chunk)))
    await conclude(ask)


async def usage_only_at_end(ask: Exchange, *, words: int = 5) -> None:
    """Chat Completions: a usage chunk with empty `choices`, asked for or not, behind the finish reason."""
    assert isinstance(ask.dialect, OpenAI), "a pattern for Chat Completions"
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.say(ask.dialect.chunk({}, "stop"), ask.dialect.usage(), *ask.dialect.closing())
    await ask.end()


async def html_200(ask: Exchange) -> None:
    """A page, as from a captive portal."""
    await ask.whole(200, "text/html", b"<!doctype html><title>Welcome</title>")


async def json_200(ask: Exchange, *, words: int = 5) -> None:
    """The whole answer as one JSON document: the server does not stream."""
    answer = "".join(words_of(words))
    await ask.whole(200, "application/json", json.dumps(ask.dialect.whole(answer)).encode())


async def json_error_200(ask: Exchange) -> None:
    """An error as JSON, under a 200."""
    said = ask.dialect.error(500, "server_error", "said by the fake API")
    await ask.whole(200, "application/json", json.dumps(said).encode())


async def _with_one(ask: Exchange, words: int, event: bytes) -> None:
    """A good answer with this in its middle."""
    pieces = words_of(words)
    await begin(ask)
    await speak(ask, pieces[: words // 2])
    await ask.send(event)
    await speak(ask, pieces[words // 2 :])
    await conclude(ask)


async def _with_error(ask: Exchange, words: int, event: Event, more: int) -> None:
    await begin(ask)
    await speak(ask, words_of(words))
    await ask.say(event)
    if more:
        await speak(ask, words_of(words))
        await conclude(ask)
    else:
        await ask.end()
