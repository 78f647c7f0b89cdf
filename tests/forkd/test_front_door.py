"""The embedded front door, over real sockets, with a daemon that the test plays."""

import fcntl
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

from forkd import front_door
from forkd.front_door import FrontDoor
from tests.fake_daemon import HEAD, FakeDaemon, Handoff
from tests.harness import PATIENCE_SECS, Answer, open_fds, read_answer, wait_for

HOST = b"Host: localhost\r\n"
ALL_SEALS = 0x0F


@pytest.fixture
def door(tmp_path: Path) -> Iterator[FrontDoor]:
    """A running front door, which must be left with as many fds as it began with."""
    door = FrontDoor("127.0.0.1", 0, str(tmp_path / "s"))
    door.start()
    before = open_fds(os.getpid())
    yield door
    wait_for(lambda: open_fds(os.getpid()) == before, "no fd leaked")
    door.close()


@pytest.fixture
def daemon(tmp_path: Path, door: FrontDoor) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "s") as daemon:
        yield daemon


def connect(door: FrontDoor, *pieces: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", door.port), PATIENCE_SECS)
    for piece in pieces:
        sock.sendall(piece)
    return sock


def ask(door: FrontDoor, *pieces: bytes) -> Answer:
    """What the front door itself answers, which must close in order."""
    answer = read_answer(connect(door, *pieces))
    assert not answer.reset
    return answer


def post(body: bytes, fields: bytes = b"Content-Type: application/x-www-form-urlencoded\r\n") -> bytes:
    return b"POST /stream.php HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (HOST, fields, len(body), body)


def get(path: str, fields: bytes = b"") -> bytes:
    return b"GET %b HTTP/1.1\r\n%b%b\r\n" % (path.encode(), HOST, fields)


def finish(handoff: Handoff, client: socket.socket, said: bytes = HEAD + b"data: x\n\n") -> None:
    """Answer as forkd would; the client must get exactly that, and its end."""
    handoff.say(said)
    handoff.client.shutdown(socket.SHUT_WR)
    assert client.recv(65536) == said
    handoff.close()
    answer = read_answer(client)
    assert answer.raw == b""
    assert not answer.reset


# Handing off


def test_a_form_is_handed_off(door: FrontDoor, daemon: FakeDaemon) -> None:
    client = connect(
        door,
        post(
            b"prompt=Gr%C3%BC%C3%9Fe+an+%26+alle",
            b"Content-Type: application/x-www-form-urlencoded; charset=UTF-8\r\n"
            b"Traceparent: 00-1-2-01\r\nAccept-Language: de\r\nX-Other: no\r\nX-Request-Id: req-7\r\n",
        ),
    )
    handoff = daemon.take()
    assert (handoff.flags, handoff.fds) == (0, 1)
    assert handoff.envelope["request"] == {
        "method": "POST",
        "uri": "/stream.php",
        "host": "localhost",
        "remote_addr": "127.0.0.1",
        "request_id": "req-7",
        "protocol": "HTTP/1.1",
        "headers": {"traceparent": "00-1-2-01", "accept-language": "de"},
    }
    user = handoff.data["user_id"]
    assert handoff.data == {"prompt": "Grüße an & alle", "user_id": user}
    assert handoff.client.getpeername() == client.getsockname()
    finish(handoff, client)


def test_a_query_is_handed_off(door: FrontDoor, daemon: FakeDaemon) -> None:
    query = urlencode({"prompt": "one\ntwo", "other": "x"})
    client = connect(door, get(f"http://localhost/stream.php?prompt=first&{query}#here"))
    handoff = daemon.take()
    assert handoff.data["prompt"] == "one\ntwo"
    assert handoff.envelope["request"]["method"] == "GET"
    assert re.fullmatch("[0-9a-f]{16}", handoff.envelope["request"]["request_id"])
    finish(handoff, client)


def test_json_and_a_conversation_are_handed_off(door: FrontDoor, daemon: FakeDaemon) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    as_json = json.dumps({"prompt": "Hi", "messages": messages}).encode()
    client = connect(door, post(as_json, b"Content-Type: application/json\r\n"))
    handoff = daemon.take()
    assert handoff.data["messages"] == messages
    finish(handoff, client)
    client = connect(door, post(urlencode({"prompt": "Hi", "messages": json.dumps(messages)}).encode()))
    handoff = daemon.take()
    assert handoff.data["messages"] == messages
    finish(handoff, client)


def test_nothing_behind_the_request_is_read(door: FrontDoor, daemon: FakeDaemon) -> None:
    request = post(b"prompt=Hi")
    for cut in (1, request.index(b"\r\n\r\n") + 2, len(request) - 4):
        client = connect(door, request[:cut])
        client.sendall(request[cut:] + b"what follows")
        handoff = daemon.take()
        assert handoff.client.recv(100) == b"what follows"
        assert handoff.data["prompt"] == "Hi"
        finish(handoff, client)


def test_big_data_travels_in_a_sealed_memfd(door: FrontDoor, daemon: FakeDaemon) -> None:
    prompt = "ü" * 500_000  # three bytes each but two in the data
    client = connect(door, post(b"prompt=" + quote(prompt).encode()))
    handoff = daemon.take()
    assert (handoff.flags, handoff.fds) == (1, 2)
    assert handoff.payload.endswith(b"\n")
    assert fcntl.fcntl(handoff.data_fd, fcntl.F_GET_SEALS) == ALL_SEALS
    assert handoff.data["prompt"] == prompt
    finish(handoff, client)


def test_a_client_that_waits_for_100_continue_gets_it(door: FrontDoor, daemon: FakeDaemon) -> None:
    head, body = post(
        b"prompt=Hi", b"Expect: 100-continue\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    ).split(b"\r\n\r\n")
    client = connect(door, head + b"\r\n\r\n")
    assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(body)
    handoff = daemon.take()
    assert handoff.data["prompt"] == "Hi"
    finish(handoff, client)


def test_a_visitor_is_known_again(door: FrontDoor, daemon: FakeDaemon) -> None:
    client = connect(door, get("/stream.php?prompt=Hi", b"Cookie: a=b; visitor=0123456789abcdef\r\n"))
    handoff = daemon.take()
    assert handoff.data["user_id"] == "0123456789abcdef"
    assert handoff.envelope["response_headers"] == []
    finish(handoff, client)
    client = connect(door, get("/stream.php?prompt=Hi", b"Cookie: visitor=nobody\r\n"))
    handoff = daemon.take()
    user = handoff.data["user_id"]
    assert handoff.envelope["response_headers"] == [["Set-Cookie", f"visitor={user}; Path=/; HttpOnly; SameSite=Lax"]]
    finish(handoff, client)


def test_many_at_once(door: FrontDoor, daemon: FakeDaemon) -> None:
    clients = [connect(door, get(f"/stream.php?prompt={i}")) for i in range(100)]
    handoffs = {handoff.data["prompt"]: handoff for handoff in (daemon.take() for _ in clients)}
    for i, client in enumerate(clients):
        finish(handoffs[str(i)], client, HEAD + b"data: %d\n\n" % i)


# Refusing


def refused(answer: Answer) -> tuple[int, str]:
    """Status and code, with everything that each refusal must have."""
    assert answer.header("content-type") == "application/json"
    assert answer.header("connection") == "close"
    assert answer.header("content-length") == str(len(answer.body))
    assert set(answer.json) == {"error", "code", "request_id"}
    assert answer.json["error"]
    assert answer.json["request_id"] == answer.header("x-request-id")
    return answer.status, answer.json["code"]


FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"
JSON = b"Content-Type: application/json\r\n"
BAD_MESSAGES = (b"7", b"{}", b"[7]", b'[{"role":"system","content":"x"}]', b'[{"role":"user","content":7}]', b"[")


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"nonsense\r\n\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n", (400, "bad_request")),
        (b"G@T / HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_request")),
        (b"PRI * HTTP/2.0\r\n\r\n", (505, "bad_request")),
        (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_request")),
        (b"GET http:// HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1\r\n\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1\r\n" + HOST * 2 + b"\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1\r\n" + HOST + b" folded\r\n\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X-A : b\r\n\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\x01\r\n\r\n", (400, "bad_request")),
        (get("/" + "a" * 9000), (414, "uri_too_long")),
        (get("/" + "a" * 20000), (414, "uri_too_long")),
        (get("/", b"X-A: " + b"a" * 20000 + b"\r\n"), (431, "headers_too_large")),
        (get("//["), (404, "not_found")),
        (get("/nowhere.html"), (404, "not_found")),
        (get("/../front_door.py"), (404, "not_found")),
        (get("/%2e%2e/front_door.py"), (404, "not_found")),
        (b"POST / HTTP/1.1\r\n" + HOST + b"\r\n", (405, "method_not_allowed")),
        (b"DELETE /stream.php HTTP/1.1\r\n" + HOST + b"\r\n", (405, "method_not_allowed")),
        (b"HEAD /stream.php HTTP/1.0\r\n\r\n", (405, "method_not_allowed")),
        (get("/stream.php"), (400, "no_prompt")),
        (get("/stream.php?prompt=+%0a"), (400, "no_prompt")),
        (get("/stream.php?" + "a&" * 200), (400, "bad_request")),
        (post(b""), (400, "no_prompt")),
        (post(b"prompt"), (400, "no_prompt")),
        (post(b"prompt=Hi", b""), (415, "bad_request")),
        (post(b"prompt=Hi", b"Content-Type: text/plain\r\n"), (415, "bad_request")),
        (post(b"{", JSON), (400, "bad_request")),
        (post(b"[]", JSON), (400, "bad_request")),
        (post(b"\xff", JSON), (400, "bad_request")),
        (post(b'{"a":' + b"[" * 100_000, JSON), (400, "bad_request")),
        (post(b'{"prompt":7}', JSON), (400, "no_prompt")),
        *((post(b"prompt=Hi&messages=" + quote(bad).encode(), FORM), (400, "bad_request")) for bad in BAD_MESSAGES),
        *((post(b'{"prompt":"Hi","messages":%b}' % bad, JSON), (400, "bad_request")) for bad in BAD_MESSAGES),
        (post(b"", b"Transfer-Encoding: chunked\r\n"), (411, "length_required")),
        (post(b"", b"Content-Length: 0\r\n"), (400, "bad_request")),
        (b"POST /stream.php HTTP/1.1\r\n" + HOST + b"Content-Length: +1\r\n\r\n", (400, "bad_request")),
        (b"POST /stream.php HTTP/1.1\r\n" + HOST + b"Content-Length: 5000000\r\n\r\n", (413, "payload_too_large")),
        (post(b"prompt=" + b"a" * 1_048_570, FORM), (413, "payload_too_large")),
        (get("/stream.php?prompt=Hi", b"Sec-Fetch-Site: cross-site\r\n"), (403, "cross_site")),
        (b"GET / HTTP/1.1\r\nHost: evil.example:8080\r\n\r\n", (421, "wrong_host")),
    ],
    ids=lambda value: repr(value[-40:]) if isinstance(value, bytes) else value[1],
)
def test_what_is_refused(door: FrontDoor, daemon: FakeDaemon, request_bytes: bytes, expected: tuple[int, str]) -> None:
    assert refused(ask(door, request_bytes)) == expected


