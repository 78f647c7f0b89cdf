"""Moderation: a busy loop pauses, and only a busy one."""

from forkd.moderation import WINDOW_SECS, WORTH, Moderation

PAUSE_SECS = 0.001


class Busy:
    """A loop that looks once in a millisecond and finds `things`."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.moderation = Moderation(PAUSE_SECS, self.slept.append)
        self.now = 1000.0
        self.turn(0)

    def turn(self, things: int, waited: float = 0.001, *, full: bool = False) -> None:
        self.moderation.pause()
        self.now += waited
        self.moderation.looked(self.now, things, full)

    def window(self, things: int) -> list[float]:
        """More than one window with so many things a turn. How long it paused meanwhile."""
        self.slept.clear()
        for _ in range(int(WINDOW_SECS / 0.001) + 2):
            self.turn(things)
        return self.slept


def test_only_a_loop_with_enough_to_gather_pauses() -> None:
    loop = Busy()
    assert loop.window(WORTH - 1) == []
    assert loop.window(WORTH - 1) == [], "however long"
    loop.window(WORTH + 1)
    assert loop.window(WORTH + 1) == [PAUSE_SECS] * len(loop.slept) != []
    assert len(loop.window(WORTH + 1)) == int(WINDOW_SECS / 0.001) + 2, "at each turn"


def test_with_less_to_do_it_stops() -> None:
    loop = Busy()
    loop.window(10)
    assert loop.window(10)
    loop.window(1)
    assert loop.window(1) == []


def test_what_did_not_fit_into_one_look_is_not_made_to_wait_for_more() -> None:
    loop = Busy()
    loop.window(10)
    loop.turn(10, full=True)
    loop.slept.clear()
    loop.turn(10)
    assert loop.slept == []
    loop.turn(10)
    assert loop.slept == [PAUSE_SECS], "and then it is as busy as before"


def test_after_a_long_wait_what_came_before_does_not_count() -> None:
    loop = Busy()
    loop.window(10)
    loop.turn(10, waited=1.0)
    loop.slept.clear()
    loop.turn(10)
    assert loop.slept == []


def test_a_moment_is_judged_as_a_whole_window() -> None:
    """A handful of things at once, out of nowhere, is no reason to make anybody wait."""
    loop = Busy()
    loop.turn(0, waited=1.0)
    loop.slept.clear()
    for _ in range(5):
        loop.turn(5, waited=0.0001)
    assert loop.slept == []
