"""The loop: readiness, time, and errors that stay with whoever made them."""

import os
import socket
import threading
from selectors import EVENT_READ, EVENT_WRITE

import pytest

from forkd.moderation import WINDOW_SECS
from tests.workers.kit import World
from workers.loop import LONGEST_SLEEP_SECS, Loop, to_ticks


class Probe:
    """Notes what is called, and at which tick."""

    def __init__(self, world: World, name: str = "", log: list[tuple[str, int]] | None = None) -> None:
        self.world = world
        self.name = name
        self.log: list[tuple[str, int]] = [] if log is None else log
        self.errors: list[Exception] = []
        self.fails = False

    def tick(self) -> None:
        self.log.append((self.name, self.world.loop.at))
        if self.fails:
            raise ValueError(self.name)

    def on_ready(self, mask: int) -> None:
        self.log.append((self.name, mask))
        if self.fails:
            raise ValueError(self.name)

    def crashed(self, error: Exception) -> None:
        self.errors.append(error)


def test_deadlines_come_in_order_each_at_its_tick(world: World) -> None:
    log: list[tuple[str, int]] = []
    start = world.loop.at
    for name, ticks in (("c", 30), ("a", 10), ("b", 20), ("a2", 10), ("soon", 0), ("past", -5)):
        world.loop.after(ticks, Probe(world, name, log))
    world.advance(1)
    assert log == [
        ("soon", start + 1),
        ("past", start + 1),
        ("a", start + 10),
        ("a2", start + 10),
        ("b", start + 20),
        ("c", start + 30),
    ]


def test_a_deadline_set_in_a_deadline_comes_in_a_later_tick(world: World) -> None:
    class Again(Probe):
        def tick(self) -> None:
            super().tick()
            if len(self.log) < 5:
                self.world.loop.after(0, self)

    again = Again(world)
    start = world.loop.at
    world.loop.after(1, again)
    world.advance(1)
    assert [at for _, at in again.log] == [start + 1, start + 2, start + 3, start + 4, start + 5]


def test_a_loop_that_was_held_up_keeps_everybodys_pace(world: World) -> None:
    """What was due is done late, and its followers count from when it was due."""

    class Every(Probe):
        def tick(self) -> None:
            super().tick()
            self.world.loop.after(10, self)

    every = Every(world)
    start = world.loop.at
    world.loop.after(10, every)
    world.clock.now += 1.0
    world.loop.turn()
    assert [at - start for _, at in every.log] == list(range(10, 101, 10))
    assert world.loop.at - start == pytest.approx(100, abs=1)


def test_it_wakes_to_show_that_it_lives(world: World) -> None:
    before = world.clock.now
    world.loop.turn()
    assert world.clock.now - before == pytest.approx(LONGEST_SLEEP_SECS, abs=0.01)
    assert world.loop.now == pytest.approx(world.clock.now, abs=0.01)


def test_errors_go_to_whoever_made_them(world: World) -> None:
    log: list[tuple[str, int]] = []
    bad, good = Probe(world, "bad", log), Probe(world, "good", log)
    bad.fails = True
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for probe in (bad, good):
            world.loop.after(1, probe)
        world.loop.selector.register(ours.fileno(), EVENT_READ | EVENT_WRITE, bad)
        world.loop.selector.register(theirs.fileno(), EVENT_WRITE, good)
        world.loop.turn()
        world.loop.selector.unregister(ours.fileno())
        world.loop.selector.unregister(theirs.fileno())
    world.advance(0.1)
    assert {name for name, _ in log} == {"bad", "good"}
    assert len(bad.errors) == 2
    assert good.errors == []


def test_the_real_clock_too() -> None:
    loop = Loop()
    done: list[float] = []

    class Done:
        def tick(self) -> None:
            done.append(loop.now)

        def crashed(self, error: Exception) -> None:
            raise error

    started = loop.now
    loop.after(3, Done())
    for _ in range(1000):
        loop.turn()
        if done:
            break
    assert done[0] - started >= 0.02
    loop.close()


@pytest.mark.parametrize(("secs", "ticks"), [(0, 1), (0.001, 1), (0.014, 1), (0.016, 2), (1, 100), (300, 30_000)])
def test_to_ticks(secs: float, ticks: int) -> None:
    assert to_ticks(secs) == ticks


def test_a_busy_loop_waits_for_what_is_slow_and_not_for_what_hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that outlasts any test: only what hurries can end it."""
    monkeypatch.setattr("workers.loop.PAUSE_SECS", 3600.0)
    loop = Loop()
    seen: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_ready(self, _mask: int) -> None:
            seen.append(self.name)

        def crashed(self, error: Exception) -> None:
            raise error

    token, client = os.eventfd(1), os.eventfd(0)
    loop.selector.register(token, EVENT_READ, Noted("token"))
    loop.selector.register(client, EVENT_READ, Noted("client"))
    loop.hurry(client)
    loop.turn()
    loop._moderation.looked(loop.now + 2 * WINDOW_SECS, 1, False)
    seen.clear()
    timer = threading.Timer(0.02, os.eventfd_write, (client, 1))
    timer.start()
    loop.turn()
    assert sorted(seen) == ["client", "token"]
    timer.join()
    assert loop._urgent.poll(0)
    loop.hurry_no_more(client)
    assert not loop._urgent.poll(0)
    for fd in (token, client):
        loop.selector.unregister(fd)
        os.close(fd)
    loop.close()


def test_what_is_queued_goes_out_at_the_end_of_the_turn_and_a_crash_costs_nobody_else() -> None:
    loop = Loop()
    said: list[str] = []

    class Queued:
        def __init__(self, name: str) -> None:
            self.name = name

        def flush(self) -> None:
            said.append(self.name)
            if self.name == "bad":
                raise ValueError(self.name)

        def crashed(self, error: Exception) -> None:
            said.append(f"crashed {error}")

    class Timed:
        def tick(self) -> None:
            loop.queued += [Queued("one"), Queued("bad"), Queued("two")]
            said.append("tick")

        def crashed(self, error: Exception) -> None:
            raise error

    loop.after(1, Timed())
    while not said:
        loop.turn()
    assert said == ["tick", "one", "bad", "crashed bad", "two"]
    loop.turn()
    assert len(said) == 5
    loop.close()
