"""A listener for mod_proxy_fdpass: the client has its head already, and what it gets is the body, bare.

The sender here does what the module does: connects to a stream socket, sends one NUL with the client's fd, closes.
tests/system/test_apache_fdpass.py has the module itself.
"""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.fake_api import FakeApi, text
from tests.harness import Answer, Forkd, connect, read_answer, running, send, tcp_pair, wait_for
from tests.system.crowd import BACKENDS, CRASHING, WHOLE, forkd_of


class Fdpass(NamedTuple):
    """A forkd with several such listeners, by what they ask, and the API behind some of them."""

    forkd: Forkd
    api: FakeApi

    def hand_over(self, where: str = "mock", payload: bytes = b"\0") -> socket.socket:
        return hand_over(str(self.forkd.directory / where), payload)

    def ask(self, where: str = "mock", payload: bytes = b"\0") -> Answer:
        return read_answer(self.hand_over(where, payload))


def hand_over(path: str, payload: bytes = b"\0", *more: int) -> socket.socket:
    """Hand a new client over as mod_proxy_fdpass does, and return the client's end."""
    client, server = tcp_pair()
    with server, connect(path, socket.SOCK_STREAM) as sender:
        send(sender, payload, server.fileno(), *more)
    return client


def listeners(directory: Path, asked: dict[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [{"path": str(directory / name), "protocol": "fdpass", "data": data} for name, data in asked.items()]


@pytest.fixture(scope="module")
def fdpass(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fdpass]:
    """Shared: each test waits until nothing of it is left (`Forkd.counting`)."""
    directory = tmp_path_factory.mktemp("fdpass")
    prompt = {"prompt": "Hello", "backend": "openai"}
    asked = {
        "mock": None,
        "typing": {"backend": "typing", "prompt": "One two"},
        "openai": {**prompt, "user_id": 7},
        "raw": {**prompt, "backend": "raw"},
        "refused": {**prompt, "test_pattern": "401"},
        "cut": {**prompt, "test_pattern": "close-after words=3"},
        "lengthy": {"prompt": "Hello", "backend": "still"},
    }
    with FakeApi() as api:
        own = {"provider": "openai", "api_base": api.base, "api_key": "sk-secret-key", "retries": 0, "pool_max_idle": 0}
        backends = {
            "mock": {"provider": "mock", "token_delay_ms": 5},
            "typing": {"provider": "typing", "token_delay_ms": 1},
            "openai": {**own, "events": ["usage", "finish"]},
            "raw": {**own, "format": "raw"},
            "still": BACKENDS["still"],
        }
        config = {"listeners": listeners(directory, asked), "backends": backends, "server": {"heartbeat_secs": 0.05}}
        with running(directory, config=config) as forkd:
            yield Fdpass(forkd, api)


def test_the_text_is_the_body(fdpass: Fdpass) -> None:
    with fdpass.forkd.counting():
        for where, said in (("mock", WHOLE), ("openai", text(5))):
            answer = fdpass.ask(where)
            assert (answer.raw.decode(), answer.reset) == (said, False)
        assert "One two" in fdpass.ask("typing").raw.decode()
    assert fdpass.api.requests[-1].json["messages"] == [{"role": "user", "content": "Hello"}]
    line = wait_for(
        lambda: next((line for line in fdpass.forkd.access_lines() if line["backend"] == "openai"), None), "its line"
    )
    assert (line["status"], line["reason"], line["user_id"], line["remote"]) == ("200", "ok", "7", "127.0.0.1")
    assert "answered with defaults" not in fdpass.forkd.log()


def test_an_upstreams_own_events_are_the_body_where_they_are_wanted(fdpass: Fdpass) -> None:
    with fdpass.forkd.counting():
        raw = fdpass.ask("raw").raw
    assert raw.startswith(b"data: {")
    assert raw.endswith(b"data: [DONE]\n\n")
    assert raw.count(b"[DONE]") == 1


def test_failures_are_resets(fdpass: Fdpass) -> None:
    """There is no other way to say that the body is not whole."""
    with fdpass.forkd.counting(stream_backend_unauthorized=1, stream_backend_reset=1):
        assert fdpass.ask("refused") == Answer(b"", reset=True)
        answer = fdpass.ask("cut")
        assert answer.reset
        assert text(3).startswith(answer.raw.decode())


def test_a_quiet_body_gets_no_comments(fdpass: Fdpass) -> None:
    with fdpass.forkd.counting(stream_client_disconnected=1), fdpass.hand_over("lengthy") as client:
        assert client.recv(100) == b"Hello! "
        client.settimeout(0.3)  # several heartbeats
        with pytest.raises(TimeoutError):
            client.recv(100)


def test_what_no_mod_proxy_fdpass_sends(fdpass: Fdpass) -> None:
    forkd, path = fdpass.forkd, str(fdpass.forkd.directory / "mock")
    with forkd.counting(bad_handoff=3, no_fd=1, bad_client_fd=2, stream_bad_handoff=3):
        for payload in (b'{"prompt":"Hello"}', b"\x01\0{}\n"):
            assert fdpass.ask(payload=payload) == Answer(b"", reset=True)
        with open("/dev/null", "rb") as null, connect(path, socket.SOCK_STREAM) as sender:
            assert read_answer(hand_over(path, b"\0", null.fileno())) == Answer(b"", reset=True)
            send(sender, b"\0", null.fileno())
            with connect(path, socket.SOCK_STREAM) as another, socket.socket() as unconnected:
                send(another, b"\0", unconnected.fileno())
            with connect(path, socket.SOCK_STREAM) as another:
                send(another, b"\0")
            with connect(path, socket.SOCK_STREAM):
                pass  # comes and goes: no failure
    assert "X-Socket-Handoff needs a listener with protocol handoff" in forkd.log()


def test_a_worker_that_dies(tmp_path: Path) -> None:
    """What has begun is reset, what has not goes to another worker, whole; nobody is told in words."""
    asked = {"begun": {"backend": "still"}, "next": {"prompt": "kill@0"}, "mock": None}
    with forkd_of(tmp_path, workers=1, listeners=listeners(tmp_path, asked)) as forkd:
        before = forkd.idle_fds()
        begun = hand_over(str(tmp_path / "begun"))
        begun.settimeout(20)
        assert begun.recv(1, socket.MSG_PEEK)
        victim = forkd.workers()[0]
        os.kill(victim, signal.SIGSTOP)
        waiting = hand_over(str(tmp_path / "mock"))
        wait_for(lambda: forkd.metric("daemon_connections_total") == 2, "both handoffs")
        os.kill(victim, signal.SIGKILL)
        assert read_answer(begun) == Answer(b"Hello! ", reset=True)
        assert read_answer(waiting) == Answer(WHOLE.encode(), reset=False)
        forkd.wait_for_metric("daemon_active_connections", 0)
        assert read_answer(hand_over(str(tmp_path / "next"))) == Answer(b"", reset=True)  # poison
        forkd.wait_for_metric("forkd_streams_recovered_total", 2, outcome="closed")
        forkd.wait_for_metric("forkd_stream_errors_total", 2, code="worker_lost")
        forkd.wait_for_metric("daemon_active_connections", 0)
        wait_for(lambda: len(forkd.workers()) == 1 and forkd.idle_fds() == before, "no fd left")
        assert read_answer(hand_over(str(tmp_path / "mock"))).raw.decode() == WHOLE


def test_stop_and_a_full_house(tmp_path: Path) -> None:
    asked = {"still": {"backend": "still"}}
    with running(
        tmp_path,
        config={
            "listeners": listeners(tmp_path, asked),
            "backends": BACKENDS,
            "server": {"max_connections": 1, "shutdown_timeout_secs": 0},
        },
        command=CRASHING,
    ) as forkd:
        first = hand_over(str(tmp_path / "still"))
        first.settimeout(20)
        assert first.recv(1, socket.MSG_PEEK)
        assert read_answer(hand_over(str(tmp_path / "still"))) == Answer(b"", reset=True)
        assert forkd.stop() == 0
        assert read_answer(first) == Answer(b"Hello! ", reset=True)
        assert not (tmp_path / "still").exists()
