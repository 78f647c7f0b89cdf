"""Reload and recycling as a policy: nothing is forked, the workers are entries in a list and the clock is a number."""

import collections
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest

from forkd.board import Board, Figures
from forkd.channel import Down, parse_down
from forkd.generations import (
    BACKOFF_FIRST_SECS,
    BACKOFF_MAX_SECS,
    END_GRACE_SECS,
    JITTER,
    LEAVING_MAX,
    READY_SECS,
    Generations,
)
from forkd.peer import Life, Peer
from forkd.settings import COMMON, WORKERS_WANTED_MAX, PoolSettings, Server, Settings, Workers

DRAIN_SECS = 100.0


class Channel:
    """What a worker would hear. `full` refuses, as a full socket does."""

    def __init__(self) -> None:
        self.heard: list[Down] = []
        self.full = False

    def sendmsg(self, parts: list[bytes], _rights: object, _flags: int) -> None:
        if self.full:
            raise BlockingIOError
        self.heard.append(Down(parse_down(b"".join(parts))[0].kind))


class Town:
    """Generations, the workers that a supervisor would have, and a clock."""

    def __init__(self, births_at_once: int = WORKERS_WANTED_MAX, **workers: Any) -> None:
        self.now = 1000.0
        self.peers: list[Peer] = []
        self.killed: list[Peer] = []
        self.changes: list[tuple[Settings, bool]] = []
        self.log = logging.getLogger("test.generations")
        self._board = Board(1)
        self._births = itertools.count(1)
        self.generations = Generations(
            settings(**workers),
            self.peers,
            self.log,
            self.killed.append,
            lambda *change: self.changes.append(change),
            births_at_once,
        )

    def births(self) -> list[Peer]:
        """Start all that is missing, as the supervisor does at once; returns the newborn."""
        born = []
        while (missing := self.generations.missing(self.now)) is not None:
            generation, pool = missing
            number = next(self._births)
            channel: Any = Channel()
            peer = Peer(number, generation.number, 10_000 + number, -1, channel, self._board.row(number), pool)
            peer.stream_limit = self.generations.limit_of(generation)
            self.peers.append(peer)
            born.append(peer)
            assert len(born) < 100
        return born

    def ready(self, *peers: Peer) -> None:
        for peer in peers:
            if peer.life is Life.STARTING:  # as the supervisor, who does not tell of one that was told to go
                self.generations.ready(peer, self.now)

    def die(self, *peers: Peer, unfit: bool = False) -> None:
        for peer in peers:
            was, peer.life = peer.life, Life.DEAD
            self.peers.remove(peer)
            self.generations.died(peer, was, self.now, unfit=unfit)

    def tick(self, secs: float = 0.25) -> None:
        self.now += secs
        self.generations.tick(self.now)

    def started(self) -> list[Peer]:
        """All there should be, ready."""
        born = self.births()
        self.ready(*born)
        return born

    def reload(self, **workers: Any) -> list[Peer]:
        """Ask for a reload; returns the workers that were started for it."""
        self.generations.ask(settings(**workers), self.now)
        return self.births()

    def lives(self) -> list[Life]:
        return [peer.life for peer in self.peers]

    def serving(self, pool: str = "") -> list[Peer]:
        return [peer for peer in self.peers if peer.life is Life.READY and pool in ("", peer.pool)]


def settings(count: int = 2, drain: float = DRAIN_SECS, heavy: int = 0, **workers: Any) -> Settings:
    """`heavy`: so many workers in a pool of that name, if any."""
    return Settings(
        server=Server(socket_path="unused", drain_timeout_secs=drain),
        workers=Workers(count=count, **workers),
        pools={"heavy": PoolSettings(count=heavy)} if heavy else {},
    )


def heard(peer: Peer) -> list[Down]:
    assert isinstance(peer.channel, Channel)
    return peer.channel.heard


# Reload.


def test_a_reload_goes_to_the_new_ones_only_when_all_of_them_are_ready() -> None:
    town = Town(count=2)
    old = town.started()
    new = town.reload(count=3)
    assert [peer.generation for peer in new] == [2, 2, 2]
    town.ready(*new[:2])
    town.tick()
    assert [peer.life for peer in old] == [Life.READY] * 2
    assert [peer.life for peer in new] == [Life.STANDBY, Life.STANDBY, Life.STARTING]
    assert town.generations.reloading
    assert not town.changes
    town.ready(new[2])
    assert [peer.life for peer in new] == [Life.READY] * 3
    assert [heard(peer) for peer in old] == [[Down.DRAIN]] * 2
    assert [(changed.workers.count, succeeded) for changed, succeeded in town.changes] == [(3, True)]
    assert not town.generations.reloading
    assert town.generations.current.number == 2
    assert town.births() == []


