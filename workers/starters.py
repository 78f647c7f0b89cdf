"""How many programs may run, and the threads that start them: what all executions of one worker share.

The limit is on all workers together, so it is counted on the board: see `forkd.board`.
"""

from forkd import programs
from forkd.settings import Settings
from workers.loop import Loop
from workers.offload import Offload


class Starters:
    """`marked` is the board's view of programs, by slot."""

    __slots__ = ("_marked", "_marks", "threads")

    def __init__(self, loop: Loop, marked: memoryview, settings: Settings) -> None:
        self._marked = marked
        self._marks = programs.marks(settings)
        self.threads = Offload(loop)

    def reserve(self, slot: int, name: str, most: int) -> bool:
        """Whether the backend `name` may have one program more, of `most`. If so this slot counts until `free`."""
        mark = self._marks[name]
        self._marked[slot] = mark
        if bytes(self._marked).count(mark) <= most:
            return True
        self._marked[slot] = 0
        return False

    def free(self, slot: int) -> None:
        """Its program was waited for, or never was."""
        self._marked[slot] = 0
