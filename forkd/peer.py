"""A worker as the master sees it."""

import socket
from enum import Enum

from forkd.board import Row
from forkd.channel import Assignment, Down, send_down
from forkd.settings import COMMON

_NO_BODY = b"\0"


class Life(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    STANDBY = "standby"
    """Ready, but of a generation that is not in charge yet: it gets no handoffs."""
    READY = "ready"
    DRAINING = "draining"
    """It gets no more handoffs, and exits after its last stream."""
    DEAD = "dead"


class Peer:
    """One worker. The master owns `channel` and `pidfd` until it has reaped the process."""

    __slots__ = (
        "active",
        "channel",
        "deadline",
        "full",
        "generation",
        "given",
        "index",
        "killed_at_tick",
        "late",
        "life",
        "pid",
        "pidfd",
        "pool",
        "row",
        "seen_beat",
        "silent_ticks",
        "stream_limit",
        "told",
        "untold",
        "unwanted",
    )

    def __init__(
        self,
        index: int,
        generation: int,
        pid: int,
        pidfd: int,
        channel: socket.socket,
        row: Row,
        pool: str = COMMON,
    ) -> None:
        self.index = index
        self.generation = generation
        self.pool = pool
        """It gets the handoffs of this pool's listeners and no others."""
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self.row = row
        self.life = Life.STARTING
        self.active = 0
        """Streams that the master gave it and has not heard the end of."""
        self.given = 0
        """Streams that it was ever given."""
        self.stream_limit = 0
        """It is recycled after so many of them; 0: never."""
        self.deadline = 0.0
        """When the time for what it was told is up (monotonic seconds); 0: it has all the time."""
        self.unwanted = False
        """Of a generation that was abandoned: its death is nothing to report."""
        self.full = False
        """Its channel takes no more just now, or it has no fds left."""
        self.late = False
        self.seen_beat = 0
        self.silent_ticks = 0
        self.killed_at_tick = 0
        self.told: Down | None = None
        self.untold = False
        """`told` has not found room in the channel yet."""

    def tell(self, kind: Down) -> None:
        """Send DRAIN or STOP, once, and nothing to stream from now on. What finds the channel full goes by
        `tell_again`.
        """
        if self.told is not None and self.told >= kind:
            return
        self.told = kind
        self.untold = True
        if self.life is not Life.DEAD:
            self.life = Life.DRAINING
        self.tell_again()

    def tell_again(self) -> None:
        """Send what a full channel did not take; called each tick."""
        if not self.untold or self.told is None:
            return
        try:
            send_down(self.channel, Assignment(0, 0, self.told, 0, 0, 0.0), _NO_BODY, ())
        except BlockingIOError:
            return
        except OSError:  # dying; its end is on the way
            pass
        self.untold = False
