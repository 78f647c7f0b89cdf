"""Names to addresses: what is asked, how often, and what stands in when there is no answer."""

import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from workers.loop import Loop
from workers.upstream.dns import CACHE_SECS, RETRY_SECS, Address, Resolver

ONE = Address(socket.AF_INET, ("192.0.2.1", 443))
TWO = Address(socket.AF_INET6, ("2001:db8::2", 443, 0, 0))


class Threads:
    """Stands for the threads: what is to run waits until the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []

    def run(self, function: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.jobs.append((function, done))

    def finish(self) -> None:
        function, done = self.jobs.pop(0)
        try:
            outcome = function()
        except Exception as error:
            outcome = error
        done(outcome)


class World:
    def __init__(self) -> None:
        self.loop = Loop()
        self.threads = Threads()
        self.found: list[Address] | Exception = [ONE, TWO]
        self.asked: list[tuple[str, int]] = []
        self.resolver = Resolver(self.loop, self.threads, self.look_up)  # type: ignore[arg-type]
        self.answers: list[tuple[list[Address], str]] = []

    def look_up(self, host: str, port: int) -> list[Address]:
        self.asked.append((host, port))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def resolve(self, host: str = "api.test") -> None:
        def answer(addresses: Sequence[Address], fault: str) -> None:
            self.answers.append((list(addresses), fault))

        self.resolver.resolve(host, 443, answer)


@pytest.fixture
def world():
    world = World()
    yield world
    world.loop.close()


def test_one_question_answers_all_who_wait_and_all_who_come_soon(world: World) -> None:
    world.resolve()
    world.resolve()
    assert not world.answers
    world.threads.finish()
    world.resolve()
    assert world.answers == [([ONE, TWO], "")] * 3
    assert world.asked == [("api.test", 443)]
    world.loop.now += CACHE_SECS
    world.resolve()
    world.threads.finish()
    assert len(world.asked) == 2


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("192.0.2.7", socket.AF_INET)]
)
def test_a_numeric_address_needs_no_question(world: World, host: str, family: int) -> None:
    world.resolve(host)
    [(addresses, fault)] = world.answers
    assert (addresses[0].family, addresses[0].sockaddr[:2], fault) == (family, (host, 443), "")
    assert not world.threads.jobs


def test_an_old_answer_stands_in_for_a_failure(world: World) -> None:
    world.resolve()
    world.threads.finish()
    world.loop.now += CACHE_SECS
    world.found = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    world.resolve()
    world.threads.finish()
    assert world.answers[-1] == ([ONE, TWO], "")
    world.resolve()  # not asked again at once
    assert len(world.asked) == 2
    world.loop.now += RETRY_SECS
    world.found = [TWO]
    world.resolve()
    world.threads.finish()
    assert world.answers[-1] == ([TWO], "")


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (UnicodeError("label too long"), "label too long"),
        ([], "the name has no address"),
    ],
)
def test_a_name_that_cannot_be_resolved(world: World, found: Any, fault: str) -> None:
    world.found = found
    world.resolve()
    world.threads.finish()
    assert world.answers == [([], fault)]
    world.found = [ONE]
    world.resolve()  # and is asked again, for the next one
    world.threads.finish()
    assert world.answers[-1] == ([ONE], "")


def test_an_address_that_worked_comes_first_from_then_on(world: World) -> None:
    world.resolve()
    world.threads.finish()
    world.resolver.prefer("api.test", 443, TWO)
    world.resolve()
    assert world.answers[-1] == ([TWO, ONE], "")
    world.loop.now += CACHE_SECS
    world.resolve()
    world.threads.finish()
    assert world.answers[-1] == ([TWO, ONE], "")
    world.resolver.prefer("unknown.test", 443, TWO)
