"""The fake API does what it says, seen by clients that are not ours."""

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h2.events
import h2.exceptions
import pytest
import requests
import urllib3
from h2.errors import ErrorCodes
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_api import FakeApi, text
from tests.fake_api.certificates import Kind
from tests.fake_api.exchange import Exchange
from tests.fake_api.h2_client import H2Client
from tests.fake_api.patterns import PATTERNS
from tests.fake_api.wire import Event, Spelling
from tests.harness import Answer, own_fds

ASK = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
TIMEOUT = 20.0


@pytest.fixture
def api() -> Iterator[FakeApi]:
    before = own_fds()
    with FakeApi() as api:
        yield api
    assert own_fds() == before


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def ask(
    session: requests.Session, api: FakeApi, pattern: str = "", path: str = "/chat/completions", **more: Any
) -> Any:
    return session.post(
        api.base + path,
        json={**ASK, **more},
        headers={"X-Test-Pattern": pattern} if pattern else {},
        timeout=TIMEOUT,
        verify=api.ca_file or True,
        stream=True,
        allow_redirects=False,
    )


def events(body: bytes) -> list[tuple[str, Any]]:
    """By the rules of tests/harness.py, which are others' than ours."""
    found = Answer(b"HTTP/1.1 200 OK\r\n\r\n" + body.removeprefix(b"\xef\xbb\xbf")).events
    return [(event.name, event.data if event.data == "[DONE]" else json.loads(event.data)) for event in found]


def said(body: bytes) -> str:
    """The text of a Chat Completions answer."""
    chunks = [data for _, data in events(body) if data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_chat_completions(api: FakeApi, session: requests.Session) -> None:
    answer = ask(session, api, "ok words=7", stream_options={"include_usage": True})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    (first, *_, finish, usage, done) = [data for _, data in events(answer.content)]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert said(answer.content) == text(7)
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 7)
    assert done == "[DONE]"
    (seen,) = api.wait_for(lambda api: [seen for seen in api.requests if seen.ended_at])
    assert (seen.method, seen.path, seen.protocol) == ("POST", "/v1/chat/completions", "http1")
    assert seen.json["messages"] == ASK["messages"]
    assert seen.headers["x-test-pattern"] == seen.pattern == "ok words=7"
    assert seen.body_sent == len(answer.content)
    assert seen.cancelled_at is None


def test_messages(api: FakeApi, session: requests.Session) -> None:
    found = events(ask(session, api, "reasoning words=2", "/messages").content)
    assert all(name == data["type"] for name, data in found)
    names = [name for name, _ in found]
    assert names == [
        *["message_start", "content_block_start", "ping", "content_block_delta", "content_block_delta"],
        *["content_block_delta", "content_block_stop", "content_block_start", "content_block_delta"],
        *["content_block_delta", "content_block_stop", "message_delta", "message_stop"],
    ]
    kinds = [data["delta"]["type"] for name, data in found if name == "content_block_delta"]
    assert kinds == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta", "text_delta"]
    assert dict(found)["message_delta"]["delta"]["stop_reason"] == "end_turn"


@pytest.mark.parametrize("path", ["/runs/stream", "/threads/1ef0/runs/stream"])
def test_langgraph(api: FakeApi, session: requests.Session, path: str) -> None:
    body = {"assistant_id": "agent", "input": {"messages": []}, "stream_mode": ["messages-tuple", "values"]}
    answer = session.post(api.root + path, json=body, timeout=TIMEOUT)
    found = events(answer.content)
    assert b"\r\nevent: metadata\r\n" in answer.content
    assert "run_id" in found[0][1]
    assert "".join(data[0]["content"] for name, data in found if name == "messages") == text(5)
    assert [data for name, data in found if name == "values"][-1]["messages"][-1]["content"] == text(5)
    assert found[-1] == ("end", None)


@pytest.mark.parametrize(
    "pattern",
    [
        *["ok", "one-write", "comment", "crlf", "cr", "no-space", "multi-line", "odd-fields", "known-length"],
        *["connection-close", "until-close", "trickle", "trickle size=7", "drip", "reasoning"],
        *["no-done", "stale", "usage-only-at-end"],
    ],
)
def test_good_answers_over_http1(api: FakeApi, session: requests.Session, pattern: str) -> None:
    assert said(ask(session, api, pattern).content) == text(5)
    api.wait_for(lambda api: api.requests[0].ended_at)