def test_there_is_no_moment_without_a_ready_worker_and_none_too_many_in_the_end() -> None:
    """Whatever is asked for in whatever order."""

    def first_of(town: Town, life: Life) -> list[Peer]:
        return [peer for peer in town.peers if peer.life is life][:1]

    def wear_out(town: Town) -> None:
        for peer in first_of(town, Life.READY):
            peer.given = peer.stream_limit

    acts: list[Callable[[Town], object]] = [
        lambda town: town.generations.ask(settings(count=2, max_streams=10), town.now),
        lambda town: town.generations.resize(1, town.now),
        lambda town: town.generations.resize(-1, town.now),
        lambda town: town.ready(*first_of(town, Life.STARTING)),
        lambda town: town.die(*first_of(town, Life.DRAINING)),
        wear_out,
        Town.tick,
    ]
    for order in itertools.product(acts, repeat=5):
        town = Town(count=1, max_streams=10)
        town.started()
        for act in order:
            act(town)
            town.births()
            assert town.serving(), order
        for _ in range(5):
            town.ready(*[peer for peer in town.peers if peer.life is Life.STARTING])
            town.die(*[peer for peer in town.peers if peer.life is Life.DRAINING])
            town.tick()
            town.births()
        assert town.lives() == [Life.READY] * town.generations.current.size, order
        assert not town.generations.reloading
        assert not town.killed


def test_the_new_ones_start_a_few_at_a_time_because_those_who_serve_need_the_cpu() -> None:
    town = Town(births_at_once=2, count=5)
    assert len(town.births()) == 5  # nobody serves yet
    town.ready(*town.peers)
    first, second = town.reload(count=5)
    assert town.births() == []
    town.ready(first)
    (third,) = town.births()
    town.die(second)
    town.now += BACKOFF_FIRST_SECS
    (fourth,) = town.births()
    town.ready(third, fourth)
    town.ready(*town.births())
    assert town.generations.current.number == 2
    assert len(town.serving()) == 5


def test_a_new_worker_that_dies_on_standby_is_replaced_before_the_turn() -> None:
    town = Town(count=2)
    town.started()
    first, second = town.reload()
    town.ready(first)
    town.die(first)
    (third,) = town.births()
    town.ready(second)
    assert second.life is Life.STANDBY
    town.ready(third)
    assert second.life is third.life is Life.READY
    assert town.generations.current.deaths == 0


def test_an_old_worker_that_dies_meanwhile_is_replaced_by_one_of_its_kind() -> None:
    town = Town(count=2)
    old = town.started()
    new = town.reload()
    town.die(old[0])
    (replacement,) = town.births()
    assert replacement.generation == 1
    town.ready(*new)
    assert replacement.life is Life.DRAINING  # it had not even started
    assert heard(replacement) == [Down.DRAIN]


def test_a_reload_is_abandoned_at_once_when_a_worker_cannot_work_with_it(caplog: pytest.LogCaptureFixture) -> None:
    town = Town(count=2)
    old = town.started()
    new = town.reload(count=2)
    town.ready(new[0])
    town.die(new[1], unfit=True)
    assert not town.generations.reloading
    assert [succeeded for _, succeeded in town.changes] == [False]
    assert [peer.life for peer in old] == [Life.READY] * 2
    assert heard(new[0]) == [Down.STOP]
    assert "the reload failed: its workers cannot work with the new configuration (see above)" in caplog.text


def test_a_worker_that_becomes_unfit_later_is_tried_again() -> None:
    """Its code on the disk was changed: the others serve, and somebody may mend it."""
    town = Town(count=2)
    old = town.started()
    assert not town.generations.current.unfit
    town.die(old[0])
    (new,) = town.births()
    town.die(new, unfit=True)
    assert town.generations.current.unfit
    assert town.births() == []
    town.tick(BACKOFF_FIRST_SECS)
    assert len(town.births()) == 1


