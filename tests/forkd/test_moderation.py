"""Moderation: a busy loop pauses, and only a busy one."""

from forkd.moderation import BUSY_AFTER, Moderation


def turn(moderation: Moderation, waited: float) -> None:
    moderation.pause()
    moderation.woken(waited)


def test_only_a_busy_loop_pauses_and_stays_so_while_something_is_always_there() -> None:
    slept: list[float] = []
    moderation = Moderation(0.001, 0.0008, slept.append)
    for _ in range(BUSY_AFTER):
        turn(moderation, 0.0007)
    assert not slept
    for _ in range(10):
        turn(moderation, 0.0)
    assert slept == [0.001] * 10


def test_one_long_wait_ends_it() -> None:
    slept: list[float] = []
    moderation = Moderation(0.001, 0.0008, slept.append)
    for _ in range(BUSY_AFTER + 1):
        turn(moderation, 0.0)
    turn(moderation, 0.0009)
    slept.clear()
    for _ in range(BUSY_AFTER):
        turn(moderation, 0.0)
    assert not slept
