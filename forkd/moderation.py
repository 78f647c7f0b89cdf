"""Fewer wake-ups while busy, as network cards do it.

At a thousand events a second that arrive one by one, waking up costs more than serving the event. So a loop that is
woken again and again in short order waits a moment before it looks again, and takes what has gathered. An idle loop
never waits, and a busy one never longer than its `pause_secs`: nobody sees a millisecond or two beside tokens that
come 20 to 50 ms apart.
"""

import time
from collections.abc import Callable
from typing import Final

BUSY_AFTER: Final = 16


class Moderation:
    """Asked once per turn of a loop, before it waits. `sleep` does the waiting, and may return early.

    A loop is busy when BUSY_AFTER times in a row something came within `gap_secs` of looking for it. What it takes to
    serve that, and the pauses themselves, do not count: they make the next wait shorter, not longer.
    """

    __slots__ = ("_gap_secs", "_pause_secs", "_quick", "_sleep")

    def __init__(self, pause_secs: float, gap_secs: float, sleep: Callable[[float], object] = time.sleep) -> None:
        self._pause_secs = pause_secs
        self._gap_secs = gap_secs
        self._sleep = sleep
        self._quick = 0

    def pause(self) -> None:
        """Wait a moment if the loop is busy."""
        if self._quick >= BUSY_AFTER:
            self._sleep(self._pause_secs)

    def woken(self, waited_secs: float) -> None:
        """The loop looked, and so long after that something came."""
        self._quick = self._quick + 1 if waited_secs < self._gap_secs else 0