def test_a_reload_is_abandoned_after_three_deaths(caplog: pytest.LogCaptureFixture) -> None:
    town = Town(count=2)
    old = town.started()
    new = town.reload(count=4)
    town.ready(new[3])
    town.die(new[0], new[1])
    assert town.generations.reloading
    town.die(new[2])
    assert not town.generations.reloading
    assert [changed.workers.count for changed, _ in town.changes] == [2]
    assert [succeeded for _, succeeded in town.changes] == [False]
    assert [peer.life for peer in old] == [Life.READY] * 2
    assert heard(new[3]) == [Down.STOP]
    assert new[3].unwanted
    assert "the reload failed: 3 of its workers died before they were ready; generation 1 stays" in caplog.text
    town.tick(END_GRACE_SECS)
    assert town.killed == [new[3]]  # it would not go
    town.tick(0.5)
    assert len(town.killed) == 1
    town.die(new[3])
    assert town.births() == []
    assert town.generations.current.size == 2


def test_a_reload_is_abandoned_after_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    town = Town()
    old = town.started()
    hung, well = town.reload()
    town.ready(well)
    town.tick(READY_SECS - 0.25)
    assert town.generations.reloading
    town.tick()
    assert not town.generations.reloading
    assert "its workers were not ready after 60 s" in caplog.text
    assert [heard(hung), heard(well)] == [[Down.STOP]] * 2
    assert town.serving() == old
    town.ready(*town.reload())  # the next one has another number and its own minute
    assert town.generations.current.number == 3


def test_reloads_in_a_burst_are_one_more() -> None:
    town = Town(count=1)
    town.started()
    (coming,) = town.reload(count=2, timeout_secs=2)[:1]
    for timeout in (3, 4, 5):
        assert town.reload(count=1, timeout_secs=timeout) == []
    assert coming.generation == 2
    town.ready(*[peer for peer in town.peers if peer.generation == 2])
    town.tick()
    (last,) = town.births()
    town.ready(last)
    town.tick()
    assert not town.generations.reloading
    assert town.generations.current.number == 3
    assert [changed.workers.timeout_secs for changed, _ in town.changes] == [2, 5]


def test_two_generations_may_drain_and_the_third_reload_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    town = Town(count=1)
    generations = [town.started()]
    for _ in range(LEAVING_MAX):
        generations.append(town.reload(count=1))
        town.ready(*generations[-1])
        town.tick()
    assert town.lives() == [Life.DRAINING, Life.DRAINING, Life.READY]
    assert town.reload(count=5) == []
    assert town.reload(count=3) == []  # of those that wait the last counts
    assert "the reload waits: 2 generations are still draining" in caplog.text
    assert town.generations.reloading
    town.tick(50)
    assert town.births() == []
    town.die(*generations[1])
    born = town.births()
    assert [peer.generation for peer in born] == [4, 4, 4]
    town.ready(*born)
    assert town.lives() == [Life.DRAINING, Life.DRAINING, *[Life.READY] * 3]


def test_workers_that_crash_at_start_hold_up_no_other_generation() -> None:
    """The configuration that serves cannot start workers any more; the reload that mends it must not wait for it."""
    town = Town(count=1)
    for _ in range(8):
        town.die(*town.births())
        town.now += BACKOFF_MAX_SECS
    town.die(*town.births())
    assert town.births() == []
    (mended,) = town.reload(count=1)
    assert mended.generation == 2
    town.ready(mended)
    assert town.serving() == [mended]
    assert town.births() == []


def test_a_reload_that_crashes_does_not_delay_the_successor_of_a_worker_that_serves() -> None:
    town = Town(count=2)
    old = town.started()
    new = town.reload()
    town.die(new[0])
    town.die(old[0])
    assert [peer.generation for peer in town.births()] == [1]
    town.now += BACKOFF_FIRST_SECS
    assert [peer.generation for peer in town.births()] == [2]


# TTIN and TTOU.


def test_one_more_and_one_fewer() -> None:
    town = Town(count=2)
    old = town.started()
    assert town.generations.resize(1, town.now) == 3
    (third,) = town.births()
    town.ready(third)
    old[0].active, old[1].active, third.active = 4, 2, 3
    assert town.generations.resize(-1, town.now) == 2
    assert town.lives() == [Life.READY, Life.DRAINING, Life.READY]  # the least busy
    assert town.births() == []
    assert [town.generations.resize(-1, town.now) for _ in range(3)] == [1, 1, 1]
    assert town.lives() == [Life.READY, Life.DRAINING, Life.DRAINING]
    assert town.generations.resize(5000, town.now) == WORKERS_WANTED_MAX


