"""The whole way where nothing can be handed off: HTTPS and HTTP/2 that end in Apache, PHP, forkd and back."""

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest
from handoff_site import make_docroot
from harness import public_dir
from secure import Broken, Http1, Http2, SecureSite, query, read_all, secure_site

from tests.harness import Answer, Forkd, running, wait_for

HTDOCS = Path(__file__).parents[2] / "apache" / "htdocs"
CONF = """
SetEnv FORKD_SOCKET {path}
SocketHandoffFormat envelope
SocketHandoffFallback relay
SendBufferSize 16384
"""
BIG = " ".join(f"{number:040}" for number in range(2200))
"""Some 140 KB as events: more than the narrow way to the client takes, and less than with a Unix socket's buffer."""
CONFIG: dict[str, Any] = {
    "server": {"socket_mode": "0666", "linger_secs": 0.2, "write_timeout_secs": 60},
    "default_backend": "typing",
    "backends": {
        "typing": {"provider": "typing", "token_delay_ms": 0},
        "slow": {"provider": "mock", "token_delay_ms": 50, "text": "and " * 2000},
        "big": {"provider": "mock", "token_delay_ms": 0, "text": BIG},
    },
}
Way: TypeAlias = type[Http1] | type[Http2]
Served: TypeAlias = tuple[SecureSite, Forkd, Way]


@contextlib.contextmanager
def serve(mpm: str, way: Way, **config: Any) -> Iterator[Served]:
    with public_dir() as public, public_dir(0o777) as run:
        docroot = public / "htdocs"
        shutil.copytree(HTDOCS, docroot)
        make_docroot(docroot)
        with (
            running(run, config={**CONFIG, **config}) as forkd,
            secure_site(mpm, docroot, run, CONF.format(path=forkd.path)) as site,
        ):
            yield site, forkd, way


@pytest.fixture(scope="module", params=[("prefork", Http1), ("event", Http1), ("event", Http2)], ids=str)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve(*request.param) as three:
        yield three


def ask(served: Served, backend: str, *, narrow: bool = False) -> Http1 | Http2:
    """A stream of that backend, by a script that does nothing else."""
    site, forkd, way = served
    data = json.dumps({"prompt": "Hello", "backend": backend})
    return way(site, query("/handoff.php", path=forkd.path, source="body", data=data), narrow=narrow)


def whole(answer: Http1 | Http2) -> Answer:
    """As the harness reads answers, to the end."""
    status = answer.status
    return Answer(f"HTTP/1.1 {status} x\r\n\r\n".encode() + read_all(answer))


def first(answer: Http1 | Http2) -> bytes:
    assert answer.status == 200
    return answer.read()


def test_a_stream_comes_through(served: Served) -> None:
    site, forkd, way = served
    relayed, lines = forkd.metric("forkd_handoffs_relayed_total"), len(forkd.access_lines())
    answer = way(site, query("/stream.php", prompt="Grüße & mehr"))
    assert answer.header("Content-Type") == ["text/event-stream"]
    assert answer.header("X-Accel-Buffering") == ["no"]
    (cookie,) = answer.header("Set-Cookie")
    (own,) = answer.header("X-Request-Id")
    got = whole(answer)
    assert got.complete
    assert got.text == "Grüße & mehr"
    answer.close()
    (line,) = wait_for(lambda: forkd.access_lines()[lines:], "its line")
    assert (line["request_id"], line["remote"], line["reason"]) == (own, "127.0.0.1", "ok")
    assert line["user_id"] in cookie
    forkd.wait_for_metric("forkd_handoffs_relayed_total", relayed + 1)


def test_a_client_that_goes_ends_the_stream(served: Served) -> None:
    _, forkd, _ = served
    with forkd.counting(stream_client_disconnected=1):
        answer = ask(served, "slow")
        assert first(answer).startswith(b"data: ")
        answer.close()
    answer.hang_up()


def test_an_error_of_forkds_is_the_clients(served: Served) -> None:
    answer = ask(served, "nonesuch")
    assert answer.status == 400
    assert Answer(b"HTTP/1.1 400 x\r\n\r\n" + read_all(answer)).json["code"] == "unknown_backend"
    answer.close()


def test_a_worker_that_dies_is_an_event_and_an_orderly_end(served: Served) -> None:
    _, forkd, _ = served
    before = forkd.log().count(" ready (pid")
    answer = ask(served, "slow")
    head = first(answer)
    for pid in forkd.workers():
        os.kill(pid, signal.SIGKILL)
    got = Answer(b"HTTP/1.1 200 x\r\n\r\n" + head + read_all(answer))
    assert got.error is not None
    assert got.error["code"] == "worker_lost"
    answer.close()
    wait_for(lambda: forkd.log().count(" ready (pid") == before + 2, "the workers are replaced")


def test_a_client_too_slow_for_the_linger_finds_the_end(served: Served) -> None:
    """forkd has said all and waits for the pump, which waits for the client. A closed socket would be a death."""
    _, forkd, _ = served
    lines = len(forkd.access_lines())
    answer = ask(served, "big", narrow=True)
    wait_for(lambda: forkd.access_lines()[lines:], "forkd has said all")
    with forkd.hand_over(b'{"prompt":"x"}') as other:
        while other.recv(65536):
            pass
        wait_for(lambda: hung_up(other), "a linger that began later is over")
    got = whole(answer)
    assert got.complete
    assert got.text == BIG
    answer.close()


def hung_up(sock: socket.socket) -> bool:
    """Whether the other end is closed."""
    try:
        sock.send(b"x")
    except OSError:
        return True
    return False


def test_a_daemon_that_is_killed() -> None:
    """Nobody says the end, so it is none."""
    with serve("event", Http1) as (site, forkd, _), contextlib.ExitStack() as stack:
        answers = [begin((site, forkd, way), stack) for way in (Http1, Http2)]
        master = psutil.Process(forkd.pid)
        for process in [master, *master.children(recursive=True)]:
            process.kill()
        for answer in answers:
            with pytest.raises(Broken):
                read_all(answer)


def test_an_apache_that_is_killed() -> None:
    """To forkd the clients are gone."""
    with serve("event", Http1) as (site, forkd, _), contextlib.ExitStack() as stack:
        with forkd.counting(stream_client_disconnected=2):
            answers = [begin((site, forkd, way), stack) for way in (Http1, Http2)]
            for pid in site.apache.children():
                os.kill(pid, signal.SIGKILL)
        for answer in answers:
            with pytest.raises(Broken):
                read_all(answer)


def begin(served: Served, stack: contextlib.ExitStack) -> Http1 | Http2:
    """A stream that has begun and takes its time."""
    answer = ask(served, "slow")
    stack.callback(answer.hang_up)
    assert first(answer).startswith(b"data: ")
    return answer
