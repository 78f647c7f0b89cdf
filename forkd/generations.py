"""Reload and recycling: which configuration serves, which is coming, and who makes room for whom.

The promise of a reload: there is no moment without a ready worker; the old workers stay in charge until every new one
has reported ready, and for good if the new ones do not; no stream is cut short of `drain_timeout_secs`.

Theory of operation. A generation is one configuration and the workers that live by it. At most one is *coming*: its
workers start beside the others and, when they are ready, stand by. When all of them do, it becomes the *current* one in
one step: they serve, and the workers of the one before drain. Those are *leaving*. Not more than LEAVING_MAX leave at a
time, or an operator who reloads again and again would fill the machine with workers; until one is gone the next
reload waits, and of several that wait the last counts.

    asked -> (waiting) -> coming -> current -> leaving -> gone
                            |
                            +--> abandoned: DEATHS_MAX of its workers died before they were ready, or they were not
                                 ready within READY_SECS, or one said that its configuration is unfit to work with

Recycling replaces one worker of the current generation by another of the same: the replacement is ready first.

Whoever dies before it is ready makes its own generation wait before the next birth, and no other: a configuration that
cannot work holds up neither the one that serves nor the one that is to mend it.

Each pool has workers of its own (`forkd.settings.PoolSettings`), and whatever is said of all workers here is said of
all pools together: none takes over before every one of them can. TTIN and TTOU are the common pool's.

This file decides; it forks nothing and reads no clock. `forkd.supervisor` asks it what is missing, tells it of every
worker that is ready or dead, and calls `tick`.
"""

import random
from collections.abc import Callable, Sequence
from logging import Logger
from typing import Final

from forkd.channel import Down
from forkd.peer import Life, Peer
from forkd.settings import COMMON, WORKERS_WANTED_MAX, Settings, worker_counts

LEAVING_MAX: Final = 2
DEATHS_MAX: Final = 3
READY_SECS: Final = 60.0
BACKOFF_FIRST_SECS: Final = 0.25
BACKOFF_MAX_SECS: Final = 30.0
JITTER: Final = 0.25
"""By how much of `max_streams` workers differ, so that they are not all due at once."""
END_GRACE_SECS: Final = 3.0
"""From STOP to SIGKILL: what a worker may take to tell its clients."""


class Generation:
    """One configuration. `wanted` is how many workers it is to have, by pool."""

    __slots__ = ("deaths", "failures", "next_birth", "number", "ready_by", "settings", "size", "unfit", "wanted")

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self.settings = settings
        self.wanted = worker_counts(settings)
        self.size = sum(self.wanted.values())
        """How many workers it is to have in all: asked at each handoff."""
        self.deaths = 0
        """Of its workers, before they were ready."""
        self.unfit = False
        """One of its workers said that none could work with these settings, before it was ready."""
        self.ready_by = 0.0
        self.failures = 0
        """How many times in a row births came to nothing."""
        self.next_birth = 0.0

    def grow(self, step: int) -> None:
        """So many more workers in the common pool, or fewer, but at least one."""
        room = max(0, WORKERS_WANTED_MAX - self.size)
        self.wanted[COMMON] = max(1, self.wanted[COMMON] + min(step, room))
        self.size = sum(self.wanted.values())

    def back_off(self, now: float) -> None:
        """Wait before the next birth, twice as long as last time. What fails in one wave is one failure."""
        if now < self.next_birth:
            return
        self.next_birth = now + min(BACKOFF_FIRST_SECS * 2**self.failures, BACKOFF_MAX_SECS)
        self.failures = min(self.failures + 1, 16)


