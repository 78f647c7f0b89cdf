"""A gate that answers wait at until the test lets them pass, instead of a sleep on either side."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable


class Gate:
    """Closed at first. The test calls `let` and `open`, from its thread; patterns await `passing`, on the loop's."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._passes = 0
        self._open = False

    @property
    def waiting(self) -> int:
        """How many answers wait at it now."""
        return len(self._waiting)

    def let(self, count: int = 1) -> None:
        """Let so many waits pass, now or when they come."""
        with self._lock:
            self._passes += count
            self._release()

    def open(self) -> None:
        """Let everything pass from now on."""
        with self._lock:
            self._open = True
            self._release()

    def close(self) -> None:
        """Hold up whatever comes from now on."""
        with self._lock:
            self._open = False
            self._passes = 0

    async def passing(self) -> None:
        """Wait for leave to go on."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._waiting.append(mine)
            self._release()
        self._changed()
        try:
            await mine
        finally:
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)

    def _release(self) -> None:
        while self._waiting and (self._open or self._passes):
            if not self._open:
                self._passes -= 1
            first = self._waiting.popleft()
            first.get_loop().call_soon_threadsafe(_settle, first)


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