@pytest.mark.parametrize(
    "pattern",
    [
        *["ok", "one-write", "comment", "crlf", "cr", "known-length", "informational", "trickle", "drip", "trailers"],
        *["padding", "server-ping", "unknown-frame", "end-on-data", "rst-after-end", "goaway-after", "huge-head"],
    ],
)
@pytest.mark.parametrize("tls", [None, "good"])
def test_good_answers_over_http2(pattern: str, tls: Kind | None) -> None:
    with FakeApi(tls=tls) as api, H2Client(api) as client:
        client.h2.local_settings.max_header_list_size = 2**24
        client.h2.decoder.max_header_list_size = 2**24
        assert said(client.answer(client.ask(pattern))) == text(5)
        assert api.requests[0].protocol == "h2"


def test_keep_alive_and_the_script(api: FakeApi, session: requests.Session) -> None:
    async def mine(ask: Exchange) -> None:
        await ask.whole(418, "text/plain", b"mine")

    api.script = ["429 retry_after=2 retry_after_ms=50", "529 body=none", mine, "redirect"]
    busy, overloaded, teapot, elsewhere = [ask(session, api, "ok") for _ in range(4)]
    assert (busy.status_code, busy.headers["retry-after"], busy.headers["retry-after-ms"]) == (429, "2", "50")
    assert busy.json()["error"]["type"] == "rate_limit_error"
    assert (overloaded.status_code, overloaded.content) == (529, b"")
    assert (teapot.status_code, teapot.content) == (418, b"mine")
    assert elsewhere.headers["location"].startswith(api.base)


def test_one_connection_for_many_requests(api: FakeApi, session: requests.Session) -> None:
    for _ in range(3):
        assert said(ask(session, api).content) == text(5)
    assert api.connections_opened == api.connections_peak == 1
    assert api.connections[0].requests == 3


def test_a_client_that_goes_is_noticed(api: FakeApi, session: requests.Session) -> None:
    answer = ask(session, api, "gate-tokens")
    api.gate.let(2)
    api.wait_for(lambda api: api.gate.waiting, "the gate's third wait")
    seen = api.requests[0]
    answer.close()
    api.wait_for(lambda api: seen.cancelled_at, "the cancellation")
    assert seen.ended_at is None
    api.wait_for(lambda api: api.connections[0].closed_by_client)


def test_a_stream_that_is_reset_is_noticed_and_the_others_go_on(api: FakeApi) -> None:
    with H2Client(api) as client:
        first, second = client.ask("gate-headers"), client.ask("gate-headers")
        api.wait_for(lambda api: api.gate.waiting == 2)
        client.h2.reset_stream(first, ErrorCodes.CANCEL)
        client.flush()
        api.wait_for(lambda api: api.requests[0].cancelled_at and api.gate.waiting == 1, "the cancellation")
        assert api.requests[0].cancel_code == ErrorCodes.CANCEL
        api.gate.open()
        assert said(client.answer(second)) == text(5)
        assert api.connections[0].streams_peak == 2


def test_the_gate_holds_the_head(api: FakeApi) -> None:
    with H2Client(api) as client:
        stream = client.ask("gate-headers")
        api.wait_for(lambda api: api.gate.waiting)
        seen = api.requests[0]
        assert seen.head_sent_at is None
        api.gate.open()
        client.answer(stream)
        api.wait_for(lambda api: seen.head_sent_at and seen.ended_at)


@pytest.mark.parametrize("pattern", ["cut-before-answer", "close-before-answer", "garbage"])
def test_no_answer(api: FakeApi, session: requests.Session, pattern: str) -> None:
    with pytest.raises(requests.ConnectionError):
        ask(session, api, pattern)
    api.wait_for(lambda api: api.requests[0].over)


@pytest.mark.parametrize(
    "pattern", ["cut-after", "close-after", "cut-after-head", "cut-in-utf8", "bad-chunk", "length-too-long"]
)
def test_half_an_answer(api: FakeApi, session: requests.Session, pattern: str) -> None:
    answer = ask(session, api, pattern)
    api.gate.open()
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        assert answer.content
    answer.close()
    api.wait_for(lambda api: api.requests[0].over)


@pytest.mark.parametrize("pattern", ["endless-header", "silence", "bad-status-line"])
@pytest.mark.parametrize("tls", [None, "good"])
def test_what_lasts_until_the_client_gives_up(pattern: str, tls: Kind | None) -> None:
    with FakeApi(tls=tls, alpn=()) as api:
        sock: socket.socket = socket.create_connection((api.host, api.port), TIMEOUT)
        if tls:
            sock = ssl.create_default_context(cafile=api.ca_file).wrap_socket(sock, server_hostname="localhost")
        with sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nx-test-pattern: %b\r\ncontent-length: 2\r\n\r\n{}"
                % pattern.encode()
            )
            api.wait_for(lambda api: api.requests)
            if pattern == "endless-header":
                assert sock.recv(12) == b"HTTP/1.1 200"
                api.wait_for(lambda api: api.requests[0].stalled_since)
            assert not api.requests[0].over
        api.wait_for(lambda api: api.requests[0].cancelled_at)


