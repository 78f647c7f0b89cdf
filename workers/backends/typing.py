"""The typing backend: an answer that arrives as if somebody typed it, in pieces of uneven length at an uneven pace."""

import random
import re
from collections.abc import Iterator

from workers.backends.base import PacedBackend
from workers.request import HandoffData

_PIECES = re.compile(r"\s*\S{1,4}")


class TypingBackend(PacedBackend):
    """Sends pieces of up to four characters, `delay_secs` apart give or take `jitter` (a fraction of it).

    With a prompt it types the prompt back, without one `text`. The pause after a sentence is four times as long.
    """

    def __init__(self, name: str, text: str, delay_secs: float, jitter: float) -> None:
        super().__init__(name)
        self._text = text
        self._delay = delay_secs
        self._jitter = jitter

    def steps(self, data: HandoffData) -> Iterator[tuple[float, str]]:
        """Each stream has a pace of its own."""
        delay = 0.0
        # A run of spaces with nothing behind it would be tried at every split: there is none without trailing space.
        for match in _PIECES.finditer((data.prompt or self._text).rstrip()):
            piece = match[0]
            yield delay, piece
            delay = self._delay * random.uniform(1 - self._jitter, 1 + self._jitter)
            if piece[-1] in ".!?":
                delay *= 4
