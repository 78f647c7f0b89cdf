"""SocketHandoffFallback relay: a client under TLS or HTTP/2 gets its answer through Apache, and either side may vanish.

Each test runs over HTTP/1.1 under TLS with prefork and event, and over HTTP/2 with event: mod_http2 refuses prefork.
"""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from handoff_site import generated, make_docroot
from harness import public_dir, wait_until
from receiver import ANSWER, Receiver
from secure import PATIENCE_SECS, Broken, Http1, Http2, SecureSite, code, curl, query, read_all, secure_site

CONF = """
SocketHandoffFormat envelope
SocketHandoffFallback relay
SetOutputFilter DEFLATE
Timeout 20
<Location /raw>
    SocketHandoffFormat raw
</Location>
<Location /refuse>
    SocketHandoffFallback error
</Location>
<Location /patient>
    SocketHandoffPersistent On
</Location>
AliasMatch "^/(?:raw|refuse|patient)/(.+)$" "{docroot}/$1"
<Location /cors>
    Header set Access-Control-Allow-Origin "https://app.example"
    Header always set X-Always "yes"
</Location>
AliasMatch "^/cors/(.+)$" "{docroot}/$1"
"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nConnection: close\r\n\r\n"
Way: TypeAlias = type[Http1] | type[Http2]
OPTION: dict[Way, str] = {Http1: "--http1.1", Http2: "--http2"}


@pytest.fixture(scope="module", params=[("prefork", Http1), ("event", Http1), ("event", Http2)], ids=str)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[SecureSite, Way]]:
    mpm, way = request.param
    with public_dir() as docroot, public_dir() as prefix:
        make_docroot(docroot)
        with secure_site(mpm, docroot, prefix, CONF.format(docroot=docroot)) as secure:
            yield secure, way


@pytest.fixture
def site(served: tuple[SecureSite, Way]) -> SecureSite:
    return served[0]


@pytest.fixture
def way(served: tuple[SecureSite, Way]) -> Way:
    return served[1]


@pytest.fixture
def daemon(site: SecureSite) -> Iterator[Receiver]:
    with Receiver(site.sock, answer=False) as receiver:
        yield receiver
        assert receiver.nothing_came()


def ask(site: SecureSite, way: Way, where: str = "", body: bytes | None = None, **parameters: object) -> Http1 | Http2:
    return way(site, query(f"{where}/handoff.php", **{"path": site.sock, "data": "d", **parameters}), body)


def end(client: socket.socket) -> None:
    """As a daemon ends that knows that it is relayed."""
    client.shutdown(socket.SHUT_WR)
    client.settimeout(PATIENCE_SECS)
    assert client.recv(1) == b""  # Apache closes its end then
    client.close()


def note(site: SecureSite, seen: int) -> str:
    """What the access log says of the one request since there were `seen` lines."""
    wait_until(lambda: len(site.apache.access_log()) > seen, "the access log's line")
    return site.apache.access_log()[seen].split()[3]


def lets_go(client: socket.socket) -> None:
    """Apache closes its end: to the daemon, the client is gone."""
    with client:
        client.settimeout(PATIENCE_SECS)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""


# An answer that comes.


def test_each_piece_goes_out_at_once(site: SecureSite, way: Way, daemon: Receiver) -> None:
    seen = len(site.apache.access_log())
    answer = ask(site, way)
    handoff = daemon.get()
    assert handoff.flags == 0x04
    assert handoff.data == b"d"
    handoff.client.sendall(HEAD)
    assert answer.status == 200
    for number in range(20):
        event = b"data: %d\n\n" % number
        handoff.client.sendall(event)
        got = b""
        while len(got) < len(event):  # and nothing else was sent meanwhile that could have pushed it out
            got += answer.read()
        assert got == event
    end(handoff.client)
    assert answer.read() == b""
    assert note(site, seen) == "relayed"
    answer.close()


def test_the_answers_head_is_the_daemons(site: SecureSite, way: Way, daemon: Receiver) -> None:
    """The application's fields go to the daemon, and what does not come back from it is not sent."""
    answer = ask(site, way, "/cors", **{"h[]": ["Set-Cookie: app=1", "Content-Encoding: x", "X-App: 1"]})
    handoff = daemon.get()
    assert handoff.response_headers("Access-Control-Allow-Origin") == ["https://app.example"]
    assert handoff.response_headers("X-Always") == ["yes"]
    handoff.client.sendall(
        b"HTTP/1.1 429 Slow down\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\nX-Odd:\t \xc3\xa9 \t\r\nRetry-After: 7\r\n"
        b"Connection: close\r\nKeep-Alive: 5\r\nTrailer: x\r\nX-Socket-Handoff: /etc/passwd\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}and more than was announced"
    )
    assert answer.status == 429
    assert answer.header("Set-Cookie") == ["a=1", "b=2"]
    assert answer.header("X-Odd") == ["é" if way is Http2 else "Ã©"]  # http.client takes it for Latin-1
    assert (answer.header("Retry-After"), answer.header("Content-Length")) == (["7"], ["2"])
    assert answer.header("Content-Type") == ["application/json"]
    for name in ("Trailer", "X-Socket-Handoff", "Access-Control-Allow-Origin", "X-App", "Content-Encoding"):
        assert answer.header(name) == []
    assert answer.header("Keep-Alive") != ["5"]
    assert read_all(answer) == b"{}"
    lets_go(handoff.client)
    answer.close()


