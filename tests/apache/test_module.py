"""mod_socket_handoff in a real Apache: what reaches the daemon, what reaches the client, and what must not.

The tests that take `site` run under every MPM: prefork with mod_php, worker and event with PHP-FPM.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import pytest
import requests
from handoff_site import Site, generated
from harness import Apache, free_port, public_dir, wait_until
from receiver import ANSWER, Handoff, Receiver

ALL_SEALS = 0x0F  # SEAL, SHRINK, GROW, WRITE
OURS = ("X-Socket-Handoff", "X-Handoff-Data", "X-Handoff-Data-Source")
TIMEOUT = 30


def ask(site: Site, where: str, **query: object) -> requests.Response:
    """GET a path of the site; the response must not show our headers, whatever it is."""
    return check(requests.get(site.apache.url + where, params=query, timeout=TIMEOUT))


def check(response: requests.Response) -> requests.Response:
    for name in OURS:
        assert name not in response.headers
    return response


def answered(response: requests.Response) -> bool:
    """Whether it was the daemon that answered."""
    return response.status_code == 200 and response.text == "from the daemon"


def refused(response: requests.Response) -> tuple[int, str]:
    """Status and code of a refusal, which must be JSON in the promised shape."""
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    body = response.json()
    assert set(body) == {"error", "code"}
    assert body["error"]
    return response.status_code, body["code"]


def raw_exchange(port: int, request: bytes) -> bytes:
    """Everything the client gets until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        sock.sendall(request)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def get_line(where: str, **query: object) -> bytes:
    target = where + ("?" + urlencode(query, doseq=True) if query else "")
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@contextlib.contextmanager
def in_background(site: Site, where: str, **query: object) -> Iterator["Future[requests.Response]"]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(ask, site, where, **query)


def open_files(apache: Apache) -> set[str]:
    """What the fds of the serving processes refer to."""
    found = set()
    for pid in apache.children():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(fd))
    return found


def delivering(apache: Apache) -> bool:
    """Whether a server process is trying to deliver a handoff with big data: its memfd exists just then."""
    return any(name.startswith("/memfd:handoff-data") for name in open_files(apache))


def fd_count(apache: Apache) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in apache.children())


# The wire.