class Generations:
    """All generations of one master. `peers` is the supervisor's list, of which this owns nothing."""

    def __init__(
        self,
        settings: Settings,
        peers: Sequence[Peer],
        log: Logger,
        kill: Callable[[Peer], None],
        changed: Callable[[Settings, bool], None],
        births_at_once: int = WORKERS_WANTED_MAX,
    ) -> None:
        """`kill` sends SIGKILL. `changed` is told of the settings in force after a reload, and whether it succeeded.

        `births_at_once`: of the coming generation so many start at a time. Nobody waits for them, and whoever starts
        takes the CPU from streams.
        """
        self._peers = peers
        self._log = log
        self._kill = kill
        self._changed = changed
        self._births_at_once = births_at_once
        self._last = 1
        self._asked: Settings | None = None
        self._recycled: Peer | None = None
        self.current = Generation(1, settings)
        self.coming: Generation | None = None

    @property
    def reloading(self) -> bool:
        """A reload was asked for and is not decided."""
        return self.coming is not None or self._asked is not None

    def ask(self, settings: Settings, now: float) -> None:
        """Reload with `settings`: now, or when there is room for another generation."""
        self._asked = settings
        if self.coming is not None:
            self._log.info("another reload follows when this one is decided")
        elif not self._has_room():
            self._log.info("the reload waits: %d generations are still draining", LEAVING_MAX)
        self._begin(now)

    def forget(self) -> None:
        """No reload any more: the master is to stop. What was coming drains like all else."""
        self._asked = None
        self.coming = None
        self._recycled = None

    def resize(self, step: int, now: float) -> int:
        """So many workers more or fewer in the common pool, at least one; returns how many are wanted there now."""
        self.current.grow(step)
        if self.coming is not None:
            self.coming.grow(step)
        if step < 0:
            self._recycled = None  # whoever is due will be again, once it is clear how many are to stay
        self._turn_over_if_ready(now)
        self._trim(now)
        return self.current.wanted[COMMON]

    def missing(self, now: float) -> tuple[Generation, str] | None:
        """The generation and the pool that another worker should be started for now; None when there is none."""
        current, coming = self.current, self.coming
        if now >= current.next_birth:
            for pool in current.wanted:
                if self._count(current, pool, Life.STARTING, Life.READY) < self._due(pool):
                    return current, pool
        if (
            coming is not None
            and now >= coming.next_birth
            and sum(self._count(coming, pool, Life.STARTING) for pool in coming.wanted) < self._births_at_once
        ):
            for pool, wanted in coming.wanted.items():
                if self._count(coming, pool, Life.STARTING, Life.STANDBY) < wanted:
                    return coming, pool
        return None

    def retire(self, peer: Peer, now: float) -> None:
        """Have one worker drain, in the time that a drain may take."""
        if peer is self._recycled:
            self._recycled = None
        if peer.told is None:
            peer.deadline = now + self.current.settings.server.drain_timeout_secs
        peer.tell(Down.DRAIN)

    def ready(self, peer: Peer, now: float) -> None:
        """A worker reported ready, and nobody has told it to go."""
        coming = self.coming
        if coming is not None and peer.generation == coming.number:
            coming.failures, coming.next_birth = 0, 0.0
            peer.life = Life.STANDBY
            self._turn_over_if_ready(now)
            return
        self.current.failures, self.current.next_birth = 0, 0.0
        peer.life = Life.READY
        recycled = self._recycled
        if recycled is not None and recycled is not peer and recycled.pool == peer.pool:
            self.retire(recycled, now)

    def died(self, peer: Peer, was: Life, now: float, *, unfit: bool = False) -> None:
        """A worker is dead; it is in `peers` no more. `unfit`: it ended by itself, since it could not work with its
        configuration.
        """
        if peer is self._recycled:
            self._recycled = None
        for generation in (self.current, self.coming):
            if generation is not None and generation.number == peer.generation and was is Life.STARTING:
                generation.back_off(now)
                generation.deaths += 1
                generation.unfit |= unfit
                if generation is not self.coming:
                    continue
                if unfit:
                    self._abandon("its workers cannot work with the new configuration (see above)", now)
                elif generation.deaths >= DEATHS_MAX:
                    self._abandon(f"{generation.deaths} of its workers died before they were ready", now)
        self._begin(now)

    def tick(self, now: float) -> None:
        """Deadlines, and whoever is due to be recycled."""
        if self.coming is not None and now >= self.coming.ready_by:
            self._abandon(f"its workers were not ready after {READY_SECS:.0f} s", now)
        for peer in self._peers:
            if not peer.deadline or now < peer.deadline:
                continue
            if peer.told is Down.STOP:
                self._kill(peer)
                peer.deadline = now + 1
            else:
                self._log.warning("worker %d: %d streams did not finish in time: ending them", peer.index, peer.active)
                peer.tell(Down.STOP)
                peer.deadline = now + END_GRACE_SECS
        self._turn_over_if_ready(now)
        self._trim(now)
        if self._recycled is None and self.coming is None:
            self._recycle()
        self._begin(now)

    def limit_of(self, generation: Generation) -> int:
        """After how many streams a worker that is born now is recycled; 0: never."""
        most = generation.settings.workers.max_streams
        return int(most * random.uniform(1 - JITTER, 1)) or 1 if most else 0

    def _begin(self, now: float) -> None:
        if self._asked is None or self.coming is not None or not self._has_room():
            return
        settings, self._asked = self._asked, None
        self._last += 1
        self.coming = Generation(self._last, settings)
        self.coming.ready_by = now + READY_SECS
        self._recycled = None
        self._log.info("generation %d: starting %d workers", self.coming.number, self.coming.size)

    def _trim(self, now: float) -> None:
        """Retire what the current generation has too much of in a pool: first those that do not serve yet, then the
        least busy."""
        all_serving = [peer for peer in self._peers if peer.generation == self.current.number and _serves(peer)]
        all_serving.sort(key=lambda peer: (peer.life is Life.READY, peer.active))
        for pool in self.current.wanted:
            serving = [peer for peer in all_serving if peer.pool == pool]
            surplus = max(0, len(serving) - self._due(pool))
            for peer in serving[:surplus]:
                self.retire(peer, now)

    def _due(self, pool: str) -> int:
        """How many workers the current generation is to have in a pool just now."""
        return self.current.wanted[pool] + (self._recycled is not None and self._recycled.pool == pool)

    def _turn_over_if_ready(self, now: float) -> None:
        coming = self.coming
        if coming is not None and all(
            self._count(coming, pool, Life.STANDBY) >= wanted for pool, wanted in coming.wanted.items()
        ):
            self._turn_over(coming, now)

    def _turn_over(self, coming: Generation, now: float) -> None:
        """The coming generation is in charge from here on."""
        old, self.current, self.coming = self.current, coming, None
        for peer in self._peers:
            if peer.generation == coming.number and peer.life is Life.STANDBY:
                peer.life = Life.READY
        for peer in self._peers:
            if peer.generation != coming.number and peer.told is None:
                self.retire(peer, now)
        self._log.info("generation %d serves; generation %d drains", coming.number, old.number)
        self._changed(coming.settings, True)

    def _abandon(self, why: str, now: float) -> None:
        coming, self.coming = self.coming, None
        assert coming is not None
        self._log.error("the reload failed: %s; generation %d stays in charge", why, self.current.number)
        for peer in self._peers:
            if peer.generation == coming.number:
                peer.unwanted = True
                peer.tell(Down.STOP)
                peer.deadline = now + END_GRACE_SECS
        self._changed(self.current.settings, False)

    def _recycle(self) -> None:
        if any(peer.told is not None and peer.generation == self.current.number for peer in self._peers):
            return  # one at a time
        most_bytes = self.current.settings.workers.max_rss_mb << 20
        for peer in self._peers:
            if peer.generation != self.current.number or not _serves(peer) or peer.life is not Life.READY:
                continue
            if peer.stream_limit and peer.given >= peer.stream_limit:
                why = f"it had {peer.given} streams"
            elif most_bytes and peer.row.rss_bytes > most_bytes:
                why = f"it uses {peer.row.rss_bytes >> 20} MB"
            else:
                continue
            self._log.info("worker %d is replaced: %s", peer.index, why)
            self._recycled = peer
            return

    def _has_room(self) -> bool:
        return len({peer.generation for peer in self._peers if peer.generation < self.current.number}) < LEAVING_MAX

    def _count(self, generation: Generation, pool: str, *lives: Life) -> int:
        number = generation.number
        return sum(peer.generation == number and peer.pool == pool and peer.life in lives for peer in self._peers)


def _serves(peer: Peer) -> bool:
    """It is there to stay, as far as anyone has said."""
    return peer.told is None and peer.life in (Life.STARTING, Life.READY)
