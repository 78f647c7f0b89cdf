"""The mock backend: a canned answer, word by word, for trying things out and for the benchmark."""

from collections.abc import Iterator

from workers.backends.base import PacedBackend
from workers.request import HandoffData


class MockBackend(PacedBackend):
    """Sends each word of `text` after `token_delay_secs`, the first at once, and ends one delay after the last."""

    def __init__(self, name: str, text: str, token_delay_secs: float) -> None:
        super().__init__(name)
        words = [word + " " for word in text.split()]
        if words:
            words[-1] = words[-1].rstrip()
        delays = [0.0] + [token_delay_secs] * len(words)
        self._steps = tuple(zip(delays, [*words, ""], strict=True))

    def steps(self, data: HandoffData) -> Iterator[tuple[float, str]]:
        """All streams walk the same tuple: an iterator over it is all the memory one takes."""
        return iter(self._steps)
