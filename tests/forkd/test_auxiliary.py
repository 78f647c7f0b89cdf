"""The master's helper process: what its end does to the master."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forkd.auxiliary import Auxiliary
from forkd.logs import Sink
from forkd.selector import Ready, Selector
from tests.harness import fail, own_fds, wait_for


@pytest.fixture
def selector() -> Iterator[Selector[Ready]]:
    own: Selector[Ready] = Selector(fail)
    yield own
    own.close()


def helper(selector: Selector[Ready], log: Path) -> Auxiliary:
    logs: Any = SimpleNamespace(logger=logging.getLogger("test"), sink=Sink(str(log)), rename=lambda _name: None)
    return Auxiliary("test", selector, logs, lambda lifeline: os.read(lifeline, 1) and None, lambda: ())


def test_one_that_is_ended_in_the_turn_in_which_it_died_is_buried_once(
    selector: Selector[Ready], tmp_path: Path
) -> None:
    """Its event is on the way when `stop` comes first, and there must be no waiting for just any child."""
    before = own_fds()
    one = helper(selector, tmp_path / "log")
    one.maintain(0.0)
    os.kill(one.pid, signal.SIGKILL)
    found: list[tuple[int, int]] = []
    wait_for(lambda: found.extend(selector.select(0)) or found, "its death is told")
    one.stop()
    assert one.pid == 0
    selector.serve(found)
    assert one.pid == 0
    assert selector.registered == 0
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    os.close(one._logs.sink.fd)
    assert own_fds() == before


def test_one_that_dies_is_started_again(selector: Selector[Ready], tmp_path: Path) -> None:
    one = helper(selector, tmp_path / "log")
    one.maintain(0.0)
    first = one.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: (selector.serve(selector.select(0)), one.pid != first)[1], "it is buried")
    one.maintain(float("inf"))
    assert one.pid not in (0, first)
    one.stop()
    os.close(one._logs.sink.fd)