def test_a_client_that_does_not_renew_its_window_stalls_its_answer(api: FakeApi) -> None:
    with H2Client(api, renew_windows=False) as client:
        client.ask("flood")
        api.wait_for(lambda api: api.requests and api.requests[0].body_sent == 65535)
        seen = api.requests[0]
        client.h2.increment_flow_control_window(1000)
        client.h2.increment_flow_control_window(1000, seen.stream_id)
        client.flush()
        api.wait_for(lambda api: seen.body_sent == 66535 and seen.stalled_since)


@pytest.mark.parametrize(
    "pattern", ["flow-violation", "bad-frame", "oversized-frame", "data-before-headers", "endless-header"]
)
def test_what_http2_forbids(pattern: str) -> None:
    with FakeApi() as api, H2Client(api, renew_windows=False) as client:
        client.ask(pattern)
        with pytest.raises(h2.exceptions.ProtocolError):
            client.until(h2.events.StreamEnded)


def test_refused_streams(api: FakeApi) -> None:
    with H2Client(api) as client:
        refused, kept = client.ask("rst-refused"), client.ask("ok")
        assert client.until(h2.events.StreamReset, refused).error_code == ErrorCodes.REFUSED_STREAM
        assert said(client.answer(kept)) == text(5)
        broken = client.ask("rst after=1")
        assert client.until(h2.events.StreamReset, broken).error_code == ErrorCodes.INTERNAL_ERROR
        assert said(client.body(broken)) == text(1)


def test_goaway_lets_the_streams_below_end(api: FakeApi) -> None:
    with H2Client(api) as client:
        client.ask("gate-headers")
        api.wait_for(lambda api: api.gate.waiting)
        client.ask("goaway-refuse")
        api.wait_for(lambda api: api.requests[1:] and api.requests[1].over)
        assert client.until(h2.events.ConnectionTerminated).last_stream_id == 1
        api.gate.open()
        api.wait_for(lambda api: api.requests[0].ended_at and api.connections[0].closed_at)
        assert api.requests[0].cancelled_at is None
        assert not api.connections[0].closed_by_client


def test_max_streams() -> None:
    with FakeApi(max_streams=2) as api, H2Client(api) as client:
        for _ in range(3):
            client.ask("gate-headers")
        reset = client.until(h2.events.StreamReset)
        assert (reset.stream_id, reset.error_code) == (5, ErrorCodes.REFUSED_STREAM)
        assert client.h2.remote_settings.max_concurrent_streams == 2
        assert api.connections[0].refused == 1
        assert len(api.requests) == 2


def test_pings(api: FakeApi) -> None:
    with H2Client(api) as client:
        client.h2.ping(b"12345678")
        client.flush()
        client.until(h2.events.PingAckReceived)
        stream = client.ask("no-ping-answer words=0")
        api.wait_for(lambda api: api.requests and api.requests[0].pattern)
        client.events.clear()
        client.h2.ping(b"87654321")
        client.flush()
        api.wait_for(lambda api: api.connections[0].pings == 2)
        client.h2.reset_stream(stream)
        client.answer(client.ask("ok"))
        assert not any(isinstance(event, h2.events.PingAckReceived) for event in client.events)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tls_by_requests(session: requests.Session, host: str) -> None:
    with FakeApi(tls="good", host=host) as api:
        assert said(ask(session, api).content) == text(5)
        (connection,) = api.connections
        assert (connection.protocol, connection.tls_version, connection.fault) == ("http1", "TLSv1.3", "")


@pytest.mark.parametrize(
    ("kind", "why"), [("expired", "expired"), ("other-name", "mismatch"), ("self-signed", "self-signed")]
)
def test_bad_certificates(session: requests.Session, kind: Kind, why: str) -> None:
    with FakeApi(tls=kind) as api:
        with pytest.raises(requests.exceptions.SSLError, match=why):
            ask(session, api)
        api.wait_for(lambda api: api.connections[0].fault.startswith("TLS handshake"))
        assert not api.requests


