"""The relay, end to end: a client, forkd, and a fake API on real sockets over every transport."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.fake_api import INPUT_TOKENS, text
from tests.harness import Answer, read_answer, reset, wait_for
from tests.system.relaying import WAYS, relaying, settled, way


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
    [
        *("one-write", "comment", "crlf", "cr", "no-space", "multi-line", "odd-fields", "trickle", "split-utf8"),
        *("no-done", "null-content", "usage-only-at-end", "reasoning", "tool-calls words=5"),
        *("known-length", "until-close", "informational", "connection-close", "trailers"),
    ],
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
    [
        *("goaway-after", "silent-goaway", "padding", "server-ping", "unknown-frame", "end-on-data", "rst-after-end"),
        *("trailers", "informational", "trickle", "known-length"),
    ],
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
