"""One selectors loop with coarse timers.

Readiness: an object registered with the selector (`forkd.selector`) has `on_ready(mask)`. A busy loop lets tokens
gather for a moment before it looks again (`forkd.moderation`); what must not wait so long, a new client, ends the pause
(`hurry`).

Time: deadlines are whole ticks of 10 ms, and all that is due at a tick waits in one list (a bucket), so that streams
go out in batches: adding is an append, expiring is a walk over a list, and the only heap holds distinct ticks, not
deadlines. Nothing is ever cancelled: whoever no longer cares returns at once when its callback comes up. Deadlines far
away therefore re-check every second or two rather than pin a dead object until they are due.

Writing: what a turn has for its clients may be gathered (`queued`) and go out at the turn's end, one after the other.
Between two writes that follow each other at once neither the kernel's nor the interpreter's code leaves the caches,
and whoever reads them is woken once and not for each.

Errors: an exception that leaves `on_ready` or `tick` is a bug; it is given to the object that raised it (`crashed`),
which ends its own stream, and the loop goes on.
"""

import select
import time
from heapq import heappop, heappush
from typing import Final, Protocol

from forkd.moderation import Moderation
from forkd.selector import EVENTS_MAX, Selector

TICKS_PER_SEC: Final = 100
TICK_SECS: Final = 1 / TICKS_PER_SEC
PAUSE_SECS = 0.002
"""Not Final: `scripts/bench/paused_forkd.py` tries others, and what is Final is part of compiled code."""
LONGEST_SLEEP_SECS: Final = 0.5
"""A worker must show that it lives at least once a second."""


class Timed(Protocol):
    """What may be given to `Loop.after`."""

    def tick(self) -> None:
        """The time is up."""

    def crashed(self, error: Exception) -> None:
        """`tick`, or `on_ready`, raised `error`."""


class Queued(Protocol):
    """What may be put into `Loop.queued`."""

    def flush(self) -> None:
        """The turn is at its end."""

    def crashed(self, error: Exception) -> None:
        """`flush` raised `error`."""


class Ready(Protocol):
    """What may be registered with the loop's selector."""

    def on_ready(self, mask: int) -> None:
        """The fd is readable (selectors.EVENT_READ), writable (EVENT_WRITE), or both; and see `forkd.selector.EDGE`."""

    def crashed(self, error: Exception) -> None:
        """`on_ready` raised `error`."""


class Loop:
    """The loop. `now` is monotonic time in seconds and `at` the same in ticks, both as of this turn. `queued` is what
    is to be flushed at its end.
    """

    __slots__ = ("_buckets", "_due", "_moderation", "_urgent", "at", "now", "queued", "selector")

    def __init__(self) -> None:
        self.selector: Selector[Ready] = Selector(_crashed)
        self._buckets: dict[int, list[Timed]] = {}
        self._due: list[int] = []
        self._urgent = select.epoll()
        self._moderation = Moderation(PAUSE_SECS, self._sleep)
        self.queued: list[Queued] = []
        self.now = time.monotonic()
        self.at = int(self.now * TICKS_PER_SEC)

    def hurry(self, fd: int) -> None:
        """Look at once, even when busy, when `fd`, which the selector watches too, is readable."""
        self._urgent.register(fd, select.EPOLLIN)

    def hurry_no_more(self, fd: int) -> None:
        """Take back `hurry`. Before the fd is closed."""
        self._urgent.unregister(fd)

    def close(self) -> None:
        """Give its own fds back."""
        self.selector.close()
        self._urgent.close()

    def _sleep(self, secs: float) -> None:
        self._urgent.poll(secs, 1)

    def after(self, ticks: int, timed: Timed) -> None:
        """Call `timed.tick` after so many ticks, at least one."""
        due = self.at + (ticks if ticks > 0 else 1)
        bucket = self._buckets.get(due)
        if bucket is None:
            self._buckets[due] = [timed]
            heappush(self._due, due)
        else:
            bucket.append(timed)

    def turn(self) -> None:
        """Wait for the next event or deadline, and serve all that is there."""
        due = self._due
        self._moderation.pause()
        looked = time.monotonic()
        timeout = min(LONGEST_SLEEP_SECS, max(0.0, due[0] * TICK_SECS - looked)) if due else LONGEST_SLEEP_SECS
        events = self.selector.select(timeout)
        now = self.now = time.monotonic()
        at = self.at = int(now * TICKS_PER_SEC)
        self._moderation.looked(now, len(events), len(events) == EVENTS_MAX)
        self.selector.serve(events)
        while due and due[0] <= at:
            # A late bucket counts its followers from when it was due: a stream's pace does not drift.
            self.at = heappop(due)
            for timed in self._buckets.pop(self.at):
                try:
                    timed.tick()
                except Exception as error:
                    timed.crashed(error)
        self.at = at
        if self.queued:
            queued, self.queued = self.queued, []
            for one in queued:
                try:
                    one.flush()
                except Exception as error:
                    one.crashed(error)


def _crashed(ready: Ready, error: Exception) -> None:
    ready.crashed(error)


def to_ticks(secs: float) -> int:
    """The whole ticks nearest to `secs`, at least one."""
    return max(1, int(secs * TICKS_PER_SEC + 0.5))