def test_one_fewer_is_first_whoever_does_not_serve_yet() -> None:
    town = Town(count=1)
    (old,) = town.started()
    town.generations.resize(1, town.now)
    (starting,) = town.births()
    town.generations.resize(-1, town.now)
    assert old.life is Life.READY
    assert starting.life is Life.DRAINING


def test_more_during_a_reload_is_more_of_the_new() -> None:
    town = Town(count=2)
    town.started()
    new = town.reload()
    town.ready(new[0])
    town.generations.resize(1, town.now)
    born = town.births()
    assert sorted(peer.generation for peer in born) == [1, 2]
    town.ready(*born)
    assert town.generations.reloading
    town.ready(new[1])
    assert len(town.serving()) == 3
    assert {peer.generation for peer in town.serving()} == {2}


def test_fewer_during_a_reload_may_be_what_it_waited_for() -> None:
    town = Town(count=2)
    old = town.started()
    ready, hung = town.reload()
    town.ready(ready)
    town.generations.resize(-1, town.now)
    assert ready.life is Life.READY
    assert hung.life is Life.DRAINING
    assert [peer.life for peer in old] == [Life.DRAINING] * 2
    assert town.births() == []


def test_fewer_during_a_reload_leaves_no_worker_too_many() -> None:
    town = Town(count=3)
    town.started()
    new = town.reload(count=3)
    town.ready(*new[:2])
    town.generations.resize(-1, town.now)
    town.ready(*[peer for peer in new if peer.life is Life.STARTING])
    town.tick()
    assert len(town.serving()) == town.generations.current.size == 2


# Recycling.


def test_max_streams_differs_from_worker_to_worker() -> None:
    town = Town(count=1, max_streams=1000)
    limits = [town.generations.limit_of(town.generations.current) for _ in range(300)]
    assert all(1000 * (1 - JITTER) <= limit <= 1000 for limit in limits)
    assert len(set(limits)) > 50
    assert Town(max_streams=1).generations.limit_of(Town(max_streams=1).generations.current) == 1
    assert town.generations.limit_of(Town(max_streams=0).generations.current) == 0


def test_a_worker_that_had_its_streams_is_replaced_and_the_replacement_is_ready_first() -> None:
    town = Town(count=2, max_streams=100)
    first, second = town.started()
    first.given = first.stream_limit - 1
    town.tick()
    assert town.births() == []
    first.given += 1
    town.tick()
    (replacement,) = town.births()
    assert town.births() == []
    town.tick()
    assert first.life is Life.READY
    assert heard(first) == []
    town.ready(replacement)
    assert heard(first) == [Down.DRAIN]
    assert town.serving() == [second, replacement]
    assert first.deadline == town.now + DRAIN_SECS
    town.die(first)
    assert town.births() == []


def test_recycling_is_one_at_a_time() -> None:
    town = Town(count=3, max_streams=10)
    workers = town.started()
    for peer in workers:
        peer.given = 10
    town.tick()
    (replacement,) = town.births()
    town.tick()
    assert town.births() == []
    town.ready(replacement)
    town.tick()
    assert town.births() == []  # the first still drains
    assert town.lives().count(Life.DRAINING) == 1
    town.die(next(peer for peer in workers if peer.life is Life.DRAINING))
    town.tick()
    assert len(town.births()) == 1


def test_a_worker_that_uses_too_much_memory_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    town = Town(count=2, max_rss_mb=100)
    first, second = town.started()
    first.row.store_figures(Figures(rss_bytes=100 << 20))
    second.row.store_figures(Figures(rss_bytes=101 << 20))
    town.tick()
    town.ready(*town.births())
    assert second.life is Life.DRAINING
    assert first.life is Life.READY
    assert f"worker {second.index} is replaced: it uses 101 MB" in caplog.text


def test_without_limits_nobody_is_recycled() -> None:
    town = Town(count=1)
    (peer,) = town.started()
    peer.given = 10**9
    peer.row.store_figures(Figures(rss_bytes=1 << 40))
    town.tick()
    assert town.births() == []


def due(town: Town) -> tuple[Peer, Peer]:
    """A worker that is being recycled, and its replacement, which is not ready yet."""
    victim = town.serving()[0]
    victim.given = victim.stream_limit
    town.tick()
    (replacement,) = town.births()
    return victim, replacement


