"""What handlers may yield, and may do to the worker they run in."""

import logging
import logging.config
from typing import Any

import pytest

from forkd.handler import Event, Handoff
from tests.workers.kit import World
from workers import sse
from workers.handlers.run import BadYield, Run
from workers.handlers.watch import Handlers


class Letters:
    """Stands in for the mailbox."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, _receiver: object, piece: Any) -> None:
        self.said.append(piece)


class Markup(str):
    """As templating libraries have it."""

    __slots__ = ()

    def __str__(self) -> str:
        return "not this"


def a_run() -> tuple[Run, list[Any]]:
    letters = Letters()
    run = Run(lambda _: None, Handoff("id", "own"), "own", letters, None)  # type: ignore[arg-type]
    return run, letters.said


@pytest.mark.parametrize("text", ["<b>", "☃"])
def test_text_of_a_type_of_its_own_is_text(text: str) -> None:
    run, said = a_run()
    run.give(Markup(text))
    assert sse.content_event(said[0]) == sse.content_event(text)


def test_an_event_that_is_none() -> None:
    run, said = a_run()
    with pytest.raises(BadYield):
        run.give(Event("name", 5))  # type: ignore[arg-type]
    assert not said


def test_a_module_that_configures_logging_does_not_silence_forkd(world: World) -> None:
    handlers = logging.getLogger().handlers[:]
    logging.config.dictConfig({"version": 1})  # which disables all loggers that there are
    Handlers(world.loop, world.context.logs.logger, {}).look()
    world.context.log.warning("heard")
    assert "heard" in world.log.read_text()
    logging.getLogger().handlers[:] = handlers
