"""The handlers that the backends `python` and `python-async` are measured with: the mock backend's words and pace."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

from forkd.handler import Handoff
from said import DELAY_SECS, WORDS

_PIECES = [*(f"{word} " for word in WORDS[:-1]), WORDS[-1]]
_TRIAL_SECS = 0.001


def say(handoff: Handoff) -> Iterator[str]:
    """In a thread."""
    delay = _TRIAL_SECS if handoff.backend == "trial" else DELAY_SECS
    for piece in _PIECES:
        yield piece
        time.sleep(delay)


async def say_async(handoff: Handoff) -> AsyncIterator[str]:
    """On the asyncio loop."""
    delay = _TRIAL_SECS if handoff.backend == "trial" else DELAY_SECS
    for piece in _PIECES:
        yield piece
        await asyncio.sleep(delay)