def test_raw_has_no_flag_and_every_end_is_the_end(site: SecureSite, way: Way, daemon: Receiver) -> None:
    answer = ask(site, way, "/raw")
    handoff = daemon.get()
    assert handoff.payload == b"d"
    handoff.client.sendall(ANSWER)
    handoff.client.close()
    assert (answer.status, read_all(answer)) == (200, b"from the daemon")
    answer.close()


def test_much_data_both_ways(site: SecureSite, way: Way, daemon: Receiver) -> None:
    """Data in a memfd, a request body, and an answer that is more than any buffer on the way."""
    body = generated(3_000_000)
    for where, flags in (("", 0x05), ("/raw", 0x05)):
        answer = ask(site, way, where, b"x" * 16_000, size=100_000, source="body")
        handoff = daemon.get()
        assert (handoff.flags, handoff.data) == (flags, generated(100_000))
        handoff.client.sendall(b"HTTP/1.0 200\n\n")
        sending = os.fork()
        if sending == 0:
            handoff.client.sendall(body)
            handoff.client.shutdown(socket.SHUT_WR)
            os._exit(0)
        assert read_all(answer) == body
        assert os.waitpid(sending, 0)[1] == 0
        lets_go(handoff.client)
        answer.close()


def test_an_answer_without_a_body(site: SecureSite, way: Way, daemon: Receiver) -> None:
    for head in (b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
        answer = ask(site, way)
        handoff = daemon.get()
        handoff.client.sendall(head)
        assert answer.status == int(head[9:12])
        assert read_all(answer) == b""
        lets_go(handoff.client)
        answer.close()


def test_the_next_request_of_the_connection(site: SecureSite, daemon: Receiver) -> None:
    """A relayed answer has an end of its own, so keep-alive goes on."""
    answer = Http1(site, query("/handoff.php", path=site.sock))
    handoff = daemon.get()
    handoff.client.sendall(HEAD + b"data: x\n\n")
    handoff.client.shutdown(socket.SHUT_WR)
    assert read_all(answer) == b"data: x\n\n"
    handoff.client.close()
    answer.connection.request("GET", "/plain.html")
    response = answer.connection.getresponse()
    assert response.read() == b"plain page\n"
    answer.close()


def test_by_kept_connections(site: SecureSite, way: Way, daemon: Receiver) -> None:
    for _ in range(3):
        answer = ask(site, way, "/patient")
        handoff = daemon.get()
        handoff.client.sendall(HEAD + b"x")
        end(handoff.client)
        assert read_all(answer) == b"x"
        answer.close()


def test_curl(site: SecureSite, way: Way, daemon: Receiver) -> None:
    """As people would try it: the first token is on the screen while the second has not been said."""
    command = curl(site, query("/handoff.php", path=site.sock), OPTION[way], "-w", "%{http_version} %{http_code}")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        handoff = daemon.get()
        handoff.client.sendall(HEAD + b"data: one\n\n")
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 100) == b"data: one\n\n"
        handoff.client.sendall(b"data: two\n\n")
        assert os.read(process.stdout.fileno(), 100) == b"data: two\n\n"
        end(handoff.client)
        assert process.stdout.read() == (b"1.1 200" if way is Http1 else b"2 200")
        assert process.wait(PATIENCE_SECS) == 0


