"""From handlers' threads to the worker's loop: letters, and one eventfd that says that there are some.

Theory of operation. Any thread may `put` a letter, which is (who it is for, what it says). The first one since the
loop last looked counts up the eventfd, those behind it only append: so the loop is woken once for all that gather until
it comes to look, and it takes all of them then, in order. The loop lowers the flag *first* and looks *then*: whatever
is put in after that look raises the flag anew, so no letter is left lying.

The loop's own moderation (`forkd.moderation`) does the rest: while wake-ups come in quick succession it pauses before
it looks.
"""

import logging
import os
import threading
from collections import deque
from selectors import EVENT_READ
from typing import Any, Protocol

from workers.loop import Loop


class Receiver(Protocol):
    """Who letters are for. Both are called on the loop's turn."""

    def take(self, piece: Any) -> None:
        """One letter."""

    def crashed(self, error: Exception) -> None:
        """`take` raised `error`: a bug."""


class Mailbox:
    """`put` is for every thread, all else for the loop's."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._letters: deque[tuple[Receiver, Any]] = deque()
        self._woken = False
        """The loop was told, and has not looked yet."""
        self._lock = threading.Lock()
        """Held around the eventfd's use in a thread, and its end in `close`: by then the number may be another's."""
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.selector.register(self._fd, EVENT_READ, self)

    def put(self, receiver: Receiver, piece: Any) -> None:
        """Leave a letter. Never waits."""
        self._letters.append((receiver, piece))
        if not self._woken:
            self._woken = True
            with self._lock:
                if self._fd >= 0:
                    os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Deliver nothing any more."""
        self._loop.selector.unregister(self._fd)
        with self._lock:
            os.close(self._fd)
            self._fd = -1
        self._letters.clear()

    def on_ready(self, _mask: int) -> None:
        """There are letters."""
        if self._fd < 0:
            return
        os.eventfd_read(self._fd)
        self._woken = False
        self._deliver()

    def crashed(self, error: Exception) -> None:
        """Called by the loop."""
        logging.getLogger("forkd").error("error in a handler's mailbox", exc_info=error)

    def _deliver(self) -> None:
        """All that is there now. What comes meanwhile waits for the next turn: streams want theirs too."""
        letters = self._letters
        for _ in range(len(letters)):
            receiver, piece = letters.popleft()
            try:
                receiver.take(piece)
            except Exception as error:
                receiver.crashed(error)
