"""What the workers' tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers.kit import World


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Makes a worker's surroundings, with `server` settings."""
    made: list[World] = []

    def make(**server: Any) -> World:
        made.append(World(tmp_path, monkeypatch, **server))
        return made[-1]

    yield make
    for world in made:
        assert not world.context.streams, "a test left streams behind"
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
