"""One selectors loop with coarse timers.

Readiness: an object registered with the selector has `on_ready(mask)`. Several events come from one select, and a
callback may close the fd of a later one, so `on_ready` of a closed object must do nothing.

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
from selectors import EVENT_READ, EVENT_WRITE
from typing import Final, Protocol

from forkd.moderation import Moderation

TICKS_PER_SEC: Final = 100
TICK_SECS: Final = 1 / TICKS_PER_SEC
PAUSE_SECS: Final = 0.001
GAP_SECS: Final = 0.0008
LONGEST_SLEEP_SECS: Final = 0.5
"""A worker must show that it lives at least once a second."""


EVENTS_MAX: Final = 512
"""Taken in by one select. The rest is not lost: epoll(7) brings it next time, and those that were served last."""
_IN: Final = int(select.EPOLLIN)
_OUT: Final = int(select.EPOLLOUT)
_EPOLL: Final = (0, _IN, _OUT, _IN | _OUT)
"""By selectors.EVENT_READ (1) and EVENT_WRITE (2)."""
_HANGUP: Final = int(select.EPOLLRDHUP)
_SPARE: Final = 256
"""The list grows by so many at a time."""


class Selector:
    """The selectors loop's selector, for tens of thousands of fds: epoll(7), with what is registered in a list by fd.

    `selectors.EpollSelector` keeps a key beside each object and makes room for all of them at each select: more memory
    for each stream, and more of it to go through for each event.
    """

    __slots__ = ("_epoll", "_events", "_registered")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._registered: list[Ready | None] = []
        self._events: list[int] = []
        """What each is watched for."""

    def register(self, fd: int, events: int, ready: "Ready") -> None:
        """Watch `fd`, the caller's, for selectors.EVENT_READ, EVENT_WRITE or both. OSError: epoll_ctl(2)."""
        self._epoll.register(fd, _EPOLL[events])
        missing = fd + 1 - len(self._registered)
        if missing > 0:
            self._registered += [None] * (missing + _SPARE)
            self._events += [0] * (missing + _SPARE)
        self._registered[fd] = ready
        self._events[fd] = events

    def unregister(self, fd: int) -> None:
        """Watch no more. Before the fd is closed: where another process has it too, the kernel would go on."""
        self._registered[fd] = None
        self._events[fd] = 0
        self._epoll.unregister(fd)

    def watch(self, fd: int, events: int, ready: "Ready") -> None:
        """Watch for just these events from now on, which may be none."""
        before = self._events[fd] if fd < len(self._events) else 0
        if events == before:
            return
        if not events:
            self.unregister(fd)
        elif not before:
            self.register(fd, events, ready)
        else:
            self._epoll.modify(fd, _EPOLL[events])
            self._events[fd] = events

    def select(self, timeout: float) -> list[tuple[int, int]]:
        """Wait. What epoll(7) says, for `serve`."""
        return self._epoll.poll(timeout, EVENTS_MAX)

    def serve(self, found: list[tuple[int, int]]) -> None:
        """Call whoever is ready, with what for."""
        registered = self._registered
        # Looked up before anybody is called: who closes a later one's fd must not have its number answer for another.
        ready = [registered[fd] for fd, _ in found]
        for one, (fd, event) in zip(ready, found, strict=True):
            if one is None:
                continue
            if event == _IN:
                mask = EVENT_READ
            else:  # a hang-up or an error is found out by reading, or by writing
                mask = (EVENT_WRITE if event & ~_IN else 0) | (EVENT_READ if event & ~_OUT else 0)
                mask &= self._events[fd]
            try:
                one.on_ready(mask)
            except Exception as error:
                one.crashed(error)

    def watch_hangup(self, fd: int, ready: "Ready") -> None:
        """Call `ready.on_ready` when the peer has closed its side or the connection broke, and never because there is
        something to read, which somebody else will. It stays so until `unregister`.
        """
        self.register(fd, EVENT_READ, ready)
        self._epoll.modify(fd, _HANGUP)

    @property
    def registered(self) -> int:
        """How many fds are watched."""
        return sum(one is not None for one in self._registered)

    def close(self) -> None:
        """Give the epoll's own fd back."""
        self._epoll.close()


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
        """The fd is readable (selectors.EVENT_READ), writable (EVENT_WRITE), or both."""

    def crashed(self, error: Exception) -> None:
        """`on_ready` raised `error`."""


class Loop:
    """The loop. `now` is monotonic time in seconds and `at` the same in ticks, both as of this turn. `queued` is what
    is to be flushed at its end.
    """

    __slots__ = ("_buckets", "_due", "_moderation", "at", "now", "queued", "selector")

    def __init__(self) -> None:
        self.selector = Selector()
        self._buckets: dict[int, list[Timed]] = {}
        self._due: list[int] = []
        self._moderation = Moderation(PAUSE_SECS, GAP_SECS)
        self.queued: list[Queued] = []
        self.now = time.monotonic()
        self.at = int(self.now * TICKS_PER_SEC)

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
        self._moderation.woken(now - looked)
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


def to_ticks(secs: float) -> int:
    """The whole ticks nearest to `secs`, at least one."""
    return max(1, int(secs * TICKS_PER_SEC + 0.5))