def test_unix_socket_speaks_both(tmp_path: Path) -> None:
    with FakeApi(unix_path=tmp_path / "api.sock") as api:
        with H2Client(api) as client:
            assert said(client.answer(client.ask())) == text(5)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(api.unix_path))
            body = json.dumps(ASK).encode()
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-test-pattern: until-close\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            with sock.makefile("rb") as file:
                assert said(file.read().partition(b"\r\n\r\n")[2]) == text(5)
        assert [seen.protocol for seen in api.requests] == ["h2", "http1"]


def test_what_can_happen_to_connections(api: FakeApi, session: requests.Session) -> None:
    api.on_accept = ["reset"]
    with pytest.raises(requests.ConnectionError):
        ask(session, api)
    assert said(ask(session, api).content) == text(5)
    api.stop_listening()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((api.host, api.port), TIMEOUT)
    api.drop_connections()
    api.wait_for(lambda api: api.connections_open == 0)
    api.listen()
    assert said(ask(session, api).content) == text(5)
    api.on_accept = ["silent"]
    with socket.create_connection((api.host, api.port), TIMEOUT):
        api.wait_for(lambda api: api.connections_opened == 4)
    api.wait_for(lambda api: api.connections[3].closed_by_client)


def test_a_server_that_accepts_nothing() -> None:
    with FakeApi(listen=False) as api:
        with socket.create_connection((api.host, api.port), TIMEOUT):
            assert not api.connections
        api.listen()
        api.wait_for(lambda api: api.connections_opened == 1)


def test_informational_heads_over_http1(api: FakeApi) -> None:
    """http.client takes a 103 for the answer."""
    with socket.create_connection((api.host, api.port), TIMEOUT) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nx-test-pattern: informational\r\n"
            b"connection: close\r\ncontent-length: 2\r\n\r\n{}"
        )
        with sock.makefile("rb") as file:
            heads = file.read().split(b"\r\n\r\n")
    assert [head.split(b"\r\n")[0] for head in heads[:3]] == [
        b"HTTP/1.1 100 Continue",
        b"HTTP/1.1 103 Early Hints",
        b"HTTP/1.1 200 OK",
    ]


def test_other_paths_and_methods_are_no_part_of_it(api: FakeApi, session: requests.Session) -> None:
    assert session.get(api.base + "/chat/completions", timeout=TIMEOUT).status_code == 404
    assert ask(session, api, path="/models").status_code == 404


def test_mistakes_of_a_test_are_told_at_the_end(session: requests.Session) -> None:
    for pattern, mistake in (("okay", "no pattern 'okay'"), ("ok wrods=3", "wrods")):
        api = FakeApi()
        with pytest.raises((LookupError, TypeError), match=mistake), api, pytest.raises(requests.ConnectionError):
            ask(session, api, pattern)


@pytest.mark.parametrize("protocol", ["http1", "h2"])
@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_no_pattern_fails_of_itself(pattern: str, protocol: str) -> None:
    """Whatever the client makes of it: the server is well afterwards, and its connections end."""
    with FakeApi() as api:
        pool = urllib3.HTTPConnectionPool(api.host, api.port, timeout=TIMEOUT, retries=False)
        api.gate.open()
        if protocol == "h2":
            client = H2Client(api)
            client.ask(pattern)
        else:
            client = None
            sock = socket.create_connection((api.host, api.port), TIMEOUT)
            body = json.dumps(ASK).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nx-test-pattern: {pattern}\r\n"
            sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        api.wait_for(lambda api: api.requests and (api.requests[0].over or api.requests[0].pattern))
        (client.sock if client else sock).close()
        api.wait_for(lambda api: api.requests[0].over and api.connections_open == 0, pattern)
        answer = pool.request("POST", "/v1/messages", body=b"{}", headers={"X-Test-Pattern": "ok"})
        assert answer.data.endswith(b'event: message_stop\ndata: {"type": "message_stop"}\n\n')
        pool.close()
        wrong_protocol = [error for error in api.errors if "a pattern for" in str(error)]
        assert wrong_protocol == api.errors
        api.errors.clear()


@given(
    st.text(alphabet=st.characters(blacklist_characters="\r\n", codec="utf-8")), st.sampled_from(["\n", "\r\n", "\r"])
)
def test_spelling(data: str, line_end: str) -> None:
    raw = Spelling(line_end=line_end).encode(Event(f"a{data}\n{data}", "name"))
    (event,) = Answer(b"HTTP/1.1 200 OK\r\n\r\n" + raw).events
    assert (event.name, event.data) == ("name", f"a{data}\n{data}")