def test_raw_data_by_header(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/raw/handoff.php", path=site.sock, data='{"prompt":"hi"}'))
        handoff = daemon.get()
    assert handoff.payload == b'{"prompt":"hi"}'


def test_no_data_is_one_nul(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        for query in ({}, {"data": ""}, {"source": "body"}, {"source": "body", "data": ""}):
            assert answered(ask(site, "/raw/handoff.php", path=site.sock, **query))
            assert daemon.get().payload == b"\0"


def test_no_data_in_an_envelope_is_empty(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/env/handoff.php", path=site.sock))
        handoff = daemon.get()
    assert handoff.flags == 0
    assert handoff.data == b""


def test_envelope_describes_the_request(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        response = requests.get(
            site.apache.url + "/env/handoff.php",
            params={"path": site.sock, "data": "d"},
            headers={
                "Host": "chat.example:8080",
                "traceparent": "00-1-2-03",
                "Last-Event-ID": "7",
                "Accept-Language": "fr",
                "X-Wanted": "no",
                "Cookie": "secret=1",
            },
            timeout=TIMEOUT,
        )
        assert answered(response)
        handoff = daemon.get()
    assert handoff.flags == 0
    assert handoff.data == b"d"
    assert handoff.envelope is not None
    request = handoff.envelope["request"]
    assert len(request.pop("request_id")) >= 20
    assert request == {
        "method": "GET",
        "uri": "/env/handoff.php?" + urlencode({"path": site.sock, "data": "d"}),
        "host": "chat.example",
        "remote_addr": "127.0.0.1",
        "protocol": "HTTP/1.1",
        "headers": {"traceparent": "00-1-2-03", "last-event-id": "7", "accept-language": "fr"},
    }


def test_remote_addr_is_the_client_behind_the_balancer(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        requests.get(
            site.apache.url + "/env/handoff.php",
            params={"path": site.sock},
            headers={"X-Forwarded-For": "203.0.113.7"},
            timeout=TIMEOUT,
        )
        envelope = daemon.get().envelope
    assert envelope is not None
    assert envelope["request"]["remote_addr"] == "203.0.113.7"


def test_cookies_and_cors_headers_reach_the_daemon(site: Site) -> None:
    cookies = ["a=1; Path=/", "b=2; HttpOnly"]
    more = [f"Set-Cookie: {cookie}" for cookie in cookies] + ["Content-Length: 0", "ETag: x", "Content-Type: x/y"]
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/cors/handoff.php", path=site.sock, **{"h[]": more}))
        handoff = daemon.get()
    assert handoff.response_headers("Set-Cookie") == cookies
    assert handoff.response_headers("Access-Control-Allow-Origin") == ["https://app.example"]
    assert handoff.response_headers("X-Always") == ["yes"]
    for framing in ("Content-Length", "ETag", "Content-Type", "Content-Encoding", *OURS):
        assert handoff.response_headers(framing) == []


def test_chosen_headers_only(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        for where, wanted, cookies in (("/some", {"x-wanted": "yes"}, ["a=1"]), ("/none", {}, [])):
            response = requests.get(
                site.apache.url + where + "/handoff.php",
                params={"path": site.sock, "h[]": ["Set-Cookie: a=1", "X-Other: 1"]},
                headers={"X-Wanted": "yes", "traceparent": "t"},
                timeout=TIMEOUT,
            )
            assert answered(response)
            envelope = daemon.get().envelope
            assert envelope is not None
            assert envelope["request"]["headers"] == wanted
            assert [value for _, value in envelope["response_headers"]] == cookies


def test_bytes_that_are_no_text_stay_valid_json(site: Site) -> None:
    # The escape sequences are what the client sends; PHP sees the bytes.
    query = urlencode({"path": site.sock, "data": "d"}) + "&h[]=X-Odd:+%ff%c3%a9%22%5c%7f%ed%a0%80"
    with Receiver(site.sock) as daemon:
        assert answered(requests.get(f"{site.apache.url}/env/handoff.php?{query}", timeout=TIMEOUT))
        handoff = daemon.get()
    assert handoff.response_headers("X-Odd") == ['\ufffdé"\\\x7f\ufffd\ufffd\ufffd']


def test_an_envelope_may_carry_any_data(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        data = b"\x01\x00\xff\n{}\n\x00"
        response = requests.get(
            f"{site.apache.url}/env/handoff.php",
            params={"path": site.sock, "source": "body", "data": data},
            timeout=TIMEOUT,
        )
        assert answered(response)
        assert daemon.get().data == data


@pytest.mark.parametrize("size", [65536, 65537, 200_000, 1_048_576])
@pytest.mark.parametrize("where", ["/raw", "/env"])
def test_big_data_by_body(site: Site, where: str, size: int) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, where + "/handoff.php", path=site.sock, size=size, source="body"))
        big_data_arrived(daemon.get(), where, size)


@pytest.mark.parametrize("size", [65536, 65537, 200_000, 1_048_576])
@pytest.mark.parametrize("where", ["/raw", "/env"])
@pytest.mark.parametrize("site", ["prefork"], indirect=True)
def test_big_data_by_header_under_mod_php(site: Site, where: str, size: int) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, where + "/handoff.php", path=site.sock, size=size))
        big_data_arrived(daemon.get(), where, size)


def big_data_arrived(handoff: Handoff, where: str, size: int) -> None:
    assert handoff.data == generated(size)
    if size > 65536:
        assert handoff.flags == 1
        assert handoff.seals == ALL_SEALS
    else:
        assert handoff.seals is None
    if where == "/raw":
        assert handoff.payload == (generated(size) if size <= 65536 else b"\x01\x01{}\n")
    else:
        assert handoff.envelope is not None
        assert handoff.envelope["request"]["method"] == "GET"


@pytest.mark.parametrize("where", ["/raw", "/env"])
@pytest.mark.parametrize("size", [10, 65536, 300_000])
def test_a_stream_listener(site: Site, where: str, size: int) -> None:
    with Receiver(site.sock, socket.SOCK_STREAM) as daemon:
        assert answered(ask(site, where + "/handoff.php", path=site.sock, size=size, source="body"))
        assert daemon.get().data == generated(size)


# Where the header may come from.


def test_handoff_by_mod_headers(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/static.html"))
        assert daemon.get().payload == b"static data"
        assert answered(ask(site, "/always.html"))
        assert daemon.get().payload == b"always data"
        assert answered(ask(site, "/json.html"))
        assert daemon.get().payload == b'{"prompt":"static body"}'


def test_handoff_behind_a_front_controller(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/front/chat", path=site.sock, data="d"))
        envelope = daemon.get().envelope
    assert envelope is not None
    assert envelope["request"]["uri"].startswith("/front/chat?")


def test_post(site: Site) -> None:
    """A body that the script does not read must not be left for the daemon to trip over."""
    body = b"x" * 200_000
    with Receiver(site.sock, answer=False) as daemon:
        for where, query in (("/env", {}), ("/env", {"early": 1}), ("/unread", {"early": 1})):
            with socket.create_connection(("127.0.0.1", site.apache.port), TIMEOUT) as sock:
                target = f"{where}/handoff.php?" + urlencode({"path": site.sock, **query})
                sock.sendall(
                    f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                    "Content-Type: application/octet-stream\r\n\r\n".encode()
                    + body
                )
                handoff = daemon.get()
                with handoff.client:
                    with pytest.raises(BlockingIOError):
                        handoff.client.recv(1, socket.MSG_DONTWAIT)
                    handoff.client.sendall(ANSWER)
                    handoff.client.shutdown(socket.SHUT_RDWR)
                if where == "/env":
                    assert handoff.envelope is not None
                    assert handoff.envelope["request"]["method"] == "POST"
                assert b"".join(iter(lambda sock=sock: sock.recv(65536), b"")) == ANSWER


def test_a_client_that_waits_to_be_told_to_continue(site: Site) -> None:
    target = "/unread/handoff.php?" + urlencode({"path": site.sock, "early": 1})
    with (
        Receiver(site.sock) as daemon,
        socket.create_connection(("127.0.0.1", site.apache.port), TIMEOUT) as sock,
    ):
        sock.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n".encode())
        got = sock.recv(65536)
        sock.sendall(b"hello")
        got += b"".join(iter(lambda: sock.recv(65536), b""))
        daemon.get()
    assert got == b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER


@pytest.mark.parametrize("site", ["prefork"], indirect=True)
def test_too_much_unread_body_is_refused(site: Site) -> None:
    # mod_php only: mod_proxy_fcgi has sent the whole body to the script before it reads the answer.
    with Receiver(site.sock) as daemon:
        response = requests.post(
            site.apache.url + "/unread/handoff.php",
            params={"path": site.sock, "early": 1},
            data=b"x" * 2_000_000,
            headers={"Content-Type": "application/octet-stream"},
            timeout=TIMEOUT,
        )
        assert refused(response) == (413, "unread_body")
        assert daemon.nothing_came()


# The client's connection.


def test_keep_alive_requests_before_the_handoff(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        with socket.create_connection(("127.0.0.1", site.apache.port), TIMEOUT) as sock:
            for _ in range(2):
                sock.sendall(get_line("/plain.html"))
                head, _, body = read_response(sock)
                assert head.startswith(b"HTTP/1.1 200")
                assert body == b"plain page\n"
            sock.sendall(get_line("/raw/handoff.php", path=site.sock))
            assert b"".join(iter(lambda: sock.recv(65536), b"")) == ANSWER
        daemon.get()


def read_response(sock: socket.socket) -> tuple[bytes, bytes, bytes]:
    got = b""
    while b"\r\n\r\n" not in got:
        got += sock.recv(65536)
    head, separator, body = got.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += sock.recv(65536)
    return head, separator, body


def test_pipelined_requests_before_the_handoff(site: Site) -> None:
    """Apache may still hold earlier answers when the fd goes; they come first, whole."""
    with Receiver(site.sock) as daemon:
        request = get_line("/plain.html") * 2 + get_line("/raw/handoff.php", path=site.sock)
        got = raw_exchange(site.apache.port, request)
        daemon.get()
    assert got.count(b"HTTP/1.1 200 OK") == 3
    assert got.count(b"plain page\n") == 2
    assert got.endswith(b"plain page\n" + ANSWER)


@pytest.mark.parametrize("mpm", ["prefork", "worker", "event"])
def test_a_slow_client_gets_the_earlier_answer_first(small_site: tuple[Path, Path], mpm: str) -> None:
    """Megabytes of an earlier answer are still in Apache when the handoff comes up: the client has read nothing yet."""
    docroot, prefix = small_site
    big = generated(5_000_000)
    (docroot / "big.txt").write_bytes(big)
    conf = "FlushMaxThreshold 67108864\nSendBufferSize 65536"
    with (
        Apache(mpm, docroot, prefix, conf) as apache,
        Receiver(prefix / "s") as daemon,
        socket.socket() as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", apache.port))
        sock.sendall(get_line("/big.txt") + get_line("/handoff.php", path=prefix / "s"))
        got = b"".join(iter(lambda: sock.recv(65536), b""))
        daemon.get()
    assert got.split(b"\r\n\r\n", 1)[1] == big + ANSWER


def test_apache_lets_go_while_the_script_still_runs(site: Site) -> None:
    """The swap: no process of Apache's holds the client's socket, although the request is not over."""
    go_on = site.prefix / "go-on"
    go_on.unlink(missing_ok=True)
    (site.docroot / "waits.php").write_text(
        f"<?php header('X-Socket-Handoff: {site.sock}'); ignore_user_abort(true); echo 'x';"
        "while (ob_get_level()) ob_end_flush(); flush();"
        f"while (!file_exists('{go_on}')) {{ usleep(10000); clearstatcache(); }}"
    )

    def logged() -> int:  # this script's only: another test's request may be logged late
        return sum("/raw/waits.php" in line for line in site.apache.access_log())

    with (
        Receiver(site.sock, answer=False) as daemon,
        socket.create_connection(("127.0.0.1", site.apache.port), TIMEOUT) as sock,
    ):
        before = logged()
        sock.sendall(get_line("/raw/waits.php"))
        with daemon.get().client as client:
            inode = f"socket:[{os.fstat(client.fileno()).st_ino}]"
            wait_until(lambda: inode not in open_files(site.apache), "Apache lets go")
            assert logged() == before
            go_on.touch()
            client.sendall(ANSWER)
        assert b"".join(iter(lambda: sock.recv(65536), b"")) == ANSWER
    wait_until(lambda: logged() > before, "the request is logged")


def test_apache_is_silent_after_the_handoff(site: Site) -> None:
    with Receiver(site.sock, answer=False) as daemon:
        before = len(site.apache.access_log())
        with socket.create_connection(("127.0.0.1", site.apache.port), TIMEOUT) as sock:
            sock.sendall(get_line("/raw/handoff.php", path=site.sock, late=1) + get_line("/plain.html"))
            handoff = daemon.get()
            line = "/raw/handoff.php 200 - handed-off"
            wait_until(lambda: line in site.apache.access_log()[before:], "the request is logged")
            with handoff.client:
                handoff.client.sendall(ANSWER)
                handoff.client.shutdown(socket.SHUT_RDWR)
            got = b""
            with contextlib.suppress(ConnectionResetError):  # the second request was never read by anybody
                got = b"".join(iter(lambda: sock.recv(65536), b""))
    assert got in (ANSWER, b"")


def test_the_only_worker_is_free_while_the_stream_is_open(small_site: tuple[Path, Path]) -> None:
    docroot, prefix = small_site
    with (
        Apache("prefork", docroot, prefix, workers=1) as apache,
        Receiver(prefix / "s", answer=False) as daemon,
        socket.create_connection(("127.0.0.1", apache.port), TIMEOUT) as sock,
    ):
        sock.sendall(get_line("/handoff.php", path=prefix / "s"))
        with daemon.get().client as client:
            client.sendall(ANSWER)
            assert requests.get(apache.url + "/plain.html", timeout=TIMEOUT).text == "plain page\n"
            client.sendall(b" and more")
            client.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: sock.recv(65536), b"")) == ANSWER + b" and more"
        assert len(apache.children()) == 1


def test_no_fd_is_left_in_apache(site: Site) -> None:
    def round_trip(i: int) -> None:
        size = 100_000 if i % 4 == 0 else 10
        path = site.sock if i % 10 else site.prefix / "nobody"
        requests.get(
            site.apache.url + "/fast/handoff.php",
            params={"path": path, "size": size, "source": "body"},
            headers={"Connection": "close"},
            timeout=TIMEOUT,
        )

    with Receiver(site.sock) as daemon, ThreadPoolExecutor(4) as pool:
        list(pool.map(round_trip, range(40)))
        children, before = site.apache.children(), fd_count(site.apache)
        list(pool.map(round_trip, range(200)))
        for _ in range(36 + 180):
            assert daemon.get().data
        assert site.apache.children() == children
        wait_until(lambda: fd_count(site.apache) <= before, "as many fds as before")


# What is refused.


@pytest.mark.parametrize(
    "kind",
    [
        "outside",
        "sibling",
        "symlink",
        "dotdot",
        "dotdot missing",
        "relative",
        "file",
        "directory",
        "missing outside",
        "long",
    ],
)
def test_a_path_that_is_not_allowed(site: Site, kind: str) -> None:
    with public_dir() as outside, public_dir() as target:
        (site.prefix / "file").write_text("no socket")
        (site.prefix / "directory").mkdir(exist_ok=True)
        sibling = Path(f"{site.prefix}x")
        sibling.mkdir()
        with contextlib.suppress(FileNotFoundError):
            (site.prefix / "link").unlink()
        (site.prefix / "link").symlink_to(target / "s")
        path = {
            "outside": outside / "s",
            "sibling": sibling / "s",
            "symlink": site.prefix / "link",
            "dotdot": f"{site.prefix}/../{outside.name}/s",
            "dotdot missing": f"{site.prefix}/nowhere/../../{outside.name}/s",
            "relative": "s",
            "file": site.prefix / "file",
            "directory": site.prefix / "directory",
            "missing outside": outside / "nobody",
            "long": f"{site.prefix}/{'x' * 200}/../s",
        }[kind]
        try:
            with Receiver(outside / "s") as a, Receiver(sibling / "s") as b, Receiver(target / "s") as c:
                assert refused(ask(site, "/fast/handoff.php", path=path, data="d")) == (403, "path_not_allowed")
                assert a.nothing_came()
                assert b.nothing_came()
                assert c.nothing_came()
        finally:
            sibling.rmdir()


def test_links_and_dotdot_that_stay_inside_are_allowed(site: Site) -> None:
    with contextlib.suppress(FileNotFoundError):
        (site.prefix / "inside").unlink()
    (site.prefix / "inside").symlink_to(site.sock)
    with Receiver(site.sock) as daemon:
        for path in (site.prefix / "inside", f"{site.prefix}/../{site.prefix.name}/s"):
            assert answered(ask(site, "/raw/handoff.php", path=path, data="d"))
            assert daemon.get().payload == b"d"


@pytest.mark.parametrize("source", ["header", "body"])
def test_raw_data_cannot_forge_an_envelope(site: Site, source: str) -> None:
    with Receiver(site.sock) as daemon:
        forged = '\x01\x02{"request":{"remote_addr":"10.0.0.1"}}'  # PHP takes no NUL and no LF in a header
        response = ask(site, "/raw/handoff.php", path=site.sock, data=forged, source=source)
        assert refused(response) == (403, "bad_data")
        assert daemon.nothing_came()


@pytest.mark.parametrize("source", ["header", "body"])
def test_too_much_data(site: Site, source: str) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/small/handoff.php", path=site.sock, size=1000, source=source))
        assert daemon.get().data == generated(1000)
        response = ask(site, "/small/handoff.php", path=site.sock, size=1001, source=source)
        assert refused(response) == (413, "payload_too_large")
        response = ask(site, "/raw/handoff.php", path=site.sock, size=1_048_577, source="body")
        assert refused(response) == (413, "payload_too_large")
        assert daemon.nothing_came()


def test_a_connection_lives_on_after_a_refusal(site: Site) -> None:
    with requests.Session() as session:
        for _ in range(2):
            response = session.get(
                site.apache.url + "/raw/handoff.php", params={"path": "/etc/passwd"}, timeout=TIMEOUT
            )
            assert refused(check(response)) == (403, "path_not_allowed")
            assert session.get(site.apache.url + "/plain.html", timeout=TIMEOUT).text == "plain page\n"


def test_a_refusal_replaces_the_response_and_keeps_cookies(site: Site) -> None:
    more = ["Set-Cookie: a=1", "Content-Encoding: gzip", "ETag: x"]
    response = ask(site, "/cors/handoff.php", path="/nowhere/s", print="the page", **{"h[]": more})
    assert refused(response) == (403, "path_not_allowed")
    assert response.cookies["a"] == "1"
    assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "ETag" not in response.headers


def test_an_unknown_source_and_compressed_data(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        response = ask(site, "/raw/handoff.php", path=site.sock, source="query", data="d")
        assert refused(response) == (500, "bad_data_source")
        more = ["Content-Encoding: gzip"]
        response = ask(site, "/raw/handoff.php", path=site.sock, source="body", data="d", **{"h[]": more})
        assert refused(response) == (500, "bad_data_source")
        assert daemon.nothing_came()


def test_too_many_response_headers(site: Site) -> None:
    more = [f"Set-Cookie: c{i}={'x' * 400}" for i in range(12)]
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/env/handoff.php", path=site.sock, **{"h[]": more}))
        assert len(daemon.get().response_headers("Set-Cookie")) == 12
        (site.docroot / "many.php").write_text(
            f"<?php header('X-Socket-Handoff: {site.sock}');"
            "for ($i = 0; $i < 40; $i++) header(\"Set-Cookie: c$i=\" . str_repeat('x', 4000), false);"
        )
        assert refused(ask(site, "/env/many.php")) == (500, "headers_too_large")
        assert daemon.nothing_came()


@pytest.fixture
def certificate(small_site: tuple[Path, Path]) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    cert, key = small_site[1] / "cert.pem", small_site[1] / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.parametrize("mpm", ["prefork", "event"])
def test_tls_is_refused(small_site: tuple[Path, Path], certificate: tuple[Path, Path], mpm: str) -> None:
    docroot, prefix = small_site
    port = free_port()
    conf = (
        f"SSLSessionCache none\nListen 127.0.0.1:{port}\n<VirtualHost 127.0.0.1:{port}>\nDocumentRoot {docroot}\n"
        f"SSLEngine on\nSSLCertificateFile {certificate[0]}\nSSLCertificateKeyFile {certificate[1]}\n</VirtualHost>"
    )
    with Apache(mpm, docroot, prefix, conf) as apache, Receiver(prefix / "s") as daemon:
        query = {"path": prefix / "s", "data": "d"}
        response = requests.get(
            f"https://localhost:{port}/handoff.php", params=query, timeout=TIMEOUT, verify=certificate[0]
        )
        assert refused(check(response)) == (500, "tls_unsupported")
        assert daemon.nothing_came()
        assert answered(requests.get(apache.url + "/handoff.php", params=query, timeout=TIMEOUT))


@pytest.mark.parametrize("how", ["--http2-prior-knowledge", "--http2"])
def test_http2_is_refused(small_site: tuple[Path, Path], how: str) -> None:
    docroot, prefix = small_site
    with (
        Apache("event", docroot, prefix, "Protocols h2c http/1.1", modules=("http2",)) as apache,
        Receiver(prefix / "s") as daemon,
    ):
        url = f"{apache.url}/handoff.php?" + urlencode({"path": prefix / "s", "data": "d"})
        out = subprocess.run(["curl", "-s", "-i", how, url], capture_output=True, check=True, timeout=TIMEOUT).stdout
        # With --http2 an answer "101 Switching Protocols" comes first.
        head, body = out[out.index(b"HTTP/2") :].split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/2 500")
        assert b"handoff" not in head.lower()
        assert json.loads(body)["code"] == "http2_unsupported"
        assert daemon.nothing_came()


@pytest.mark.parametrize("site", ["worker", "event"], indirect=True)
def test_a_script_that_breaks_off_hands_nothing_over(site: Site) -> None:
    (site.docroot / "dies.php").write_text(
        f"<?php header('X-Socket-Handoff: {site.sock}'); header('X-Handoff-Data-Source: body');"
        "echo str_repeat('x', 100000); while (ob_get_level()) ob_end_flush(); flush(); posix_kill(getmypid(), 9);"
    )
    with Receiver(site.sock) as daemon:
        response = ask(site, "/raw/dies.php")
        assert response.status_code in (500, 503)  # 503 if its headers were lost as well
        assert "<title>" in response.text  # Apache's own error page, which is no data
        assert daemon.nothing_came()


def test_an_application_behind_mod_proxy_http(small_site: tuple[Path, Path]) -> None:
    """Not only PHP: any backend may ask for the handoff. One that breaks off has handed nothing over."""
    docroot, prefix = small_site
    with socket.create_server(("127.0.0.1", 0)) as backend:
        conf = f"ProxyPass /app http://127.0.0.1:{backend.getsockname()[1]} disablereuse=on\nProxyTimeout {TIMEOUT}"
        head = (
            f"HTTP/1.1 200 OK\r\nX-Socket-Handoff: {prefix}/s\r\nX-Handoff-Data-Source: body\r\n"
            "Content-Length: 10\r\n\r\n"
        )

        def serve(body: bytes) -> None:
            app, _ = backend.accept()
            with app:
                app.recv(65536)
                app.sendall(head.encode() + body)

        with (
            Apache("event", docroot, prefix, conf, modules=("proxy_http",)) as apache,
            Receiver(prefix / "s") as daemon,
            ThreadPoolExecutor(1) as pool,
        ):
            pool.submit(serve, b"0123456789")
            assert answered(requests.get(apache.url + "/app/", timeout=TIMEOUT))
            assert daemon.get().payload == b"0123456789"
            pool.submit(serve, b"01234")
            assert refused(check(requests.get(apache.url + "/app/", timeout=TIMEOUT))) == (500, "incomplete_data")
            assert daemon.nothing_came()


# What is left alone, and what never shows.


def test_switched_off(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        response = ask(site, "/off/handoff.php", path=site.sock, data="d", print="the page")
        assert (response.status_code, response.text) == (200, "the page")
        # Data is data: it is not shown to the client because nobody wanted it.
        response = ask(site, "/off/handoff.php", path=site.sock, data="secret", source="body")
        assert (response.status_code, response.text) == (200, "")
        assert daemon.nothing_came()


def test_our_headers_never_show(site: Site) -> None:
    for where in ("/plain.html", "/off/handoff.php", "/missing", "/denied/plain.html"):
        ask(site, where, path=site.sock)
    response = ask(site, "/raw/handoff.php", source="header", data="d", print="no path, no handoff")
    assert response.text == "no path, no handoff"


@pytest.mark.parametrize("status", [201, 204])
def test_every_success_hands_off(site: Site, status: int) -> None:
    with Receiver(site.sock) as daemon:
        assert answered(ask(site, "/raw/handoff.php", path=site.sock, status=status))
        daemon.get()


@pytest.mark.parametrize("status", [301, 401, 404, 500])
def test_other_statuses_do_not(site: Site, status: int) -> None:
    with Receiver(site.sock) as daemon:
        response = ask(site, "/raw/handoff.php", path=site.sock, status=status, print="sorry")
        assert (response.status_code, response.text) == (status, "sorry")
        assert daemon.nothing_came()


def test_header_always_does_not_hand_off_who_was_turned_away(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        assert ask(site, "/denied/plain.html").status_code == 403
        assert ask(site, "/missing").status_code == 404
        assert daemon.nothing_came()


def test_head_is_not_handed_off(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        response = requests.head(
            site.apache.url + "/raw/handoff.php", params={"path": site.sock, "data": "d"}, timeout=TIMEOUT
        )
        assert check(response).status_code == 200
        assert daemon.nothing_came()


def test_a_subrequest_is_not_handed_off(site: Site) -> None:
    query = urlencode({"path": site.sock, "data": "secret", "source": "body"})
    (site.docroot / "page.shtml").write_text(
        f'before <!--#include virtual="/raw/handoff.php?{query}" -->'
        f'<!--#include virtual="/raw/handoff.php?{urlencode({"path": site.sock, "print": "included"})}" --> after'
    )
    with Receiver(site.sock) as daemon:
        assert ask(site, "/page.shtml").text == "before included after"
        assert daemon.nothing_came()


def test_a_handoff_does_not_survive_an_internal_redirect(site: Site) -> None:
    with Receiver(site.sock) as daemon:
        assert ask(site, f"/redirect.cgi?{site.sock}").text == "plain page\n"
        assert daemon.nothing_came()


def own_lines(site: Site) -> list[str]:
    return [line for line in site.apache.access_log() if "logged.php" in line]


def test_what_the_access_log_says(site: Site) -> None:
    shutil.copy(site.docroot / "handoff.php", site.docroot / "logged.php")
    with Receiver(site.sock):
        ask(site, "/raw/logged.php", path=site.sock)
        ask(site, "/raw/logged.php", path="/etc/passwd")
        ask(site, "/off/logged.php", path=site.sock)
        ask(site, "/raw/logged.php", path=site.sock, status=401)
        ask(site, "/raw/logged.php")
        # By their path: lines of earlier requests may still be on their way.
        wait_until(lambda: len(own_lines(site)) == 5, "five lines")
    said = [(line.split()[1], line.split()[3]) for line in own_lines(site)]
    assert sorted(said) == sorted(
        [("200", "handed-off"), ("403", "path_not_allowed"), ("200", "disabled"), ("401", "status"), ("200", "-")]
    )


# A daemon that is busy, absent, or coming back.


def test_nobody_there(site: Site) -> None:
    for path in (site.prefix / "nobody", site.prefix / "no-directory" / "s"):
        response = ask(site, "/raw/handoff.php", path=path, data="d")
        assert refused(response) == (503, "daemon_unavailable")
        assert response.headers["Retry-After"] == "1"


def test_a_dead_socket(site: Site) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(site.prefix / "dead"))
        (site.prefix / "dead").chmod(0o666)
        try:
            assert refused(ask(site, "/raw/handoff.php", path=site.prefix / "dead")) == (503, "daemon_unavailable")
        finally:
            (site.prefix / "dead").unlink()


def test_a_socket_that_apache_may_not_use(site: Site) -> None:
    with Receiver(site.prefix / "closed"):
        (site.prefix / "closed").chmod(0)
        assert refused(ask(site, "/raw/handoff.php", path=site.prefix / "closed")) == (503, "daemon_unavailable")


@pytest.mark.parametrize("leftover", [False, True])
def test_a_daemon_that_comes_back(site: Site, leftover: bool) -> None:
    """No socket file (ENOENT), or one with nobody behind it (ECONNREFUSED), and then a daemon."""
    if leftover:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(site.sock))
            site.sock.chmod(0o666)
    with in_background(site, "/patient/handoff.php", path=site.sock, size=100_000, source="body") as response:
        wait_until(lambda: delivering(site.apache), "a delivery under way")
        with Receiver(site.sock) as daemon:
            assert answered(response.result(TIMEOUT))
            assert daemon.get().data == generated(100_000)


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_a_full_backlog(site: Site, kind: int) -> None:
    daemon = Receiver(site.sock, kind, backlog=0)
    daemon.listen()
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.close)
        fill_backlog(stack, site.sock, kind)
        assert refused(ask(site, "/fast/handoff.php", path=site.sock)) == (503, "daemon_busy")
        with in_background(site, "/raw/handoff.php", path=site.sock, size=100_000, source="body") as response:
            wait_until(lambda: delivering(site.apache), "a delivery under way")
            daemon.start()
            assert answered(response.result(TIMEOUT))
            assert daemon.get().data == generated(100_000)


def fill_backlog(stack: contextlib.ExitStack, path: Path, kind: int) -> None:
    """Connect until the kernel says EAGAIN; those who wait hang up at once, but keep their places."""
    while True:
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        waiting.setblocking(False)
        try:
            waiting.connect(str(path))
            waiting.close()
        except BlockingIOError:
            return


def test_a_daemon_that_takes_nothing(small_site: tuple[Path, Path]) -> None:
    """More fds in flight than the sender's limit allows (ETOOMANYREFS): busy, and those in flight are not lost."""
    docroot, prefix = small_site
    conf = "SocketHandoffSendTimeoutMs 20"
    daemon = Receiver(prefix / "s", backlog=200)
    with Apache("prefork", docroot, prefix, conf, workers=1, nofile=40) as apache, contextlib.ExitStack() as stack:
        daemon.listen()
        stack.callback(daemon.close)
        clients = []
        while len(clients) < 200:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", apache.port), TIMEOUT))
            logged = len(apache.access_log())
            client.sendall(get_line("/handoff.php", path=prefix / "s", data="d"))
            wait_until(lambda logged=logged: len(apache.access_log()) > logged, "the request is logged")
            if apache.access_log()[-1].split()[1] == "503":
                break
            clients.append(client)
        assert apache.access_log()[-1].split()[3] == "daemon_busy"
        assert 0 < len(clients) <= 42
        daemon.start()
        for client in clients:
            assert b"".join(iter(lambda client=client: client.recv(65536), b"")) == ANSWER


def test_health(site: Site) -> None:
    response = ask(site, "/health")
    assert (response.status_code, response.json()["code"]) == (503, "daemon_unavailable")
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with Receiver(site.sock, kind) as daemon:
            response = ask(site, "/health")
            assert (response.status_code, response.json()) == (200, {"status": "ok"})
            assert daemon.nothing_came()
    response = ask(site, "/health-outside")
    assert (response.status_code, response.json()["code"]) == (503, "path_not_allowed")
    assert requests.post(site.apache.url + "/health", timeout=TIMEOUT).status_code == 405


def test_many_at_once(site: Site) -> None:
    with Receiver(site.sock, backlog=512) as daemon, ThreadPoolExecutor(8) as pool:
        sizes = [10, 70_000] * 50
        answers = pool.map(lambda n: ask(site, "/env/handoff.php", path=site.sock, size=n, source="body"), sizes)
        assert all(answered(response) for response in answers)
        assert sorted(len(daemon.get().data) for _ in sizes) == sorted(sizes)


# Configuration.


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("SocketHandoffConnectTimeoutMs 0", "SocketHandoffConnectTimeoutMs must be a whole number from 1 to 60000"),
        ("SocketHandoffConnectTimeoutMs 60001", 'not "60001"'),
        ("SocketHandoffSendTimeoutMs fast", 'whole number from 1 to 60000, not "fast"'),
        ("SocketHandoffSendTimeoutMs 5s", "whole number"),
        ("SocketHandoffMaxRetries -1", "from 0 to 10"),
        ("SocketHandoffMaxRetries 11", "from 0 to 10"),
        ("SocketHandoffMaxData 0", "from 1 to 1073741824"),
        ("SocketHandoffMaxData 99999999999999999999", "from 1 to 1073741824"),
        ("SocketHandoffFormat json", 'SocketHandoffFormat must be raw or envelope, not "json"'),
        ("SocketHandoffPersistent maybe", "SocketHandoffPersistent must be On or Off"),
        ("SocketHandoffFallback proxy", 'SocketHandoffFallback must be relay or error, not "proxy"'),
        ("SocketHandoffEnabled maybe", "SocketHandoffEnabled must be On or Off"),
        ("SocketHandoffAllowedPrefix run", "SocketHandoffAllowedPrefix must be an absolute path"),
        ("SocketHandoffHealthSocket forkd.sock", "SocketHandoffHealthSocket must be an absolute path"),
        ('SocketHandoffRequestHeaders "a b"', "is no header name"),
        ("SocketHandoffRequestHeaders all", "cannot be used here"),
        ("SocketHandoffResponseHeaders Set-Cookie all", "cannot be used here"),
        ("SocketHandoffResponseHeaders", "needs header names, all or none"),
    ],
)  # fmt: skip
def test_bad_directives(tmp_path: Path, line: str, says: str) -> None:
    apache = Apache("event", tmp_path, tmp_path, line)
    apache.prepare(tmp_path)
    result = apache.check_conf()
    assert result.returncode != 0
    assert says in result.stderr


def test_good_directives(tmp_path: Path) -> None:
    lines = """
        SocketHandoffEnabled Off
        SocketHandoffConnectTimeoutMs 60000
        <Location /a>
            SocketHandoffSendTimeoutMs 1
            SocketHandoffMaxRetries 0
            SocketHandoffFormat RAW
            SocketHandoffPersistent On
            SocketHandoffFallback Relay
            SocketHandoffResponseHeaders all
            SocketHandoffRequestHeaders X-One X-Two
            SocketHandoffMaxData 1073741824
            SocketHandoffHealthSocket /run/x
        </Location>"""
    apache = Apache("event", tmp_path, tmp_path, lines)
    apache.prepare(tmp_path)
    assert apache.check_conf().returncode == 0


def test_not_in_htaccess(site: Site) -> None:
    assert ask(site, "/bad/").status_code == 500
    assert "SocketHandoffEnabled not allowed here" in site.apache.error_log()


def test_request_id_from_the_client_if_it_is_a_token(small_site: tuple[Path, Path]) -> None:
    docroot, prefix = small_site
    conf = "SocketHandoffFormat envelope"
    with (
        Apache("prefork", docroot, prefix, conf, without=("unique_id",)) as apache,
        Receiver(prefix / "s") as daemon,
    ):
        for sent, arrives in (("req_1.2-3", "req_1.2-3"), ("a b", None), ('"', None), ("x" * 129, None), (None, None)):
            headers = {"X-Request-Id": sent} if sent else {}
            requests.get(apache.url + "/handoff.php", params={"path": prefix / "s"}, headers=headers, timeout=TIMEOUT)
            envelope = daemon.get().envelope
            assert envelope is not None
            assert envelope["request"].get("request_id") == arrives
