"""The whole way: a client, a real Apache with PHP and our module, the page's own endpoint, forkd and back."""

import asyncio
import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import Apache, public_dir

from tests.harness import Answer, Forkd, running, wait_for

HTDOCS = Path(__file__).parents[2] / "apache" / "htdocs"
WHOLE = "Hello! I am forkd's mock backend. Each of these words comes to you as its own server-sent event."


@contextlib.contextmanager
def site(mpm: str, *, workers: int = 5, **config: Any) -> Iterator[tuple[Apache, Forkd]]:
    """A forkd and an Apache that hands over to it, with the page's files."""
    with public_dir() as public, public_dir(0o777) as run:
        docroot = public / "htdocs"
        shutil.copytree(HTDOCS, docroot)
        (docroot / "plain.html").write_text("plain page\n")
        config.setdefault("server", {})["socket_mode"] = "0666"
        with running(run, config=config) as forkd:
            conf = f"SetEnv FORKD_SOCKET {forkd.path}\nSocketHandoffFormat envelope\nListenBacklog 4096\n"
            with Apache(mpm, docroot, run, conf, workers=workers) as apache:
                yield apache, forkd


@pytest.fixture(scope="module", params=["prefork", "event", "worker"])
def whole(request: pytest.FixtureRequest) -> Iterator[tuple[Apache, Forkd]]:
    with site(request.param) as pair:
        yield pair


def raw(response: requests.Response) -> Answer:
    """The answer as the harness reads it."""
    head = f"HTTP/1.1 {response.status_code} {response.reason}\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in response.headers.items()
    )
    return Answer(head.encode("latin-1") + b"\r\n" + response.content)


def test_a_stream_comes_through_php(whole: tuple[Apache, Forkd]) -> None:
    apache, forkd = whole
    answer = raw(requests.get(apache.url + "/stream.php", params={"prompt": "Grüße & mehr"}, timeout=30))
    assert answer.status == 200
    assert answer.header("content-type") == "text/event-stream"
    assert "visitor=" in (answer.header("set-cookie") or "")
    assert answer.header("x-socket-handoff") is None
    assert answer.text == WHOLE
    assert answer.complete
    own = answer.header("x-request-id")
    line = wait_for(lambda: next((one for one in forkd.access_lines() if one["request_id"] == own), None), "its line")
    assert line["remote"] == "127.0.0.1"
    assert line["reason"] == "ok"
    assert line["user_id"] in (answer.header("set-cookie") or "")


def test_a_long_conversation_comes_through_php(whole: tuple[Apache, Forkd]) -> None:
    apache, forkd = whole
    history = [{"role": "user", "content": f"{number} " * 40_000} for number in range(2)]
    form = {"prompt": "Go on", "messages": json.dumps(history)}
    answer = raw(requests.post(apache.url + "/stream.php", data=form, timeout=30))
    assert answer.status == 200
    assert answer.complete
    assert "answered with defaults" not in forkd.log()


def test_2000_streams_at_once_leave_apache_free(capsys: pytest.CaptureFixture[str]) -> None:
    """Five Apache workers, two thousand streams that all are live at the same time, and a plain page meanwhile."""
    count = 2000
    text = "one two three four"
    with site("prefork", workers=5, backends={"mock": {"provider": "mock", "token_delay_ms": 4000, "text": text}}) as (
        apache,
        forkd,
    ):
        before = forkd.idle_fds()
        streams, page_secs = asyncio.run(_crowd(apache.port, count))
        answers = [Answer(stream) for stream in streams]
        assert [answer.status for answer in answers] == [200] * count
        assert all(answer.complete and answer.text == text for answer in answers)
        forkd.wait_for_metric("daemon_chunks_sent_total", 4 * count)
        forkd.wait_for_metric("daemon_active_connections", 0)
        assert forkd.metric("daemon_peak_streams") == count
        assert forkd.idle_fds() == before
    with capsys.disabled():
        page_ms = [1000 * secs for secs in page_secs]
        print(f"\nplain page while {count} streams are live: median {statistics.median(page_ms):.1f} ms, "
              f"slowest {max(page_ms):.1f} ms of {len(page_ms)}")  # fmt: skip


async def _crowd(port: int, count: int) -> tuple[list[bytes], list[float]]:
    """Open `count` streams; once every one has its first bytes, ask for the plain page 50 times."""
    begun = asyncio.Semaphore(0)
    connecting = asyncio.Semaphore(50)

    async def stream(number: int) -> bytes:
        async with connecting:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /stream.php?prompt=%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % number)
            pieces = [await reader.read(65536)]
        begun.release()
        while piece := await reader.read(65536):
            pieces.append(piece)
        writer.close()
        return b"".join(pieces)

    tasks = [asyncio.create_task(stream(number)) for number in range(count)]
    for _ in tasks:
        await begun.acquire()
    assert not any(task.done() for task in tasks), "not all streams were live at once"
    page_secs = []
    for _ in range(50):
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /plain.html HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        page = await reader.read()
        writer.close()
        assert page.endswith(b"\r\n\r\nplain page\n")
        page_secs.append(time.monotonic() - started)
    return [await task for task in tasks], page_secs


def test_a_daemon_that_is_gone_is_an_error_the_page_can_read() -> None:
    with site("prefork") as (apache, forkd):
        assert forkd.stop() == 0
        response = requests.get(apache.url + "/stream.php", params={"prompt": "Hello"}, timeout=30)
        assert response.status_code == 503
        assert response.json()["code"] == "daemon_unavailable"
        assert response.headers["retry-after"]
