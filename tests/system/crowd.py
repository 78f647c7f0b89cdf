"""What the tests of death, drain and dispatch share: a forkd that can crash, crowds of clients, strict reading."""

import collections
import contextlib
import json
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.harness import Answer, Forkd, open_fds, running, send, wait_for

CRASHING = (sys.executable, "-P", str(Path(__file__).parents[1] / "crashing_forkd.py"))
WHOLE = "Hello! I am forkd's mock backend. Each of these words comes to you as its own server-sent event."
BACKENDS = {
    "mock": {"provider": "mock", "token_delay_ms": 10},
    "slow": {"provider": "mock", "token_delay_ms": 200},
    "steady": {"provider": "mock", "token_delay_ms": 40},
    "fast": {"provider": "mock", "token_delay_ms": 0},
    "still": {"provider": "mock", "token_delay_ms": 3_600_000},  # one word, then silence
}


@contextlib.contextmanager
def forkd_of(directory: Path, workers: int = 2, *, ready: bool = True, **config: Any) -> Iterator[Forkd]:
    """A forkd that can be made to crash (see tests/crashing_forkd.py), with backends of several paces."""
    own = {"count": workers, **config.pop("workers_more", {})}
    quiet = {"level": "info", "access": False}
    whole = {"workers": own, "backends": BACKENDS, "logging": quiet, **config}
    with running(directory, ready=ready, config=whole, command=CRASHING) as forkd:
        yield forkd


def prompt(text: str = "Hello", **more: Any) -> bytes:
    """A handoff's data."""
    return json.dumps({"prompt": text, **more}).encode()


def hand_over_many(sender: socket.socket, payloads: Iterable[bytes]) -> list[socket.socket]:
    """Many handoffs over one connection, as a persistent sender makes them."""
    clients = []
    for payload in payloads:
        client, server = socket.socketpair()
        with server:
            send(sender, payload, server.fileno())
        clients.append(client)
    return clients


def begun(clients: list[socket.socket]) -> None:
    """Wait until each has read its first bytes (which stay unread)."""
    for client in clients:
        client.settimeout(20)
        assert client.recv(1, socket.MSG_PEEK)


def ready_pids(forkd: Forkd) -> list[int]:
    """The pids of all workers that ever were ready, oldest first."""
    return [int(pid) for pid in re.findall(r"ready \(pid (\d+)", forkd.log())]


def fate(answer: Answer) -> str:
    """What a strict reader makes of an answer: "complete", or the code it was told. Anything else fails the test.

    Strict: a status line and fields by RFC 9112 with no line folded or bare; a body as long as its Content-Length says.
    Behind a complete answer more may follow (a worker that died between its last word and the end of the connection).
    """
    assert not answer.reset, answer.raw
    head, end, body = answer.raw.partition(b"\r\n\r\n")
    assert end, answer.raw
    status, *fields = head.split(b"\r\n")
    assert re.fullmatch(
        rb"HTTP/1\.1 (200 OK|500 Internal Server Error|502 Bad Gateway|503 Service Unavailable)", status
    )
    for line in fields:
        assert re.fullmatch(rb"[A-Za-z-]+: [\x20-\x7e]+", line), answer.raw
    length = answer.header("content-length")
    if length is not None:
        assert answer.header("content-type") == "application/json"
        assert len(body) >= int(length), answer.raw
        code = json.loads(body[: int(length)])["code"]
        assert isinstance(code, str)
        return code
    assert answer.header("content-type") == "text/event-stream"
    endings = [(event.name, event.data) for event in answer.events if event.name != "message" or event.data == "[DONE]"]
    if endings[:2] == [("message", "[DONE]"), ("done", "{}")]:
        assert answer.text == WHOLE
        assert all(name == "error" for name, _ in endings[2:])
        return "complete"
    assert {name for name, _ in endings} == {"error"}, answer.raw
    assert answer.error is not None
    return str(answer.error["code"])


def fates(answers: list[Answer]) -> collections.Counter[str]:
    """How many clients came to which fate."""
    return collections.Counter(fate(answer) for answer in answers)


def settled(forkd: Forkd, master_fds: int, deaths: int = 0) -> dict[str, float]:
    """Wait until nothing is in flight and no fd more is open in the master than when it was idle.

    Returns how many streams of the dead workers came to which end.
    """
    wait_for(lambda: open_fds(forkd.pid) == master_fds, "the master's fds are closed")
    forkd.wait_for_metric("forkd_worker_deaths_total", deaths)
    forkd.wait_for_metric("daemon_active_connections", 0)
    outcomes = ("redispatched", "ended", "poison", "closed")
    counts = {outcome: forkd.metric("forkd_streams_recovered_total", outcome=outcome) for outcome in outcomes}
    return {outcome: count for outcome, count in counts.items() if count}