def test_curl_notices_an_answer_that_is_cut(site: SecureSite, way: Way, daemon: Receiver) -> None:
    command = curl(site, query("/handoff.php", path=site.sock), OPTION[way])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        handoff = daemon.get()
        handoff.client.sendall(HEAD + b"data: one\n\n")
        handoff.client.close()
        # 18: partial file. 92: the HTTP/2 stream was not closed cleanly.
        assert process.wait(PATIENCE_SECS) == (18 if way is Http1 else 92)


# A daemon that vanishes.


@pytest.mark.parametrize("said", [b"", b"H", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nX: y\r\n\r"])
@pytest.mark.parametrize("how", ["shutdown", "close"])
def test_a_daemon_that_vanishes_before_the_end_of_its_head(
    site: SecureSite, way: Way, daemon: Receiver, said: bytes, how: str
) -> None:
    answer = ask(site, way, **{"h[]": "Set-Cookie: app=1"})
    client = daemon.get().client
    client.sendall(said)
    if how == "close":
        client.close()
    else:
        client.shutdown(socket.SHUT_WR)
    assert code(answer) == (502, "daemon_lost")
    assert answer.header("Set-Cookie") == ["app=1"]
    answer.close()
    client.close()


@pytest.mark.parametrize("said", [b"", b"data: one\n\ndata: tw", b"x" * 300_000])
@pytest.mark.parametrize("length", [b"", b"Content-Length: 300001\r\n"])
def test_a_daemon_that_vanishes_in_its_body(
    site: SecureSite, way: Way, daemon: Receiver, said: bytes, length: bytes
) -> None:
    """What came arrives, and does not look like all."""
    seen = len(site.apache.access_log())
    answer = ask(site, way)
    client = daemon.get().client
    client.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n")
    got = b""
    assert answer.status == 200
    if said:
        sending = os.fork()
        if sending == 0:
            client.sendall(said)
            os._exit(0)
        while len(got) < len(said):
            got += answer.read()
        assert os.waitpid(sending, 0)[1] == 0
    client.close()
    with pytest.raises(Broken):
        got += read_all(answer)
    assert got == said
    assert note(site, seen) == "relayed_cut"
    answer.close()


# A client that vanishes.


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nX: ", HEAD, HEAD + b"data: one\n\n"])
def test_a_client_that_vanishes(site: SecureSite, way: Way, daemon: Receiver, said: bytes) -> None:
    """The daemon is told, also while it is silent, and nobody is left waiting."""
    seen = len(site.apache.access_log())
    answer = ask(site, way)
    client = daemon.get().client
    client.sendall(said)
    if HEAD in said:
        assert answer.status == 200
    if said.endswith(b"one\n\n"):
        assert answer.read() == b"data: one\n\n"
    answer.close()
    lets_go(client)
    assert note(site, seen) == ("relayed_client_gone" if HEAD in said else "client_gone")


def test_a_client_that_vanishes_with_its_connection(site: SecureSite, way: Way, daemon: Receiver) -> None:
    answers = [ask(site, way) for _ in range(3)]
    clients = [daemon.get().client for _ in answers]
    for client in clients:  # in whatever order they came
        client.sendall(HEAD + b"x")
    for answer in answers:
        assert answer.read() == b"x"
    for answer in answers:
        answer.hang_up()
    for client in clients:
        lets_go(client)


def send_for_ever(client: socket.socket) -> None:
    while True:
        client.sendall(b"x" * 65536)


def test_a_client_that_reads_nothing(site: SecureSite, way: Way, daemon: Receiver) -> None:
    """The daemon is held up, and when the client goes its writing fails."""
    answer = ask(site, way)
    client = daemon.get().client
    client.sendall(HEAD)
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        send_for_ever(client)
    answer.hang_up()
    client.settimeout(PATIENCE_SECS)
    with pytest.raises(ConnectionError):
        send_for_ever(client)
    client.close()


# An answer that is none.


@pytest.mark.parametrize(
    "head",
    [
        b"hello\r\n\r\n",
        b"\r\n\r\n",
        b"\n\n",
        b"data: one\n\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 600 X\r\n\r\n",
        b"HTTP/1.1 2000 X\r\n\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : blank\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: y\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \0\r\n\r\n",
        b"HTTP/1.1 200 OK\0\r\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \x7f\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"x" * 70_000,
    ],
)  # fmt: skip
def test_an_answer_that_is_none(site: SecureSite, way: Way, daemon: Receiver, head: bytes) -> None:
    answer = ask(site, way)
    client = daemon.get().client
    client.sendall(head + b"secret")
    assert code(answer) == (502, "bad_answer")
    lets_go(client)
    answer.close()


def test_a_head_in_drips(site: SecureSite, way: Way, daemon: Receiver) -> None:
    answer = ask(site, way)
    client = daemon.get().client
    for byte in b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nbody":
        client.send(bytes((byte,)))
    client.shutdown(socket.SHUT_WR)
    assert (answer.status, answer.header("X"), read_all(answer)) == (200, ["y"], b"body")
    client.close()
    answer.close()


# When it is not to be, and what is left.


def test_refused_where_it_is_told_so(site: SecureSite, way: Way, daemon: Receiver) -> None:
    expected = "tls_unsupported" if way is Http1 else "http2_unsupported"
    answer = ask(site, way, "/refuse")
    assert code(answer) == (500, expected)
    answer.close()


def test_no_daemon_is_the_usual_error(site: SecureSite, way: Way) -> None:
    answer = way(site, query("/handoff.php", path=site.prefix / "nobody", data="d"))
    assert code(answer) == (503, "daemon_unavailable")
    assert answer.header("Retry-After") == ["1"]
    answer.close()


def test_the_warning_comes_once(site: SecureSite, daemon: Receiver) -> None:
    for _ in range(3):
        answer = ask(site, Http1)
        daemon.get().client.close()
        assert code(answer)[0] == 502
        answer.close()
    assert site.apache.error_log().count("said at most once a minute") == 1


def test_what_can_be_handed_off_is(site: SecureSite, daemon: Receiver) -> None:
    """The plain port beside the TLS one."""
    with socket.create_connection(("127.0.0.1", site.apache.port), PATIENCE_SECS) as sock:
        sock.sendall(f"GET {query('/handoff.php', path=site.sock)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        handoff = daemon.get()
        assert handoff.flags == 0
        handoff.client.sendall(ANSWER)
        handoff.client.close()
        assert b"".join(iter(lambda: sock.recv(65536), b"")) == ANSWER


def test_a_silent_daemon_is_given_up(small_site: tuple[Path, Path]) -> None:
    """By Apache's Timeout: before the head an error, afterwards an answer that is cut. Drips do not buy time."""
    docroot, prefix = small_site
    conf = "Timeout 1\nSocketHandoffFallback relay\nSocketHandoffFormat envelope"
    with secure_site("event", docroot, prefix, conf) as site, Receiver(site.sock, answer=False) as daemon:
        for way in (Http1, Http2):
            answer = ask(site, way)
            client = daemon.get().client
            client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            assert code(answer) == (504, "daemon_timeout")
            lets_go(client)
            answer = ask(site, way)
            client = daemon.get().client
            client.sendall(HEAD + b"one")
            assert answer.read() == b"one"
            with pytest.raises(Broken):
                answer.read()
            lets_go(client)


def test_no_fd_is_left(site: SecureSite, way: Way, daemon: Receiver) -> None:
    def fds() -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in site.apache.children())

    def round_trip(number: int) -> None:
        answer = ask(site, way)
        client = daemon.get().client
        if number % 3:
            client.sendall(HEAD + b"x")
            assert answer.read() == b"x"
        if number % 2:
            client.close()
        answer.hang_up()
        client.close()

    for number in range(12):
        round_trip(number)
    children = site.apache.children()
    wait_until(lambda: len(site.apache.access_log()) and fds() == fds(), "quiet")
    before = fds()
    for number in range(60):
        round_trip(number)
    assert site.apache.children() == children
    wait_until(lambda: fds() <= before, "as many fds as before")
