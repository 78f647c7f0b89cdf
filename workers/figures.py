"""What a worker says of itself on the board, once a second: memory, CPU, pace, its oldest stream.

All of it is found when it is asked for, so that a stream costs nothing: the worst of it, a look at when each of 15,000
streams began, takes a millisecond.
"""

import time
from collections.abc import Collection
from operator import attrgetter
from typing import Final

from forkd.board import Figures
from forkd.process import Usage
from workers.context import Living

_SHORTEST_SECS: Final = 0.1
"""Over less time than this, a rate says nothing."""
_STARTED_AT: Final = attrgetter("started_at")


class Measure:
    """Remembers the last time, because rates are of the time between two looks."""

    def __init__(self) -> None:
        """Made in the worker, after the fork."""
        self._usage = Usage()
        self._at = time.monotonic()
        self._cpu_secs = self._usage.cpu_secs()
        self._started = 0

    def take(self, started: int, streams: Collection[Living], stuck: int = 0) -> Figures:
        """The figures now. `started` counts the streams so far, `streams` are those that live; `stuck` counts
        handlers.
        """
        now, cpu_secs = time.monotonic(), self._usage.cpu_secs()
        elapsed = now - self._at
        share = 1 / elapsed if elapsed >= _SHORTEST_SECS else 0.0
        figures = Figures(
            rss_bytes=self._usage.rss_bytes(),
            cpu_ms=int(cpu_secs * 1000),
            oldest_ms=int(min(map(_STARTED_AT, streams)) * 1000) if streams else 0,
            cpu_percent=(cpu_secs - self._cpu_secs) * 100 * share,
            streams_per_sec=(started - self._started) * share,
            stuck=stuck,
        )
        self._at, self._cpu_secs, self._started = now, cpu_secs, started
        return figures
