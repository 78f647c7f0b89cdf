"""The relay, end to end: a client, forkd, and a fake API on real sockets over every transport."""

import contextlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.fake_api import INPUT_TOKENS, FakeApi, text
from tests.harness import Answer, Forkd, read_answer, reset, running, wait_for


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
    server: dict[str, Any] | None = None,
    trust: bool = True,
    api: dict[str, Any] | None = None,
    **own: Any,
) -> Iterator[Relay]:
    """A fake API made with `api`, and a forkd with one worker whose openai backend has these settings."""
    with FakeApi(**(api or {})) as fake:
        backend: dict[str, Any] = {"provider": "openai", "api_base": fake.base, "api_key": "sk-secret-key"}
        if fake.unix_path:
            backend["api_socket"] = fake.unix_path
        if fake.ca_file and trust:
            backend["ca_file"] = fake.ca_file
        config = {
            "server": server or {},
            "workers": {"count": 1},
            "default_backend": "openai",
            "backends": {"openai": {**backend, **own}},
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


@pytest.mark.parametrize("name", WAYS)
def test_an_answer_arrives_whole_and_its_connection_is_used_again(tmp_path: Path, name: str) -> None:
    with relaying(tmp_path, **way(name, tmp_path)) as relay:
        for number in range(3):
            answer = relay.ask(
                "ok words=9", request_id=f"req-{number}", system="Be brief.", max_tokens="99", temperature=0.5
            )
            assert answer.status == 200, answer
            assert answer.complete
            assert answer.text == text(9)
            relay.api.wait_for(lambda api: api.requests[-1].over, "the request's end")
        assert relay.api.connections_opened == 1
        seen = relay.api.requests[2]
        assert seen.protocol == name.partition("-")[0]
        assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
        assert seen.headers["authorization"] == "Bearer sk-secret-key"
        assert seen.headers["x-request-id"] == "req-2"
        assert seen.headers["x-test-pattern"] == "ok words=9"
        assert seen.headers["content-type"] == "application/json"
        assert seen.json == {
            "model": "gpt-4o",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 99,
            "temperature": 0.5,
        }
        (line, *_) = wait_for(relay.forkd.access_lines, "the access lines")
        assert (line["backend"], line["model"], line["status"], line["reason"]) == ("openai", "gpt-4o", "200", "ok")
        assert (line["input_tokens"], line["output_tokens"], line["chunks"]) == (str(INPUT_TOKENS), "9", "9")
        forkd = relay.forkd
        forkd.wait_for_metric("daemon_backend_requests_total", 3, backend="openai")
        labels = {"backend": "openai", "model": "gpt-4o"}
        assert forkd.metric("forkd_tokens_total", direction="input", **labels) == 3 * INPUT_TOKENS
        assert forkd.metric("forkd_tokens_total", direction="output", **labels) == 27
        assert forkd.metric("forkd_backend_time_to_first_token_seconds_count", **labels) == 3
        settled(relay)


def test_a_model_nobody_configured_counts_as_other(tmp_path: Path) -> None:
    with relaying(tmp_path, models=["gpt-5"]) as relay:
        for model in ("gpt-5", "made-up", "made-up-too"):
            assert relay.ask(model=model).complete
        relay.forkd.wait_for_metric("forkd_tokens_total", 5, direction="output", model="gpt-5")
        relay.forkd.wait_for_metric("forkd_tokens_total", 10, direction="output", model="other")
        assert [line["model"] for line in relay.forkd.access_lines()] == ["gpt-5", "made-up", "made-up-too"]


@pytest.mark.parametrize(
    "pattern",
    ["one-write", "comment", "crlf", "cr", "no-space", "multi-line", "odd-fields", "trickle", "split-utf8", "no-done"]
    + [
        "null-content",
        "usage-only-at-end",
        "reasoning",
        "tool-calls words=5",
        "known-length",
        "until-close",
        "informational",
    ]
    + ["connection-close", "trailers"],
)
def test_every_spelling_of_an_answer_is_understood(tmp_path: Path, pattern: str) -> None:
    with relaying(tmp_path) as relay:
        relay.api.gate.open()
        answer = relay.ask(pattern)
        assert answer.complete, answer
        assert answer.text == (text(4) + " list" if pattern == "null-content" else text(5))
        assert relay.ask().complete
        settled(relay)


@pytest.mark.parametrize(
    "pattern",
    ["goaway-after", "silent-goaway", "padding", "server-ping", "unknown-frame", "end-on-data", "rst-after-end"]
    + ["trailers", "informational", "trickle"],
)
@pytest.mark.parametrize("name", ["h2", "h2-tls"])
def test_every_turn_of_http2_is_understood(tmp_path: Path, pattern: str, name: str) -> None:
    with relaying(tmp_path, **way(name, tmp_path)) as relay:
        for _ in range(2):
            answer = relay.ask(pattern)
            assert answer.complete, answer
            assert answer.text == text(5)
        assert relay.ask().complete
        settled(relay)


# What goes wrong before the first token is a status, after it an event; both name the cause and are counted under it.

BEFORE = [
    ("400", 502, "backend_rejected"),
    ("401", 502, "backend_unauthorized"),
    ("403", 502, "backend_unauthorized"),
    ("404", 502, "backend_rejected"),
    ("429", 429, "backend_rate_limited"),
    ("500", 502, "backend_error"),
    ("503", 503, "backend_overloaded"),
    ("529", 503, "backend_overloaded"),
    ("redirect", 502, "backend_redirect"),
    ("html-200", 502, "backend_not_a_stream"),
    ("json-200", 502, "backend_not_a_stream"),
    ("json-error-200", 502, "backend_not_a_stream"),
    ("empty-body", 502, "backend_truncated"),
    ("status-without-body", 502, "backend_rejected"),
]
BROKEN_HTTP1 = [
    ("garbage", 502, "backend_garbled"),
    ("bad-status-line", 502, "backend_garbled"),
    ("endless-header", 502, "backend_head_too_large"),
    ("two-lengths", 502, "backend_garbled"),
    ("cut-before-answer", 502, "backend_reset"),
    ("close-before-answer", 502, "backend_reset"),
    ("cut-in-head", 502, "backend_reset"),
]
AFTER = [
    ("truncated", "backend_truncated"),
    ("error-event", "backend_error"),
    ("error-event kind=rate_limit_error", "backend_rate_limited"),
    ("error-object", "backend_error"),
    ("cut-after", "backend_reset"),
    ("close-after", "backend_reset"),
]
BROKEN_AFTER = [
    ("bad-chunk", "backend_garbled"),
    ("length-too-short missing=900", "backend_truncated"),
]
BROKEN_H2 = [
    ("rst after=0", 502, "backend_reset"),
    ("rst-refused", 502, "backend_unavailable"),
    ("goaway-refuse", 502, "backend_unavailable"),
    ("goaway-error", 502, "backend_reset"),
    ("bad-frame", 502, "backend_garbled"),
    ("oversized-frame", 502, "backend_garbled"),
    ("data-before-headers", 502, "backend_garbled"),
    ("frame-on-idle-stream", 502, "backend_garbled"),
    ("end-on-headers", 502, "backend_truncated"),
    ("huge-head", 502, "backend_garbled"),
]


@pytest.mark.parametrize("name", ["http1", "h2"])
def test_a_refusal_is_a_status(tmp_path: Path, name: str) -> None:
    cases = BEFORE + (BROKEN_HTTP1 if name == "http1" else BROKEN_H2)
    with relaying(tmp_path, **way(name, tmp_path), retries=0, pool_max_idle=0) as relay:
        warm_up(relay)
        with relay.forkd.counting(**Counter(f"stream_{code}" for _, _, code in cases)):
            for pattern, status, code in cases:
                answer = relay.ask(pattern)
                assert (answer.status, answer.json["code"], answer.reset) == (status, code, False), (pattern, answer)
            settled(relay)
        relay.forkd.wait_for_metric("daemon_backend_errors_total", len(cases), backend="openai")
        assert relay.ask().complete


@pytest.mark.parametrize("name", ["http1", "h2"])
def test_a_break_after_the_first_token_is_an_event(tmp_path: Path, name: str) -> None:
    cases = AFTER + (BROKEN_AFTER if name == "http1" else [])
    with relaying(tmp_path, **way(name, tmp_path), pool_max_idle=0) as relay:
        warm_up(relay)
        with relay.forkd.counting(**Counter(f"stream_{code}" for _, code in cases)):
            for pattern, code in cases:
                client = relay.begin(pattern)
                begun = b""
                while b"data: " not in begun:
                    begun += client.recv(4096)
                relay.api.gate.let(1 if pattern == "cut-after" else 0)
                rest = read_answer(client)
                answer = Answer(begun + rest.raw, rest.reset)
                assert answer.status == 200
                assert answer.error is not None, (pattern, answer)
                assert (answer.error["code"], answer.complete, answer.reset) == (code, False, False), (pattern, answer)
            settled(relay)
        assert len(relay.api.requests) == len(cases) + 1  # never tried again
        assert relay.ask().complete


def test_one_malformed_event_is_left_out(tmp_path: Path) -> None:
    with relaying(tmp_path) as relay:
        assert relay.ask("bad-json-event").text == text(4)
        assert relay.ask("other-json-event").text == text(4)
        answer = relay.ask("bad-utf8-event")
        assert answer.complete
        assert "\ufffd" in answer.text or answer.text == text(4)
        relay.forkd.wait_for_metric("forkd_backend_events_skipped_total", 2, backend="openai")


def test_an_event_of_ten_megabytes(tmp_path: Path) -> None:
    with relaying(tmp_path, pool_max_idle=0) as relay:
        warm_up(relay)
        with relay.forkd.counting(stream_backend_event_too_large=1):
            answer = relay.ask("huge-event")
            told = answer.error if answer.status == 200 else answer.json
            assert told is not None
            assert told["code"] == "backend_event_too_large"
            settled(relay)


@pytest.mark.parametrize("pattern", ["flow-violation", "window-overflow"])
def test_a_breach_of_flow_control(tmp_path: Path, pattern: str) -> None:
    with relaying(tmp_path, **way("h2", tmp_path), idle_timeout_secs=0.5, first_byte_timeout_secs=1) as relay:
        answer = relay.ask(pattern)
        assert not answer.reset
        assert answer.error is not None or answer.status in (502, 504)
        assert relay.ask().complete
        settled(relay)


# Reaching it.


def test_nobody_listens_or_the_name_is_unknown(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with relaying(tmp_path, api_base=f"http://127.0.0.1:{port}/v1", retries=1) as relay:
        answer = relay.ask()
        assert (answer.status, answer.json["code"]) == (502, "backend_unavailable")
        relay.forkd.wait_for_metric("forkd_stream_errors_total", 1, code="backend_unavailable")
        relay.forkd.wait_for_metric("forkd_backend_retries_total", 1, code="backend_unavailable")
        assert "Connection refused" in relay.forkd.log()
    (tmp_path / "other").mkdir()
    with relaying(tmp_path / "other", api_base="http://name.invalid/v1", retries=0) as relay:
        answer = relay.ask()
        assert (answer.status, answer.json["code"]) == (502, "backend_unresolved")
        relay.forkd.wait_for_metric("forkd_stream_errors_total", 1, code="backend_unresolved")


@pytest.mark.parametrize("kind", ["expired", "other-name", "good"])
def test_a_certificate_that_cannot_be_trusted(tmp_path: Path, kind: str) -> None:
    with relaying(tmp_path, api={"tls": kind}, trust=kind != "good", retries=0) as relay:
        answer = relay.ask()
        assert (answer.status, answer.json["code"]) == (502, "backend_untrusted")
        relay.forkd.wait_for_metric("forkd_stream_errors_total", 1, code="backend_untrusted")
        assert "certificate" in relay.forkd.log()
        assert not relay.api.requests


def test_a_certificate_is_not_looked_at_where_that_is_asked_for(tmp_path: Path) -> None:
    with relaying(tmp_path, api={"tls": "expired"}, trust=False, insecure_ssl=True) as relay:
        assert relay.ask().complete


def test_no_answer_at_all(tmp_path: Path) -> None:
    with relaying(tmp_path, first_byte_timeout_secs=0.3, pool_max_idle=0) as relay:
        for pattern in ("silence", "gate-headers"):
            with relay.forkd.counting(stream_backend_timeout=1):
                answer = relay.ask(pattern)
                assert (answer.status, answer.json["code"]) == (504, "backend_timeout")
                relay.api.wait_for(lambda api: api.requests[-1].cancelled_at, "its end")


def test_silence_in_the_middle(tmp_path: Path) -> None:
    with relaying(tmp_path, idle_timeout_secs=0.3, pool_max_idle=0) as relay:
        with relay.forkd.counting(stream_backend_silent=1):
            answer = relay.ask("silence-after")
            assert answer.error is not None
            assert answer.error["code"] == "backend_silent"
            relay.api.wait_for(lambda api: api.requests[-1].cancelled_at, "its end")


# Trying again.


@pytest.mark.parametrize("first", ["429 retry_after_ms=20", "500", "503", "529", "cut-before-answer"])
def test_a_failure_before_the_first_byte_is_tried_again(tmp_path: Path, first: str) -> None:
    with relaying(tmp_path) as relay:
        relay.api.script = [first, first]
        answer = relay.ask(request_id="again")
        assert answer.complete
        assert answer.text == text(5)
        assert [seen.headers["x-request-id"] for seen in relay.api.requests] == ["again"] * 3
        relay.forkd.wait_for_metric("forkd_backend_retries_total", 2)
        relay.api.script = [first] * 4  # one of them is free when it breaks a connection that was used before
        assert relay.ask().status in (429, 502, 503)
        assert len(relay.api.requests) == (7 if first == "cut-before-answer" else 6)


@pytest.mark.parametrize("first", ["rst-refused", "goaway-refuse"])
def test_what_http2_refused_is_tried_again(tmp_path: Path, first: str) -> None:
    with relaying(tmp_path, **way("h2", tmp_path)) as relay:
        relay.api.script = [first, first]
        assert relay.ask().complete
        assert len(relay.api.requests) == 3


def test_retry_after_is_honoured_and_passed_on_when_it_is_too_long(tmp_path: Path) -> None:
    with relaying(tmp_path, first_byte_timeout_secs=5) as relay:
        relay.api.script = ["429 retry_after=1"]
        assert relay.ask().complete
        first, second = relay.api.requests
        assert second.received_at - first.received_at >= 1
        relay.api.script = ["429 retry_after=60"]
        answer = relay.ask()
        assert (answer.status, answer.header("retry-after")) == (429, "60")
        assert len(relay.api.requests) == 3


@pytest.mark.parametrize("name", ["http1", "h2", "http1-tls"])
def test_a_pooled_connection_that_died_costs_nobody_anything(tmp_path: Path, name: str) -> None:
    with relaying(tmp_path, **way(name, tmp_path), retries=0) as relay:
        assert relay.ask("stale" if name != "h2" else "").complete
        for _ in range(3):
            assert relay.ask("stale" if name != "h2" else "").complete


# The client.


@pytest.mark.parametrize("name", ["http1", "h2", "h2-tls"])
@pytest.mark.parametrize("pattern", ["gate-headers", "gate-body", "gate-tokens"])
def test_a_client_that_goes_ends_its_request(tmp_path: Path, name: str, pattern: str) -> None:
    with relaying(tmp_path, **way(name, tmp_path)) as relay:
        client = relay.begin(pattern)
        seen = relay.api.wait_for(lambda api: api.requests, "the request")[0]
        if pattern == "gate-tokens":
            relay.api.gate.let(2)
            relay.api.wait_for(lambda api: seen.body_sent, "the first token")
        reset(client)
        gone = time.monotonic()
        relay.api.wait_for(lambda api: seen.cancelled_at, "the cancellation")
        assert seen.cancelled_at is not None
        assert seen.cancelled_at - gone < 5  # the benchmark has the true figure
        if name != "http1":
            assert relay.api.connections_open == 1
            assert relay.ask().complete
            assert relay.api.connections_opened == 1
        relay.forkd.wait_for_metric("forkd_stream_errors_total", 1, code="client_disconnected")


@pytest.mark.parametrize("name", ["http1", "h2", "h2-tls"])
def test_a_slow_client_stops_its_upstream_and_nobody_elses(tmp_path: Path, name: str) -> None:
    more = (
        {"http2": {"enabled": "force" if name == "h2" else True, "initial_stream_window_kb": 64}}
        if name != "http1"
        else {}
    )
    with relaying(tmp_path, **{**way(name, tmp_path), **more}) as relay:
        client = relay.begin("flood size=30000000")
        seen = relay.api.wait_for(lambda api: api.requests, "the request")[0]
        relay.api.wait_for(lambda api: seen.stalled_since and time.monotonic() - seen.stalled_since > 0.3, "the stall")
        assert seen.body_sent < 20_000_000
        assert relay.ask("ok words=50").complete
        answer = read_answer(client)
        assert answer.complete
        assert seen.body_sent >= 30_000_000


def test_headers_come_early_when_the_model_thinks(tmp_path: Path) -> None:
    with relaying(tmp_path, server={"headers_after_secs": 0.2, "heartbeat_secs": 0.2}) as relay:
        client = relay.begin("gate-headers")
        seen = b""
        while seen.count(b": keep-alive\n\n") < 3:
            seen += client.recv(4096)
        assert seen.startswith(b"HTTP/1.1 200 OK\r\n")
        relay.api.gate.let(1)
        rest = read_answer(client)
        answer = Answer(seen + rest.raw)
        assert answer.complete
        assert answer.text == text(5)
        failing = relay.begin("gate-headers")
        relay.api.wait_for(lambda api: len(api.requests) == 2, "the request")
        while b"keep-alive" not in (seen := failing.recv(4096)):
            pass
        relay.forkd.stop(signal.SIGQUIT)
        assert b"event: error" in seen + read_answer(failing).raw


# Many at once.


@pytest.mark.parametrize(("name", "connections"), [("http1", 300), ("h2", 4), ("h2-tls", 4)])
def test_many_streams_share_connections_where_they_can(tmp_path: Path, name: str, connections: int) -> None:
    with relaying(tmp_path, **way(name, tmp_path)) as relay:
        clients = [relay.begin("gate-body") for _ in range(300)]
        relay.api.wait_for(lambda api: len(api.requests) == 300, "every request")
        assert relay.api.connections_peak <= connections  # under HTTP/2 one is opened ahead of time
        relay.api.gate.let(300)
        for client in clients:
            assert read_answer(client).complete
        wait_for(lambda: relay.api.connections_open <= max(connections, 100), "the surplus to be closed")


def test_a_server_that_takes_one_stream_gets_one_for_each_connection(tmp_path: Path) -> None:
    with relaying(tmp_path, **way("h2", tmp_path, api={"max_streams": 1})) as relay:
        clients = [relay.begin("gate-body") for _ in range(5)]
        relay.api.wait_for(lambda api: len(api.requests) == 5, "every request")
        assert relay.api.connections_opened == 5
        relay.api.gate.let(5)
        assert all(read_answer(client).complete for client in clients)


# The forms of the answer.


def test_raw_hands_the_events_on_untouched(tmp_path: Path) -> None:
    with relaying(tmp_path, format="raw") as relay:
        answer = relay.ask("comment")
        chunks = [json.loads(event.data) for event in answer.events if event.data != "[DONE]"]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == text(5)
        assert answer.events[-1].data == "[DONE]"
        assert not any(event.name == "done" for event in answer.events)
        (line,) = wait_for(relay.forkd.access_lines, "the access line")
        assert line["output_tokens"] == "5"


def test_text_is_plain_data_lines(tmp_path: Path) -> None:
    with relaying(tmp_path, format="text") as relay:
        answer = relay.ask()
        assert "".join(event.data for event in answer.events[:5]) == text(5)


def test_further_events_where_the_operator_wants_them(tmp_path: Path) -> None:
    with relaying(tmp_path, events=["reasoning", "tool_calls", "usage", "finish"]) as relay:
        names = [event.name for event in relay.ask("reasoning").events]
        assert {"reasoning", "usage", "finish", "done"} <= set(names)
        events = relay.ask("tool-calls").events
        assert any(event.name == "tool_calls" and "get_weather" in event.data for event in events)
        usage = next(json.loads(event.data) for event in events if event.name == "usage")
        assert usage["input_tokens"] == INPUT_TOKENS


# Bad handoffs.


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\0", "bad_handoff"),
        (b"not json", "bad_handoff"),
        (b"{}", "no_prompt"),
        (b'{"messages":"x"}', "bad_handoff"),
        (b'{"messages":[1]}', "bad_handoff"),
        (b'{"prompt":"x","attachments":{"a":"../etc/passwd"}}', "bad_attachment"),
        (b'{"prompt":"x","attachments":[1]}', "bad_handoff"),
        ('{"prompt":"x","test_pattern":"a\\r\\nb: c"}'.encode(), "bad_handoff"),
    ],
)
def test_a_handoff_that_cannot_be_asked_is_a_400(tmp_path: Path, payload: bytes, code: str) -> None:
    with relaying(tmp_path) as relay:
        answer = relay.forkd.ask(payload)
        assert (answer.status, answer.json["code"]) == (400, code)
        assert not relay.api.requests
        relay.forkd.wait_for_metric("forkd_handoff_errors_total", 1, code=code)


# Attachments.


def test_attachments_are_read_and_deleted(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "note.txt").write_text("the note")
    with relaying(tmp_path, server={"data_dir": str(directory)}) as relay:
        answer = relay.ask("ok", prompt="Read {note}!", attachments={"note": "note.txt"})
        assert answer.complete
        assert "the note" in json.dumps(relay.api.requests[0].json["messages"])
        wait_for(lambda: not (directory / "note.txt").exists(), "the file's end")


# A worker's death.


def test_a_request_that_got_no_answer_yet_is_asked_again_by_another_worker(tmp_path: Path) -> None:
    with relaying(tmp_path) as relay:
        client = relay.begin("gate-headers")
        relay.api.wait_for(lambda api: api.requests, "the request")
        (worker,) = relay.forkd.workers()
        os.kill(worker, signal.SIGKILL)
        relay.api.wait_for(lambda api: len(api.requests) == 2, "the request again")
        relay.api.gate.let(2)
        assert read_answer(client).complete
