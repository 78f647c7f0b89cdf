"""The relay when something is wrong: with the API, with the way to it, with what it was handed."""

import os
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest

from tests.fake_api import text
from tests.harness import Answer, read_answer
from tests.system.relaying import relaying, settled, warm_up, way

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
    with (
        relaying(tmp_path, idle_timeout_secs=0.3, pool_max_idle=0) as relay,
        relay.forkd.counting(stream_backend_silent=1),
    ):
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
        (b'{"prompt":"x","test_pattern":"a\\r\\nb: c"}', "bad_handoff"),
    ],
)
def test_a_handoff_that_cannot_be_asked_is_a_400(tmp_path: Path, payload: bytes, code: str) -> None:
    with relaying(tmp_path) as relay:
        answer = relay.forkd.ask(payload)
        assert (answer.status, answer.json["code"]) == (400, code)
        assert not relay.api.requests
        relay.forkd.wait_for_metric("forkd_handoff_errors_total", 1, code=code)


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
