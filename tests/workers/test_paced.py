"""The source for backends that answer from themselves."""

from collections.abc import Iterable

import pytest

from tests.workers.kit import World, read_now
from workers.backends.mock import MockBackend
from workers.paced import PacedSource

BACKEND = MockBackend("mock", "", 0)


def begin(world: World, steps: Iterable[tuple[float, str]], *, narrow: bool = False) -> tuple[object, ...]:
    stream, client = world.stream(narrow=narrow)
    source = PacedSource(world.context, stream, iter(steps))
    stream.begin(BACKEND, source)
    return stream, client, source


def test_texts_come_at_their_pace(world: World) -> None:
    stream, client, _ = begin(world, [(0.0, "a"), (0.5, "b"), (0.0, "c"), (1.0, "d")])
    seen = []
    for _ in range(4):
        seen.append((b'"a"' in (got := read_now(client)), b'"b"' in got, b'"c"' in got, b'"d"' in got))
        world.advance(0.5)
    assert seen == [
        (True, False, False, False),
        (False, True, True, False),
        (False, False, False, False),
        (False, False, False, True),
    ]
    assert world.read(client).raw == b""
    assert stream.outcome == "ok"


def test_a_delay_before_the_end_counts_too(world: World) -> None:
    stream, client, _ = begin(world, [(0.0, "a"), (1.0, "")])
    world.advance(0.9)
    assert b"[DONE]" not in read_now(client)
    world.advance(0.2)
    assert b"[DONE]" in read_now(client)
    assert stream.chunks == 1
    world.read(client)


def test_nothing_to_say(world: World) -> None:
    _, client, _ = begin(world, [])
    answer = world.read(client)
    assert answer.status == 200
    assert answer.complete
    assert answer.text == ""


def test_no_more_once_the_client_is_gone(world: World) -> None:
    taken = []

    def steps() -> Iterable[tuple[float, str]]:
        for number in range(100):
            taken.append(number)
            yield 0.1, str(number)

    stream, client, _ = begin(world, steps())
    world.advance(0.5)
    client.close()
    world.until(lambda: not world.context.streams)
    count = len(taken)
    world.advance(5)
    assert len(taken) == count < 10
    assert stream.outcome == "client_disconnected"


@pytest.mark.parametrize("delay", [0.0, 0.01])
def test_a_slow_client_is_waited_for(world: World, delay: float) -> None:
    taken = []

    def steps() -> Iterable[tuple[float, str]]:
        for number in range(500):
            taken.append(number)
            yield delay, f"{number} " + "x" * 1000

    stream, client, _ = begin(world, steps(), narrow=True)
    world.advance(3)
    assert len(taken) < 100  # 64 KB, and what the socket took
    assert stream.live
    answer = world.read(client)
    assert answer.complete
    assert [int(word) for word in answer.text.replace("x", "").split()] == list(range(500))


def test_a_backend_that_breaks_midway(world: World) -> None:
    def steps() -> Iterable[tuple[float, str]]:
        yield 0.0, "a"
        yield 0.1, "b"
        raise ValueError("a bug")

    stream, client, _ = begin(world, steps())
    answer = world.read(client)
    assert answer.text == "ab"
    assert not answer.complete
    assert answer.error is not None
    assert answer.error["code"] == stream.outcome == "internal_error"
    assert "ValueError: a bug" in world.log.read_text()
