"""What all streams of one worker share."""

import logging
from builtins import memoryview  # mypyc looks for the names of fields' types among the module's
from dataclasses import dataclass, field
from typing import Protocol

from forkd.logs import Logs
from forkd.metrics import Metrics
from forkd.settings import Settings
from workers.attachments import Attachments
from workers.backends.base import Backend
from workers.loop import Loop, to_ticks
from workers.offload import Offload
from workers.starters import Starters
from workers.upstream.pool import Pool


class Living(Protocol):
    """A stream, or a program that has one, from its beginning until its client is closed."""

    @property
    def started_at(self) -> float:
        """Monotonic seconds."""

    def fail(self, code: str) -> None:
        """End it, for this of `forkd.reasons`."""


@dataclass(slots=True)
class Timings:
    """The deadlines of every stream of this worker, in seconds; 0 where there is none."""

    write_timeout: float
    heartbeat: float
    max_duration: float
    headers_after: float
    linger_ticks: int
    relayed_linger_ticks: int
    """Of clients that Apache relays: as long as a slow one has for what it has not taken yet."""
    checkup_ticks: int
    """The longest between two looks at a stream's deadlines, and the longest that a finished one stays in memory."""

    @classmethod
    def of(cls, settings: Settings) -> "Timings":
        server = settings.server
        limits = (
            server.write_timeout_secs,
            server.heartbeat_secs,
            server.max_stream_duration_secs,
            server.headers_after_secs,
            10.0,
        )
        shortest = min(secs for secs in limits if secs)
        return cls(
            server.write_timeout_secs,
            server.heartbeat_secs,
            server.max_stream_duration_secs,
            server.headers_after_secs,
            to_ticks(server.linger_secs),
            to_ticks(max(server.linger_secs, server.write_timeout_secs)),
            to_ticks(shortest / 2),
        )


@dataclass(slots=True)
class Context:
    """One worker's shared things, held by each stream by one reference.

    states, words, current: the board's cells; `words[current] = slot + 1` says which slot is being handled.
    finished: (slot, attempt) pairs for the master, sent by `workers.main`.
    started, completed, failed, sent_bytes: over this worker's life.
    streams: those whose client is not closed yet, each of which is a slot that this worker holds.
    """

    index: int
    loop: Loop
    states: memoryview
    words: memoryview
    current: int
    settings: Settings
    timings: Timings
    backends: dict[str, Backend]
    logs: Logs
    log: logging.Logger
    metrics: Metrics
    pools: dict[str, Pool]
    """The connections of each HTTP backend, by its name."""
    attachments: Attachments
    files: Offload
    """For reading and deleting attachments beside the loop."""
    starters: Starters
    finished: list[tuple[int, int]] = field(default_factory=list)
    started: int = 0
    completed: int = 0
    failed: int = 0
    sent_bytes: int = 0
    streams: set[Living] = field(default_factory=set)
