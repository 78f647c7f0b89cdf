"""Handlers of every kind, good and bad. What happens in them they say in the file that the handoff's data names."""

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from forkd.handler import Handoff, event

started = threading.Event()


def tell(handoff: Handoff, text: str) -> None:
    """Leave word for the test."""
    with open(handoff.data["trace"], "a") as trace:
        trace.write(f"{text}\n")


def shows(handoff: Handoff) -> Iterator[Any]:
    """All that may be yielded, and all that is given."""
    yield event("tool_call", {"name": "search", "lines": "a\nb"})
    yield "text, "
    yield ""
    snowman = "☃".encode()
    yield snowman[:1]
    yield memoryview(snowman[1:])
    yield b" cut \xff" + snowman[:2]
    request = handoff.request
    yield event(
        "given",
        {
            "prompt": handoff.prompt,
            "own": handoff.data.get("own"),
            "raw": len(handoff.raw),
            "user": handoff.user_id,
            "id": handoff.request_id,
            "backend": handoff.backend,
            "request": [request.method, request.uri, request.remote_addr, dict(request.headers)],
        },
    )


async def shows_async(handoff: Handoff) -> AsyncIterator[Any]:
    """The same."""
    for piece in shows(handoff):
        await asyncio.sleep(0)
        yield piece


def counts(handoff: Handoff) -> Iterator[str]:
    """Many large pieces, as fast as they are taken."""
    try:
        for number in range(handoff.data["pieces"]):
            yield f"{number} {'x' * 1000} "
            if number % 100 == 0:
                tell(handoff, f"at {number}")
        tell(handoff, "to the end")
    except GeneratorExit:
        tell(handoff, "GeneratorExit")
        raise
    finally:
        tell(handoff, "finally")


async def counts_async(handoff: Handoff) -> AsyncIterator[str]:
    """The same, without ever waiting for anything."""
    try:
        for piece in range(handoff.data["pieces"]):
            yield f"{piece} {'x' * 1000} "
            if piece % 100 == 0:
                tell(handoff, f"at {piece}")
        tell(handoff, "to the end")
    except GeneratorExit:
        tell(handoff, "GeneratorExit")
        raise
    finally:
        tell(handoff, "finally")


def waits(handoff: Handoff) -> Iterator[str]:
    """Says a word, and works on until nobody listens."""
    try:
        yield "word"
        tell(handoff, "begun")
        while not handoff.gone:
            time.sleep(0.01)
        yield "nobody hears this"
    finally:
        tell(handoff, "finally")


async def waits_async(handoff: Handoff) -> AsyncIterator[str]:
    """Says a word, and waits for what never comes."""
    try:
        yield "word"
        tell(handoff, "begun")
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        tell(handoff, "CancelledError")
        raise
    finally:
        await asyncio.sleep(0)
        tell(handoff, "finally")


def broken(handoff: Handoff) -> Iterator[Any]:
    """Goes wrong in the way it is told."""
    way = handoff.data["way"]
    if way == "at once":
        raise ValueError("a secret of the handler's")
    yield "word"
    if way == "in the middle":
        raise ValueError("a secret of the handler's")
    if way == "exits":
        raise SystemExit(3)
    if way == "a number":
        yield 42
    if way == "a surrogate":
        yield "\ud800"
    if way == "forkd's own event":
        yield event("done", {})
    if way == "ignores the end":
        try:
            yield 42
        finally:
            yield "still here"
    if way == "dies":
        os._exit(7)


async def broken_async(handoff: Handoff) -> AsyncIterator[Any]:
    """The same."""
    if handoff.data["way"] == "ends the loop":
        asyncio.get_running_loop().call_soon(leaves)
        yield "word"
        await asyncio.sleep(60)
    for piece in broken(handoff):
        yield piece


def leaves() -> None:
    raise SystemExit(3)


def silent(handoff: Handoff) -> Iterator[str]:
    """Never yields, until the test lets it."""
    while not os.path.exists(handoff.data["until"]):
        time.sleep(0.01)
    yield "late"


async def silent_async(handoff: Handoff) -> AsyncIterator[str]:
    """Blocks its whole loop, until the test lets it."""
    yield "word"
    for _ in silent(handoff):
        yield "late"


def collects(handoff: Handoff) -> Iterator[str]:
    """Whether Python collects its garbage as it is used to."""
    yield str(gc.isenabled())


def computes(handoff: Handoff) -> Iterator[str]:
    """Never waits for anything, and has no end until the test lets it."""
    yield "word"
    while not os.path.exists(handoff.data["until"]):
        sum(range(100_000))
    yield " of wisdom"


def empty(handoff: Handoff) -> Iterator[str]:
    """Has nothing to say."""
    yield from ()


def leaks(handoff: Handoff) -> Iterator[str]:
    """Leaves a thread behind that never ends, and that no daemon would wait for."""
    threading.Thread(target=threading.Event().wait).start()
    yield "word"


def writes(handoff: Handoff) -> Iterator[str]:
    """Into the log."""
    logging.getLogger("zoo").warning("seen %s", "the log")
    yield "word"


class Callable:
    """An object that is called."""

    def __call__(self, handoff: Handoff) -> Iterator[str]:
        yield "object"


thing = Callable()


def not_a_generator(handoff: Handoff) -> str:
    return "text"


async def not_a_generator_either(handoff: Handoff) -> str:
    return "text"


def lies(handoff: Handoff) -> Any:
    """Looks like a generator function, and returns a list."""
    return ["text"]


lies.__wrapped__ = shows  # type: ignore[attr-defined]
