"""RelaySource beside a pool that does what the test says."""

import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.settings import OpenAiBackend as Settings
from tests.harness import PATIENCE_SECS
from tests.workers.kit import World
from workers.attachments import Attachments
from workers.backends.openai import OpenAiBackend
from workers.relay import OUTRUN_MAX, RelaySource
from workers.request import parse
from workers.upstream.exchange import Exchange, Failure
from workers.upstream.message import HttpRequest

STALE = Failure("backend_reset", "it closed the connection", stale=True)
OUTRUN = Failure("backend_unavailable", "HTTP/2: GOAWAY, NO_ERROR", unseen=True, outrun=True)


class FakePool:
    def __init__(self) -> None:
        self.asked: list[Exchange] = []
        self.error: Exception | None = None

    def ask(self, request: HttpRequest, receiver: RelaySource, *, fresh: bool = False) -> Exchange:
        if self.error is not None:
            raise self.error
        self.asked.append(Exchange(request, receiver, fresh=fresh))
        return self.asked[-1]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch)
    world.context.attachments = Attachments(str(tmp_path))
    yield world
    world.context.files.close()
    world.close()


def begin(world: World, pool: Any, payload: bytes, **settings: Any) -> Any:
    """The client of a stream that `pool` is to feed."""
    backend = OpenAiBackend("openai", Settings(**settings))
    world.context.pools["openai"] = pool
    stream, client = world.stream(payload)
    stream.begin(backend, RelaySource(world.context, stream, backend, parse(payload, envelopes=True)))
    return client


def test_a_connection_that_had_died_is_made_up_for_once(world: World) -> None:
    pool = FakePool()
    client = begin(world, pool, b'{"prompt":"x"}', retries=0)
    pool.asked[0].fail(STALE)
    assert [exchange.fresh for exchange in pool.asked] == [False, True]
    pool.asked[1].fail(STALE)
    assert world.read(client).json["code"] == "backend_reset"
    assert len(pool.asked) == 2


def test_an_upstream_whose_every_connection_runs_out_is_not_asked_for_ever(world: World) -> None:
    pool = FakePool()
    client = begin(world, pool, b'{"prompt":"x"}', retries=0)
    asked = 0
    while asked < len(pool.asked):
        pool.asked[asked].fail(OUTRUN)
        asked += 1
    assert asked == 1 + OUTRUN_MAX
    assert world.read(client).json["code"] == "backend_unavailable"


def test_a_bug_met_after_the_attachments_were_read_ends_the_stream_at_once(world: World, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("the note")
    pool = FakePool()
    pool.error = ValueError("a header field holds what cannot be sent")
    began = world.loop.now
    client = begin(world, pool, b'{"prompt":"{note}","attachments":{"note":"note"}}', first_byte_timeout_secs=600)
    select.select([world.context.files._wakeup_fd], [], [], PATIENCE_SECS)  # the thread's time is not the loop's
    assert world.read(client).json["code"] == "internal_error"
    assert world.loop.now - began < 600