def test_a_worker_that_dies_while_it_is_being_recycled() -> None:
    town = Town(count=2, max_streams=10)
    town.started()
    victim, replacement = due(town)
    town.die(victim)
    assert town.births() == []  # the replacement is under way
    town.ready(replacement)
    assert len(town.serving()) == 2


def test_a_replacement_that_dies_is_replaced() -> None:
    town = Town(count=1, max_streams=10)
    town.started()
    victim, replacement = due(town)
    town.die(replacement)
    assert victim.life is Life.READY
    assert town.births() == []
    town.now += BACKOFF_FIRST_SECS
    (another,) = town.births()
    town.ready(another)
    assert town.serving() == [another]


def test_a_worker_that_is_told_to_go_while_it_is_being_recycled() -> None:
    """By a SIGTERM of its own. There must not be one too many in the end."""
    town = Town(count=2, max_streams=10)
    town.started()
    victim, replacement = due(town)
    town.generations.retire(victim, town.now)
    assert town.births() == []
    town.ready(replacement)
    town.tick()
    assert len(town.serving()) == 2
    town.die(victim)
    town.tick()
    assert len(town.serving()) == 2
    assert town.births() == []


def test_one_fewer_while_a_worker_is_being_recycled() -> None:
    town = Town(count=2, max_streams=10)
    town.started()
    _, replacement = due(town)
    town.generations.resize(-1, town.now)
    assert replacement.life is Life.DRAINING
    assert len(town.serving()) == 1
    town.die(*[peer for peer in town.peers if peer.life is Life.DRAINING])
    for peer in town.serving():
        peer.given = 10
    town.tick()
    town.ready(*town.births())  # whoever is left has its turn
    assert len(town.serving()) == 1
    assert town.serving()[0].given == 0


def test_a_reload_takes_the_place_of_recycling() -> None:
    town = Town(count=2, max_streams=10)
    old = town.started()
    _, replacement = due(town)
    new = town.reload(max_streams=10)
    assert [peer.generation for peer in new] == [2, 2]
    town.tick()
    assert replacement.life is Life.DRAINING  # nobody needs it
    town.ready(*new)
    assert town.serving() == new
    assert all(peer.life is Life.DRAINING for peer in old)


# Deadlines.


def test_a_drain_ends_by_stop_and_then_by_kill(caplog: pytest.LogCaptureFixture) -> None:
    town = Town(count=1)
    (old,) = town.started()
    old.active = 7
    town.ready(*town.reload(count=1))
    town.tick(DRAIN_SECS - 0.25)
    assert heard(old) == [Down.DRAIN]
    town.tick()
    assert heard(old) == [Down.DRAIN, Down.STOP]
    assert f"worker {old.index}: 7 streams did not finish in time: ending them" in caplog.text
    town.tick(END_GRACE_SECS - 0.25)
    assert not town.killed
    town.tick()
    assert town.killed == [old]


def test_a_deadline_is_not_put_off_by_being_told_again() -> None:
    town = Town(count=1)
    (old,) = town.started()
    town.ready(*town.reload(count=1))
    deadline = old.deadline
    town.tick(10)
    town.generations.retire(old, town.now)  # its own SIGTERM crossed our DRAIN
    assert old.deadline == deadline


def test_the_drain_is_as_long_as_the_configuration_in_force_says() -> None:
    town = Town(count=1)
    (old,) = town.started()
    town.generations.ask(settings(count=1, drain=5), town.now)
    town.ready(*town.births())
    assert old.deadline == town.now + 5


# The end.


def test_a_shutdown_forgets_a_reload() -> None:
    town = Town(count=2)
    town.started()
    new = town.reload(count=3)
    town.reload(count=4)
    town.ready(new[0])
    town.generations.forget()
    assert not town.generations.reloading
    town.die(new[1])
    town.tick()
    assert town.births() == []
    assert not town.changes
    assert town.generations.current.number == 1


def test_a_shutdown_forgets_recycling() -> None:
    town = Town(count=1, max_streams=10)
    town.started()
    victim, replacement = due(town)
    town.generations.forget()
    town.ready(replacement)
    assert heard(victim) == []  # the master tells everyone itself


# Pools.


def by_pool(peers: list[Peer]) -> dict[str, int]:
    return dict(collections.Counter(peer.pool for peer in peers))


