"""Fewer wake-ups while busy, as network cards do it.

At a thousand events a second that arrive one by one, waking up costs more than serving the event. So a loop that has so
much to do that a pause would gather at least two things at a time waits a moment before it looks, and takes what has
gathered. A loop with less to do never waits, because it would only be late, and a busy one never longer than its
`pause_secs`: nobody sees a millisecond or two beside tokens that come 20 to 50 ms apart.
"""

import time
from collections.abc import Callable
from typing import Final

WINDOW_SECS: Final = 0.02
"""How much a loop has to do is judged by at least so long."""
WORTH: Final = 2
"""So many things a pause must gather."""


class Moderation:
    """Asked once per turn of a loop. `sleep` does the waiting, and may return early."""

    __slots__ = ("_full", "_pause_secs", "_since", "_sleep", "_things", "busy")

    def __init__(self, pause_secs: float, sleep: Callable[[float], object] = time.sleep) -> None:
        self._pause_secs = pause_secs
        self._sleep = sleep
        self.busy = False
        """It pauses."""
        self._since = 0.0
        self._things = 0
        self._full = False

    def pause(self) -> None:
        """Before the loop looks: wait a moment if it is busy, unless more has gathered than it could take."""
        if self.busy and not self._full:
            self._sleep(self._pause_secs)

    def looked(self, now: float, things: int, full: bool) -> None:
        """The loop looked, at `now` in monotonic seconds, and so many things were to be done since the last time.
        `full`: it took in as many as it can at a time.
        """
        self._full = full
        self._things += things
        elapsed = now - self._since
        if elapsed >= WINDOW_SECS:
            self.busy = self._things * self._pause_secs >= WORTH * elapsed
            self._since = now
            self._things = 0
