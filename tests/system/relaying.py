"""What the relay's tests share: a forkd whose one worker relays from a fake API, and the ways to reach it."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fake_api import FakeApi
from tests.harness import Answer, Forkd, read_answer, running


class Relay(NamedTuple):
    api: FakeApi
    forkd: Forkd

    def ask(self, pattern: str = "", **data: Any) -> Answer:
        return read_answer(self.begin(pattern, **data))

    def begin(self, pattern: str = "", **data: Any) -> socket.socket:
        given = {"prompt": "Hello", **({"test_pattern": pattern} if pattern else {}), **data}
        return self.forkd.hand_over(json.dumps(given).encode())


@contextlib.contextmanager
def relaying(
    directory: Path,
    *,
    provider: str = "openai",
    server: dict[str, Any] | None = None,
    trust: bool = True,
    api: dict[str, Any] | None = None,
    **own: Any,
) -> Iterator[Relay]:
    """A fake API made with `api`, and a forkd with one worker whose only real backend has these settings."""
    with FakeApi(**(api or {})) as fake:
        base = fake.root if provider == "langgraph" else fake.base
        backend: dict[str, Any] = {"provider": provider, "api_base": base, "api_key": "sk-secret-key"}
        if fake.unix_path:
            backend["api_socket"] = fake.unix_path
        if fake.ca_file and trust:
            backend["ca_file"] = fake.ca_file
        config = {
            "server": server or {},
            "workers": {"count": 1},
            "default_backend": provider,
            "backends": {provider: {**backend, **own}},
        }
        with running(directory, config=config) as forkd:
            yield Relay(fake, forkd)
            assert "sk-secret-key" not in forkd.log() + forkd.output()


def settled(relay: Relay) -> None:
    """Nothing of any stream is left: no client, no request, no fd but those of idle connections."""
    relay.forkd.wait_for_metric("daemon_active_connections", 0)
    relay.api.wait_for(lambda api: all(seen.over for seen in api.requests), "the end of every request")


def warm_up(relay: Relay) -> None:
    """Have everything opened that stays open, and nothing else."""
    assert relay.ask().complete
    relay.forkd.wait_for_metric("daemon_connections_total", 1)
    settled(relay)
    relay.api.wait_for(lambda api: not api.connections_open, "the connections' end")


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "http1": ({}, {"http2": {"enabled": False}}),
    "http1-ipv6": ({"host": "::1"}, {}),
    "http1-tls": ({"tls": "good", "alpn": ("http/1.1",)}, {}),
    "http1-unix": ({"unix_path": "api.sock"}, {}),
    "h2": ({}, {"http2": {"enabled": "force"}}),
    "h2-tls": ({"tls": "good"}, {}),
    "h2-unix": ({"unix_path": "api.sock"}, {"http2": {"enabled": "force"}}),
}


def way(name: str, directory: Path, **more: Any) -> dict[str, Any]:
    """The arguments of `relaying` for one way to reach the API."""
    api, own = WAYS[name]
    if "unix_path" in api:
        api = {**api, "unix_path": directory / "api.sock"}
    return {"api": {**api, **more.pop("api", {})}, **own, **more}
