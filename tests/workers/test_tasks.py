"""Handlers that are tasks: each says once that it has ended, whenever it is told to."""

import threading
from collections.abc import AsyncIterator
from typing import Any

from forkd.handler import Handoff
from tests.harness import wait_for
from workers.handlers.run import Ended
from workers.handlers.tasks import Host, TaskRun


class Letters:
    """Stands in for the mailbox."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, _receiver: object, piece: Any) -> None:
        self.said.append(piece)


async def answer(_handoff: Handoff) -> AsyncIterator[str]:
    yield "word"


def test_a_stream_that_is_over_before_its_task_has_begun() -> None:
    letters = Letters()
    host = Host(letters)  # type: ignore[arg-type]
    run = TaskRun(answer, Handoff("id", "own"), "own", letters, None)  # type: ignore[arg-type]
    run.lives = False
    run.gate = run.host = run.task = None
    goes_on = threading.Event()
    host.loop.call_soon_threadsafe(goes_on.wait)  # somebody holds the loop up
    host.begin(run)
    run.cancelled = True
    host.cancel(run)
    goes_on.set()
    wait_for(lambda: letters.said, "it has ended")
    host.stop()
    wait_for(lambda: len(letters.said) == 2, "the loop has ended, too")
    assert letters.said == [Ended(), ""]


def test_a_loop_that_answers_just_now_was_not_held_up_for_days() -> None:
    letters = Letters()
    host = Host(letters)  # type: ignore[arg-type]
    assert host.blocked(86400.0) == "a callback blocks its asyncio loop for 0 s"
    host.stop()
    wait_for(lambda: letters.said, "the loop has ended")
