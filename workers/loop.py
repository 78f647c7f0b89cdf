"""One selectors loop with coarse timers.

Readiness: an object registered with the selector has `on_ready(mask)`. Several events come from one select, and a
callback may close the fd of a later one, so `on_ready` of a closed object must do nothing.

Time: deadlines are whole ticks of 10 ms, and all that is due at a tick waits in one list (a bucket), so that streams
go out in batches: adding is an append, expiring is a walk over a list, and the only heap holds distinct ticks, not
deadlines. Nothing is ever cancelled: whoever no longer cares returns at once when its callback comes up. Deadlines far
away therefore re-check every second or two rather than pin a dead object until they are due.

Errors: an exception that leaves a callback is a bug; it is given to the object it belongs to (`crashed`), which ends
its own stream, and the loop goes on.
"""

import selectors
import time
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final, Protocol

TICKS_PER_SEC: Final = 100
TICK_SECS: Final = 1 / TICKS_PER_SEC
LONGEST_SLEEP_SECS: Final = 0.5
"""A worker must show that it lives at least once a second."""


class Ready(Protocol):
    """What may be registered with the loop's selector."""

    def on_ready(self, mask: int) -> None:
        """The fd is readable (selectors.EVENT_READ), writable (EVENT_WRITE), or both."""

    def crashed(self, error: Exception) -> None:
        """A callback of this object raised `error`."""


class Loop:
    """The loop. `now` is monotonic time in seconds and `tick` the same in ticks, both as of this turn."""

    __slots__ = ("_buckets", "_ticks", "now", "selector", "tick")

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._buckets: dict[int, list[Callable[[], None]]] = {}
        self._ticks: list[int] = []
        self.now = time.monotonic()
        self.tick = int(self.now * TICKS_PER_SEC)

    def after(self, ticks: int, callback: Callable[[], None]) -> None:
        """Call a bound method of an object that has `crashed` after so many ticks, at least one."""
        due = self.tick + (ticks if ticks > 0 else 1)
        bucket = self._buckets.get(due)
        if bucket is None:
            self._buckets[due] = [callback]
            heappush(self._ticks, due)
        else:
            bucket.append(callback)

    def turn(self) -> None:
        """Wait for the next event or deadline, and serve all that is there."""
        timeout = LONGEST_SLEEP_SECS
        if self._ticks:
            timeout = min(timeout, max(0.0, self._ticks[0] * TICK_SECS - time.monotonic()))
        events = self.selector.select(timeout)
        now = self.now = time.monotonic()
        tick = self.tick = int(now * TICKS_PER_SEC)
        for key, mask in events:
            try:
                key.data.on_ready(mask)
            except Exception as error:
                key.data.crashed(error)
        ticks = self._ticks
        while ticks and ticks[0] <= tick:
            # A late bucket counts its followers from when it was due: a stream's pace does not drift.
            self.tick = heappop(ticks)
            for callback in self._buckets.pop(self.tick):
                try:
                    callback()
                except Exception as error:
                    _owner(callback).crashed(error)
        self.tick = tick


def _owner(callback: Callable[[], None]) -> Any:
    return callback.__self__  # type: ignore[attr-defined]


def to_ticks(secs: float) -> int:
    """The whole ticks nearest to `secs`, at least one."""
    return max(1, int(secs * TICKS_PER_SEC + 0.5))
