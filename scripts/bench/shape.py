"""What a run asks of a daemon: how many streams, how fast, and what each of them says."""

from dataclasses import dataclass
from math import ceil
from typing import Final

# As long as the text in floor.c's events, so that both daemons send the same number of bytes per event.
WORD_CHARS = 41


@dataclass(frozen=True, slots=True)
class Shape:
    """The load of one run. A stream lasts `events * delay_ms`: the end comes one delay after the last event."""

    streams: int
    over_secs: float
    events: int
    delay_ms: float
    tcp: bool = False
    persistent: bool = False  # one connection for all handoffs

    @property
    def stream_secs(self) -> float:
        """How long one stream lasts, first byte to last, at a daemon that is never late."""
        return self.events * self.delay_ms / 1000

    @property
    def words(self) -> list[str]:
        """One word per event."""
        return numbered_words(self.events)

    def __str__(self) -> str:
        clients = "loopback TCP" if self.tcp else "AF_UNIX"
        return (
            f"{self.streams} streams over {self.over_secs:g} s, "
            f"{self.events} events {self.delay_ms:g} ms apart, {clients} clients"
            f"{', one connection for all handoffs' if self.persistent else ''}"
        )


def numbered_words(count: int) -> list[str]:
    """Words as long as floor's text, numbered, so that a stream whose events change places is noticed."""
    filler = "abcdefghijklmnopqrstuvwxyz-0123456789"
    return [f"{number:04d}-{filler}"[:WORD_CHARS] for number in range(count)]


DEFAULT: Final = Shape(streams=5000, over_secs=5, events=18, delay_ms=500)
QUICK: Final = Shape(streams=500, over_secs=0.5, events=6, delay_ms=200)


def shape_for_live(streams: int, delay_ms: float) -> Shape:
    """A load under which all `streams` are alive at once for at least 5 s, handed over at 1000 a second."""
    over_secs = streams / 1000
    return Shape(streams, over_secs, ceil((over_secs + 5) * 1000 / delay_ms), delay_ms)
