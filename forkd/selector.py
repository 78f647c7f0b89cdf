"""The selector of the master and of the workers, for tens of thousands of fds: epoll(7), with a list by fd.

`selectors.EpollSelector` keeps a key beside each object and makes room for all of them at each select: more memory for
each stream, and more of it to go through for each event.

Several events come from one select, and a callback may close the fd of a later one, so `on_ready` of a closed object
must do nothing. An exception that leaves `on_ready` is a bug: whoever made the selector is told, and the others are
served.
"""

import select
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE
from typing import Final, Generic, Protocol, TypeVar

EVENTS_MAX: Final = 64
"""Taken in by one select. The rest is not lost: epoll(7) brings it next time, and those that were served last. Room for
so few comes from what malloc(3) keeps at hand.
"""
_IN: Final = int(select.EPOLLIN)
_OUT: Final = int(select.EPOLLOUT)
EDGE: Final = 4
"""Beside EVENT_READ: say once that something came, not at each select as long as it is there, which spares the kernel a
look at every fd that was just read. Who reads less than there was room for has read all (epoll(7), Q9), and hears when
more comes; who may have left something asks by `repeat`. So must whoever's mask has EDGE: the other side has closed, or
the connection broke, and nothing else may come behind what is there to tell it.

Not for peers that send urgent data, or fds amid a stream: a read stops short of those. An HTTP server sends neither;
what one that does has put behind them is seen when still more comes, or never, and then a deadline ends its stream.
"""
_HANGUP: Final = int(select.EPOLLRDHUP)
_EPOLL: Final = (0, _IN, _OUT, _IN | _OUT, 0, _IN | _HANGUP | int(select.EPOLLET))
"""By selectors.EVENT_READ (1), EVENT_WRITE (2), both, and EVENT_READ | EDGE (5)."""
_SPARE: Final = 256
"""The list grows by so many at a time."""


class Ready(Protocol):
    """What may be registered."""

    def on_ready(self, mask: int) -> None:
        """The fd is readable (selectors.EVENT_READ), writable (EVENT_WRITE), or both; and see EDGE."""


R = TypeVar("R", bound=Ready)


class Selector(Generic[R]):
    """`crashed` is given whatever raised, and what it raised."""

    __slots__ = ("_crashed", "_epoll", "_events", "_registered")

    def __init__(self, crashed: Callable[[R, Exception], None]) -> None:
        self._crashed = crashed
        self._epoll = select.epoll()
        self._registered: list[R | None] = []
        self._events: list[int] = []
        """What each is watched for."""

    def register(self, fd: int, events: int, ready: R) -> None:
        """Watch `fd`, the caller's, for selectors.EVENT_READ, EVENT_WRITE, both, or EVENT_READ | EDGE. OSError:
        epoll_ctl(2).
        """
        self._epoll.register(fd, _EPOLL[events])
        missing = fd + 1 - len(self._registered)
        if missing > 0:
            self._registered += [None] * (missing + _SPARE)
            self._events += [0] * (missing + _SPARE)
        self._registered[fd] = ready
        self._events[fd] = events

    def unregister(self, fd: int) -> None:
        """Watch no more. Before the fd is closed: where another process has it too, the kernel would go on."""
        self._epoll.unregister(fd)
        self._registered[fd] = None
        self._events[fd] = 0

    def modify(self, fd: int, events: int) -> None:
        """Watch a registered fd for just these events from now on, of which there is at least one."""
        self._epoll.modify(fd, _EPOLL[events])
        self._events[fd] = events

    def watch(self, fd: int, events: int, ready: R) -> None:
        """Watch for just these events from now on, which may be none; registers and unregisters as needed."""
        before = self.watched(fd)
        if events == before:
            return
        if not events:
            self.unregister(fd)
        elif not before:
            self.register(fd, events, ready)
        else:
            self.modify(fd, events)

    def repeat(self, fd: int) -> None:
        """Under EDGE: say it again if there is still something. An fd that is not registered is left alone."""
        events = self.watched(fd)
        if events:
            self._epoll.modify(fd, _EPOLL[events])

    def watch_hangup(self, fd: int, ready: R) -> None:
        """Call `ready.on_ready` when the peer has closed its side or the connection broke, and never because there is
        something to read, which somebody else will. It stays so until `unregister`.
        """
        self.register(fd, EVENT_READ, ready)
        self._epoll.modify(fd, _HANGUP)

    def watched(self, fd: int) -> int:
        """What for, as it was registered, or 0 for an fd that is not."""
        return self._events[fd] if 0 <= fd < len(self._events) else 0

    def select(self, timeout: float) -> list[tuple[int, int]]:
        """Wait so many seconds at most. What epoll(7) says, for `serve`."""
        return self._epoll.poll(timeout, EVENTS_MAX)

    def serve(self, found: list[tuple[int, int]]) -> None:
        """Call whoever is ready, with what for."""
        registered = self._registered
        # Looked up before anybody is called: who closes a later one's fd must not have its number answer for another.
        ready = [registered[fd] for fd, _ in found]
        for index, one in enumerate(ready):
            if one is None:
                continue
            fd, event = found[index]
            if event == _IN:
                mask = EVENT_READ
            else:  # a hang-up or an error is found out by reading, or by writing
                mask = (EVENT_WRITE if event & ~_IN else 0) | (EVENT_READ if event & ~_OUT else 0)
                events = self._events[fd]
                mask = mask & events | events & EDGE
            try:
                one.on_ready(mask)
            except Exception as error:
                self._crashed(one, error)

    @property
    def registered(self) -> int:
        """How many fds are watched."""
        return sum(one is not None for one in self._registered)

    def close(self) -> None:
        """Give the epoll's own fd back."""
        self._epoll.close()