def test_every_pool_has_its_own_workers_and_the_dead_are_replaced_where_they_were() -> None:
    town = Town(count=2, heavy=3)
    town.started()
    assert by_pool(town.serving()) == {COMMON: 2, "heavy": 3}
    for pool in (COMMON, "heavy"):
        town.die(town.serving(pool)[0])
        (replacement,) = town.births()
        assert replacement.pool == pool
        town.ready(replacement)
    assert by_pool(town.serving()) == {COMMON: 2, "heavy": 3}


def test_a_reload_waits_for_the_last_worker_of_the_last_pool_and_changes_its_count() -> None:
    town = Town(count=2, heavy=3)
    old = town.started()
    new = town.reload(count=1, heavy=2)
    assert by_pool(new) == {COMMON: 1, "heavy": 2}
    town.ready(*new[:-1])
    spare = town.generations.resize(1, town.now)
    assert spare == 3
    town.ready(*town.births())  # as many are ready as the configuration has, but not all of the pool
    town.tick()
    assert all(peer.generation == 1 for peer in town.serving())
    town.ready(new[-1])
    assert by_pool(town.serving()) == {COMMON: 2, "heavy": 2}
    assert all(heard(peer) == [Down.DRAIN] for peer in old)


def test_pools_come_and_go_with_reloads() -> None:
    town = Town(count=1)
    (old,) = town.started()
    town.ready(*town.reload(count=1, heavy=2))
    assert by_pool(town.serving()) == {COMMON: 1, "heavy": 2}
    town.die(old)
    town.ready(*town.reload(count=1))
    assert by_pool(town.serving()) == {COMMON: 1}
    assert town.births() == []


def test_of_the_coming_generation_a_few_start_at_a_time_whatever_their_pools() -> None:
    town = Town(births_at_once=2, count=1, heavy=3)
    town.started()
    assert by_pool(town.reload(count=1, heavy=3)) == {COMMON: 1, "heavy": 1}


def test_one_more_and_one_fewer_are_the_common_pools() -> None:
    town = Town(count=1, heavy=2)
    town.started()
    for _ in range(3):
        assert town.generations.resize(-1, town.now) == 1
    assert by_pool(town.serving()) == {COMMON: 1, "heavy": 2}
    assert town.generations.resize(5000, town.now) == WORKERS_WANTED_MAX - 2
    assert town.generations.resize(5000, town.now) == WORKERS_WANTED_MAX - 2


def test_a_worker_is_recycled_when_another_of_its_own_pool_is_ready() -> None:
    town = Town(count=1, heavy=1, max_streams=10)
    common, heavy = town.started()
    heavy.given = heavy.stream_limit
    town.tick()
    (heir,) = town.births()
    assert heir.pool == "heavy"
    common.given = common.stream_limit
    town.die(common)
    (other,) = town.births()
    town.ready(other)  # which is no reason for `heavy` to go
    assert heavy.life is Life.READY
    town.ready(heir)
    assert heavy.life is Life.DRAINING
    assert by_pool(town.serving()) == {COMMON: 1, "heavy": 1}


def test_there_is_no_moment_without_a_ready_worker_in_any_pool() -> None:
    """Whatever is asked for in whatever order."""

    def first_of(town: Town, life: Life, pool: str) -> list[Peer]:
        return [peer for peer in town.peers if peer.life is life and peer.pool == pool][:1]

    def wear_out(town: Town) -> None:
        for peer in town.serving("heavy")[:1]:
            peer.given = peer.stream_limit

    acts: list[Callable[[Town], object]] = [
        lambda town: town.generations.ask(settings(count=1, heavy=2, max_streams=10), town.now),
        lambda town: town.generations.resize(-1, town.now),
        lambda town: town.ready(*first_of(town, Life.STARTING, "heavy")),
        lambda town: town.ready(*first_of(town, Life.STARTING, COMMON)),
        wear_out,
        Town.tick,
    ]
    for order in itertools.product(acts, repeat=4):
        town = Town(count=2, heavy=1, max_streams=10)
        town.started()
        for act in order:
            act(town)
            town.births()
            assert town.serving(COMMON), order
            assert town.serving("heavy"), order
        for _ in range(5):
            town.ready(*[peer for peer in town.peers if peer.life is Life.STARTING])
            town.die(*[peer for peer in town.peers if peer.life is Life.DRAINING])
            town.tick()
            town.births()
        assert by_pool(town.serving()) == town.generations.current.wanted, order
        assert len(town.peers) == town.generations.current.size, order