def test_a_refusal_reaches_a_client_that_is_still_sending(door: FrontDoor) -> None:
    head = b"POST /stream.php HTTP/1.1\r\n" + HOST + b"Content-Length: 9000000\r\n\r\n"
    assert refused(ask(door, head, b"a" * 9_000_000)) == (413, "payload_too_large")


def test_what_is_allowed_is_told(door: FrontDoor) -> None:
    assert ask(door, b"PUT /stream.php HTTP/1.1\r\n" + HOST + b"\r\n").header("allow") == "GET, POST"
    assert ask(door, b"PUT /app.js HTTP/1.1\r\n" + HOST + b"\r\n").header("allow") == "GET, HEAD"


def test_without_a_daemon(door: FrontDoor) -> None:
    answer = ask(door, get("/stream.php?prompt=Hi", b"X-Request-Id: req-8\r\n"))
    assert refused(answer) == (503, "daemon_unavailable")
    assert answer.header("retry-after") == "2"
    assert answer.json["request_id"] == "req-8"


def test_with_a_daemon_that_accepts_nothing(door: FrontDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_door, "HANDOFF_TIMEOUT_SECS", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
            first.connect(str(tmp_path / "s"))
            answer = ask(door, get("/stream.php?prompt=Hi"))
    assert refused(answer) == (503, "daemon_busy")
    assert answer.header("retry-after") == "1"


def test_a_client_that_leaves(door: FrontDoor, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    crashes: list[object] = []
    monkeypatch.setattr(threading, "excepthook", crashes.append)
    for request in (b"", b"GET /", post(b"prompt=Hi")[:-3]):
        connect(door, request).close()
    for reset in (get("/"), post(b"prompt=Hi")[:-3]):
        client = connect(door, reset)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert ask(door, get("/")).status == 200
    assert not crashes


def test_a_client_that_is_silent(door: FrontDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_door, "REQUEST_TIMEOUT_SECS", 0.5)
    assert ask(door).raw == b""  # a connection opened in advance
    assert refused(ask(door, b"GET / HT")) == (408, "request_timeout")
    assert refused(ask(door, post(b"prompt=Hi")[:-3])) == (408, "request_timeout")


def test_a_bug_costs_one_request(door: FrontDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    crashes: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", crashes.append)

    def broken(request: object) -> tuple[str, list[list[str]]]:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(front_door, "_visitor", broken)
        assert refused(ask(door, get("/stream.php?prompt=Hi"))) == (500, "internal_error")
    assert ask(door, get("/")).status == 200
    wait_for(lambda: crashes, "the thread has ended")
    assert [crash.exc_type for crash in crashes] == [ZeroDivisionError]


# The page


@pytest.mark.parametrize(
    ("path", "content_type", "contains"),
    [
        ("/", "text/html; charset=utf-8", b"<title>forkd</title>"),
        ("/index.html", "text/html; charset=utf-8", b"<title>forkd</title>"),
        ("/app.js?x=1", "text/javascript; charset=utf-8", b"import"),
        ("/sse.js", "text/javascript; charset=utf-8", b"export"),
        ("/style.css", "text/css; charset=utf-8", b":root"),
    ],
)
def test_the_page_is_served(door: FrontDoor, path: str, content_type: str, contains: bytes) -> None:
    answer = ask(door, get(path))
    assert answer.status == 200
    assert answer.header("content-type") == content_type
    assert answer.header("x-content-type-options") == "nosniff"
    policy = answer.header("content-security-policy")
    assert policy is not None
    assert "unsafe" not in policy
    assert answer.header("content-length") == str(len(answer.body))
    assert contains in answer.body
    without_body = ask(door, get(path).replace(b"GET", b"HEAD"))
    assert (without_body.head, without_body.body) == (answer.head, b"")


def test_the_source_of_the_endpoint_is_not_served() -> None:
    assert "/stream.php" not in front_door.static_files()


# Where it listens


def test_a_taken_port_is_an_error(door: FrontDoor) -> None:
    with pytest.raises(OSError, match="in use"):
        FrontDoor("127.0.0.1", door.port, "/nowhere")


def test_the_url() -> None:
    for host, url, is_local in (
        ("127.0.0.1", "http://127.0.0.1:", True),
        ("::1", "http://[::1]:", True),
        ("0.0.0.0", "http://localhost:", False),
    ):
        door = FrontDoor(host, 0, "/nowhere")
        assert door.url == f"{url}{door.port}"
        assert door.is_local == is_local
        door.close()
