"""Bad input on the wire from Apache: what the client is told, under which code it is counted, and that no fd leaks.

`Forkd.counting` is the second and the third of these: it fails unless exactly the named codes were counted, and unless
every process has as many fds open afterwards as before.
"""

import fcntl
import itertools
import json
import os
import re
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.harness import (
    Answer,
    Forkd,
    connect,
    envelope,
    open_fds,
    read_answer,
    running,
    send,
    wait_for,
)

MAX_DATA_BYTES = 100_000
CONFIG: dict[str, Any] = {
    "server": {"max_data_bytes": MAX_DATA_BYTES, "handoff_timeout_secs": 1},
    "backends": {
        "mock": {"provider": "mock", "token_delay_ms": 0, "text": "canned text"},
        "echo": {"provider": "typing", "token_delay_ms": 0},
        "slow": {"provider": "mock", "token_delay_ms": 30},
    },
}
GOOD = b'{"prompt":"Hello"}'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkd]:
    directory = tmp_path_factory.mktemp("bad-input")
    listeners = [
        {"path": str(directory / "stream.sock"), "type": "stream"},
        {"path": str(directory / "plain.sock"), "envelope": False},
    ]
    with running(directory, config={**CONFIG, "listeners": listeners}) as daemon:
        yield daemon


@pytest.fixture
def forkd(shared: Forkd) -> Iterator[Forkd]:
    """The daemon that these tests share; none of them may kill a worker of it."""
    workers = shared.workers()
    before = len(shared.log())
    yield shared
    print(shared.log()[before:][-20000:])
    assert shared.workers() == workers


def hand_over(path: str, payload: bytes, *more: int, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> Answer:
    """Hand a client over in one message with `more` fds behind its own, which are ours to close."""
    client, server = socket.socketpair()
    with server, connect(path, kind) as sender:
        send(sender, payload, server.fileno(), *more)
    return read_answer(client)


def sibling(forkd: Forkd, name: str) -> str:
    """The path of another listener."""
    return str(forkd.directory / f"{name}.sock")


def memfd(data: bytes, seals: int = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK) -> int:
    """A memfd as the Apache module makes it, which the caller must close."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def check_refusal(answer: Answer, status: int, code: str) -> None:
    """A whole error answer that says `code`."""
    assert not answer.reset
    assert answer.status == status
    assert answer.header("content-type") == "application/json"
    assert answer.header("content-length") == str(len(answer.body))
    assert answer.json["code"] == code
    assert answer.json["request_id"] == answer.header("x-request-id") != ""


def padded(size: int, prompt: str = "typed back") -> bytes:
    """Data of so many bytes, which the echo backend answers with the prompt at its very end."""
    head, tail = b'{"backend":"echo","pad":"', b'","prompt":"' + prompt.encode() + b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


# The fds of a message.


def test_no_fd_is_counted_and_the_connection_goes_on(forkd: Forkd) -> None:
    client, server = socket.socketpair()
    with forkd.counting(no_fd=2), server, connect(forkd.path) as sender:
        send(sender, GOOD)
        send(sender, b"\0")
        send(sender, GOOD, server.fileno())
        server.close()
        assert read_answer(client).complete


def test_no_fd_on_a_stream_listener(forkd: Forkd) -> None:
    with forkd.counting(no_fd=1), connect(sibling(forkd, "stream"), socket.SOCK_STREAM) as sender:
        send(sender, GOOD)


def test_more_fds_than_belong_to_the_payload(forkd: Forkd) -> None:
    with forkd.counting(bad_handoff=6, stream_bad_handoff=6), open("/dev/null", "rb") as null:
        for extra in (1, 2, 9):
            many = [null.fileno()] * extra
            check_refusal(hand_over(forkd.path, GOOD, *many), 400, "bad_handoff")
            answer = hand_over(sibling(forkd, "stream"), GOOD, *many, kind=socket.SOCK_STREAM)
            check_refusal(answer, 400, "bad_handoff")


def test_fds_that_come_one_by_one_on_a_stream_listener_are_not_hoarded(forkd: Forkd) -> None:
    client, server = socket.socketpair()
    with (
        forkd.counting(bad_handoff=1, stream_bad_handoff=1),
        connect(sibling(forkd, "stream"), socket.SOCK_STREAM) as sender,
    ):
        before = open_fds(forkd.pid)
        with server, suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(2000):
                send(sender, b" ", server.fileno())
                assert open_fds(forkd.pid) < before + 10
        check_refusal(read_answer(client), 400, "bad_handoff")


def test_three_fds_or_one_where_two_are_right(forkd: Forkd) -> None:
    data = memfd(GOOD)
    with forkd.counting(bad_handoff=2, stream_bad_handoff=2), open("/dev/null", "rb") as null:
        check_refusal(hand_over(forkd.path, envelope({}, b"", flags=1), data, null.fileno()), 400, "bad_handoff")
        check_refusal(hand_over(forkd.path, envelope({}, b"", flags=1)), 400, "bad_handoff")
    os.close(data)


def test_even_such_an_error_carries_the_applications_headers(forkd: Forkd) -> None:
    payload = envelope(
        {"request_id": "abc"}, GOOD, response_headers=[["Access-Control-Allow-Origin", "https://a.example"]]
    )
    with forkd.counting(bad_handoff=1, stream_bad_handoff=1), open("/dev/null", "rb") as null:
        answer = hand_over(forkd.path, payload, null.fileno())
        check_refusal(answer, 400, "bad_handoff")
        assert answer.header("access-control-allow-origin") == "https://a.example"
        assert answer.json["request_id"] == "abc"


# The data in a second fd.


def _pipe() -> int:
    read_end, write_end = os.pipe()
    os.write(write_end, GOOD)
    os.close(write_end)
    return read_end


def _file() -> int:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.write(fd, GOOD)
    return fd


def _socket() -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()


def _directory() -> int:
    return os.open("/", os.O_RDONLY)


def _write_only() -> int:
    """Sealed as it should be, and not readable: it was opened for writing before the sealing."""
    fd = memfd(GOOD, 0)
    write_only = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    os.close(fd)
    return write_only


def _path_only() -> int:
    fd = memfd(GOOD)
    path_only = os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    os.close(fd)
    return path_only


def test_a_data_fd_that_is_no_sealed_memfd(forkd: Forkd) -> None:
    bad = [_pipe(), _file(), _socket(), _directory(), _write_only(), _path_only()]
    bad += [memfd(GOOD, 0), memfd(GOOD, fcntl.F_SEAL_WRITE), memfd(GOOD, fcntl.F_SEAL_SHRINK)]
    with forkd.counting(bad_data_fd=len(bad), stream_bad_data_fd=len(bad)):
        for data in bad:
            payload = envelope({}, b"", flags=1, response_headers=[["Access-Control-Allow-Origin", "*"]])
            answer = hand_over(forkd.path, payload, data)
            check_refusal(answer, 400, "bad_data_fd")
            assert answer.header("access-control-allow-origin") == "*"
            os.close(data)


def test_data_in_a_sealed_memfd_arrives_whole(forkd: Forkd) -> None:
    with forkd.counting():
        for size in (100, MAX_DATA_BYTES):
            data = memfd(padded(size))
            answer = hand_over(forkd.path, envelope({}, b"", flags=1), data)
            assert answer.complete
            assert answer.text == "typed back"
            os.close(data)


def test_a_memfd_over_the_limit(forkd: Forkd) -> None:
    large, hollow = memfd(padded(MAX_DATA_BYTES + 1)), os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.truncate(hollow, 1 << 40)
    fcntl.fcntl(hollow, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    with forkd.counting(payload_too_large=2, stream_payload_too_large=2):
        for data in (large, hollow):
            check_refusal(hand_over(forkd.path, envelope({}, b"", flags=1), data), 413, "payload_too_large")
            os.close(data)


# The client's fd.


def test_fds_that_are_no_client(forkd: Forkd, tmp_path: Path) -> None:
    """Nothing is written to any of them."""
    plain_file = tmp_path / "file"
    plain_file.write_bytes(b"untouched")
    read_end, write_end = os.pipe()
    dgram, other_dgram = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    packets, other_packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    udp, tcp_listener, unconnected = socket.socket(type=socket.SOCK_DGRAM), socket.socket(), socket.socket()
    unix_listener = socket.socket(socket.AF_UNIX)
    with ExitStack() as stack:
        for sock in (dgram, other_dgram, packets, other_packets, udp, tcp_listener, unconnected, unix_listener):
            stack.enter_context(sock)
        udp.bind(("127.0.0.1", 0))
        udp.connect(udp.getsockname())  # to itself: it would read whatever was written to it
        tcp_listener.bind(("127.0.0.1", 0))
        tcp_listener.listen()
        unix_listener.bind(str(tmp_path / "listener"))
        unix_listener.listen()
        regular = stack.enter_context(open(plain_file, "r+b"))
        epoll = stack.enter_context(select.epoll())
        memory = stack.enter_context(os.fdopen(memfd(b"")))
        no_clients: list[Any] = [
            regular, epoll, memory, read_end, write_end, dgram, packets, udp, tcp_listener, unconnected, unix_listener
        ]  # fmt: skip
        with forkd.counting(bad_client_fd=2 * len(no_clients)):
            for fd in no_clients:
                number = fd if isinstance(fd, int) else fd.fileno()
                with connect(forkd.path) as sender:
                    send(sender, GOOD, number)
                with connect(sibling(forkd, "stream"), socket.SOCK_STREAM) as sender:
                    send(sender, GOOD, number)
        os.close(write_end)
        assert os.read(read_end, 1) == b""
        os.close(read_end)
        for sock in (other_dgram, other_packets, udp):
            assert not select.select([sock], [], [], 0)[0]
        assert plain_file.read_bytes() == b"untouched"
        # A listening socket still listens.
        with socket.create_connection(tcp_listener.getsockname()):
            tcp_listener.accept()[0].close()


def test_no_client_and_a_bad_payload_too(forkd: Forkd) -> None:
    with forkd.counting(bad_handoff=1, bad_client_fd=1), open("/dev/null", "rb") as null, connect(forkd.path) as sender:
        send(sender, GOOD, null.fileno(), null.fileno())


# The data.

NO_GOOD = [
    b"\0",
    b"x",
    b"{",
    b"not JSON at all",
    b"[1,2]",
    b'"text"',
    b"null",
    b'{"prompt":"\xff\xfe"}',
    b"\xff",
    b"\x80\0\0\0",
    b'{"prompt":5}',
    b'{"prompt":["a"]}',
    b'{"prompt":"a","response_headers":"b"}',
    b'{"prompt":"a","user_id":{}}',
    b'{"prompt":"a","user_id":' + b"9" * 5000 + b"}",
    b'{"prompt":"a","temperature":1e999}',
    b'{"prompt":"a"}{"prompt":"b"}',
    b'{"prompt":"\\ud800"}',
    b"[" * 100_000,
    b'{"prompt":"a","x":' + b"[" * 99_000,
    b'{"prompt":"a","messages":' + b"[" * 49_000 + b"]" * 49_000 + b"}",
    b"{}",
    b'{"user_id":7}',
]


def test_data_that_is_no_good_is_answered_with_defaults(forkd: Forkd) -> None:
    """By a backend that costs nothing, as the reference does; the warning is counted and logged."""
    before = forkd.counts("forkd_handoff_warnings_total")
    with forkd.counting():
        for name in ("forkd", "plain", "stream"):
            kind = socket.SOCK_STREAM if name == "stream" else socket.SOCK_SEQPACKET
            for data in NO_GOOD:
                answer = hand_over(sibling(forkd, name), data, kind=kind)
                assert answer.complete
                assert answer.text == "canned text"
                assert f"stream {answer.header('x-request-id')}: " in forkd.log()
    good_json = 3 * 2
    forkd.wait_for_metric("forkd_handoff_warnings_total", before.get("no_prompt", 0) + good_json, code="no_prompt")
    no_json = 3 * (len(NO_GOOD) - 2)
    forkd.wait_for_metric("forkd_handoff_warnings_total", before.get("bad_handoff", 0) + no_json, code="bad_handoff")


def test_an_empty_message_is_an_end_and_nothing_else(forkd: Forkd) -> None:
    client, server = socket.socketpair()
    with forkd.counting(bad_handoff=1, stream_bad_handoff=1):
        with connect(forkd.path) as sender:
            sender.send(b"")
        with server, connect(forkd.path) as sender:
            send(sender, b"", server.fileno())
        check_refusal(read_answer(client), 400, "bad_handoff")


@pytest.mark.parametrize("flags", [0x02, 0x03, 0x80])
def test_flags_of_a_later_version_are_refused_without_a_word(forkd: Forkd, flags: int) -> None:
    """Plain text within TLS would be garbage to the client: the connection is closed, and that is all."""
    with forkd.counting(unsupported_flags=1):
        answer = forkd.ask(envelope({"method": "GET"}, b'{"prompt":"x"}', flags=flags))
    assert answer.raw == b""


def test_a_relayed_client_is_served_and_counted(forkd: Forkd) -> None:
    before = forkd.metric("forkd_handoffs_relayed_total")
    with forkd.counting():
        assert forkd.ask(envelope({"method": "GET"}, GOOD, flags=0x04)).text == "canned text"
        assert hand_over(sibling(forkd, "stream"), envelope({"method": "GET"}, GOOD), kind=socket.SOCK_STREAM).complete
    forkd.wait_for_metric("forkd_handoffs_relayed_total", before + 1)


def test_a_sender_that_says_nothing_and_goes(forkd: Forkd) -> None:
    with forkd.counting():
        connect(forkd.path).close()
        connect(sibling(forkd, "stream"), socket.SOCK_STREAM).close()


def test_data_up_to_the_limit_arrives_and_over_it_is_refused(forkd: Forkd) -> None:
    def by(route: str, data: bytes) -> Answer:
        payload = envelope({"uri": "/chat"}, data) if route == "envelope" else data
        name = route if route in ("plain", "stream") else "forkd"
        kind = socket.SOCK_STREAM if route == "stream" else socket.SOCK_SEQPACKET
        return hand_over(sibling(forkd, name), payload, kind=kind)

    routes = ("message", "envelope", "plain", "stream")
    with forkd.counting(payload_too_large=len(routes), stream_payload_too_large=len(routes)):
        for route in routes:
            assert by(route, padded(MAX_DATA_BYTES)).text == "typed back"
            check_refusal(by(route, padded(MAX_DATA_BYTES + 1)), 413, "payload_too_large")


def test_a_message_that_is_longer_than_the_room_for_any(forkd: Forkd) -> None:
    client, server = socket.socketpair()
    with forkd.counting(payload_too_large=1, stream_payload_too_large=1):
        with server, connect(forkd.path) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            send(sender, padded(300_000), server.fileno())
        check_refusal(read_answer(client), 413, "payload_too_large")


def test_a_stream_sender_that_never_ends(forkd: Forkd) -> None:
    client, server = socket.socketpair()
    with forkd.counting(payload_too_large=1, stream_payload_too_large=1):
        with server, connect(sibling(forkd, "stream"), socket.SOCK_STREAM) as sender:
            send(sender, b"{", server.fileno())
            with suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    sender.send(b" " * 65536)
        check_refusal(read_answer(client), 413, "payload_too_large")


def test_phps_habits_are_no_fault(forkd: Forkd) -> None:
    data = {
        "backend": "echo", "prompt": "typed back", "max_tokens": "100", "temperature": "0.7", "user_id": "42",
        "response_headers": [], "attachments": [], "messages": [], "request_id": 17,
    }  # fmt: skip
    warnings = forkd.metric("forkd_handoff_warnings_total")
    with forkd.counting():
        answer = hand_over(forkd.path, json.dumps(data).encode())
        assert answer.text == "typed back"
        assert answer.header("x-request-id") == "17"
    assert forkd.metric("forkd_handoff_warnings_total") == warnings
    assert forkd.access_lines()[-1]["user_id"] == "42"


def test_an_unknown_backend_in_the_data(forkd: Forkd) -> None:
    data = b'{"prompt":"a","backend":"nonesuch","response_headers":{"Access-Control-Allow-Origin":"*"}}'
    with forkd.counting(unknown_backend=1, stream_unknown_backend=1):
        answer = hand_over(forkd.path, data)
        check_refusal(answer, 400, "unknown_backend")
        assert answer.header("access-control-allow-origin") == "*"
    assert f"stream {answer.header('x-request-id')}: there is no backend named 'nonesuch'" in forkd.log()


# The envelope.


BROKEN = [
    b"\x01",
    b"\x01\0",
    b"\x01\0\n",
    b"\x01\0{}",
    b'\x01\0{"request":{}',
    b'\x01\0{"request":{"method":"GET\n' + GOOD,
    b"\x01\0[]\n" + GOOD,
    b'\x01\0{"request":[]}\n' + GOOD,
    b'\x01\0{"request":{"method":1}}\n' + GOOD,
    b'\x01\0{"request":{"headers":{"A":1}}}\n' + GOOD,
    b'\x01\0{"request":{"remote_addr":null}}\n' + GOOD,
    b'\x01\0{"response_headers":{"A":"b"}}\n' + GOOD,
    b'\x01\0{"response_headers":[["A"]]}\n' + GOOD,
    b'\x01\0{"response_headers":[["A",1]]}\n' + GOOD,
    b'\x01\0{"request":{"uri":"\xff"}}\n' + GOOD,
    b"\x01\0" + b"[" * 60_000 + b"\n",
    b"\x01\0" + b'{"x":' * 10_000 + b"\n",
]


def test_a_broken_envelope(forkd: Forkd) -> None:
    count = 2 * len(BROKEN) + 1
    with forkd.counting(bad_handoff=count, stream_bad_handoff=count):
        for payload in BROKEN:
            check_refusal(hand_over(forkd.path, payload), 400, "bad_handoff")
            answer = hand_over(sibling(forkd, "stream"), payload, kind=socket.SOCK_STREAM)
            check_refusal(answer, 400, "bad_handoff")
        data = memfd(GOOD)
        check_refusal(hand_over(forkd.path, b"\x01\x01[]\n", data), 400, "bad_handoff")
        os.close(data)


def test_an_envelope_is_mere_data_where_none_is_expected(forkd: Forkd) -> None:
    """So an application behind a sender that writes none cannot forge one."""
    with forkd.counting():
        answer = hand_over(
            sibling(forkd, "plain"), envelope({"request_id": "forged"}, GOOD, response_headers=[["X-Forged", "1"]])
        )
        assert answer.complete
        assert answer.header("x-request-id") != "forged"
        assert answer.header("x-forged") is None


def test_an_envelope_longer_than_any_beside_its_data(forkd: Forkd) -> None:
    data = memfd(GOOD)
    with forkd.counting(bad_handoff=1, stream_bad_handoff=1):
        payload = envelope({"uri": "/" * 70_000}, b"", flags=1)
        check_refusal(hand_over(forkd.path, payload, data), 400, "bad_handoff")
    os.close(data)


def test_head_requests_get_a_head(forkd: Forkd) -> None:
    with forkd.counting(unknown_backend=1, stream_unknown_backend=1):
        answer = hand_over(forkd.path, envelope({"method": "HEAD"}, GOOD))
        assert answer.status == 200
        assert answer.header("content-type") == "text/event-stream"
        assert answer.body == b""
        refused = hand_over(forkd.path, envelope({"method": "HEAD"}, b'{"backend":"nonesuch"}'))
        assert refused.status == 400
        assert refused.body == b""


INJECTIONS = [
    ["X-Value", "a\r\nX-Injected: yes"],
    ["X-Value", "a\nX-Injected: yes"],
    ["X-Value", "a\rX-Injected: yes"],
    ["X-Value", "a\r\n\r\n<script>"],
    ["X-Value", "a\0b"],
    ["X-Value", "a\x7fb"],
    ["X-Name\r\nX-Injected", "yes"],
    ["X-Name\nX-Injected", "yes"],
    ["X-Injected: yes\r\nX-Name", "v"],
    ["X-Injected: yes", "v"],
    ["X-Injected ", "v"],
    [" X-Injected", "v"],
    ["", "v"],
    ["X-Näme", "v"],
]
FRAMING = [["Content-Length", "5"], ["TRANSFER-ENCODING", "chunked"], ["Connection", "keep-alive"], ["Upgrade", "h2c"]]
HARMLESS = [["Set-Cookie", "a=1; Path=/"], ["Set-Cookie", "b=2"], ["X-Harmless", 'ü, "quoted"; x=y']]


def _by_envelope(pairs: list[list[str]]) -> bytes:
    return envelope({}, GOOD, response_headers=pairs)


def _by_list(pairs: list[list[str]]) -> bytes:
    return json.dumps({"prompt": "a", "response_headers": pairs}).encode()


def _by_map(pairs: list[list[str]]) -> bytes:
    names = {name: [value for other, value in pairs if other == name] for name, _ in pairs}
    return json.dumps({"prompt": "a", "response_headers": names}).encode()


@pytest.mark.parametrize("backend", ["mock", "nonesuch"])
def test_response_headers_cannot_inject(forkd: Forkd, backend: str) -> None:
    before = forkd.metric("forkd_response_headers_refused_total")
    carriers = (_by_envelope, _by_list, _by_map)
    failed = backend == "nonesuch"
    codes = {"unknown_backend": len(carriers), "stream_unknown_backend": len(carriers)} if failed else {}
    with forkd.counting(**codes):
        for carry in carriers:
            payload = carry(INJECTIONS + FRAMING + HARMLESS)
            answer = hand_over(forkd.path, payload.replace(b'"prompt":', f'"backend":"{backend}","prompt":'.encode()))
            assert b"njected" not in answer.raw
            assert b"<script>" not in answer.raw
            assert all(name.isascii() for name, _ in answer.headers)
            assert [value for name, value in answer.headers if name == "set-cookie"] == ["a=1; Path=/", "b=2"]
            assert answer.header("x-harmless") == 'ü, "quoted"; x=y'.encode().decode("latin-1")
            assert [value for name, value in answer.headers if name == "connection"] == ["close"]
            assert answer.header("upgrade") is answer.header("transfer-encoding") is None
            if failed:
                check_refusal(answer, 400, "unknown_backend")
            else:
                assert answer.header("content-length") is None
                assert answer.complete
    forkd.wait_for_metric("forkd_response_headers_refused_total", before + len(carriers) * len(INJECTIONS))


def test_response_headers_of_other_types(forkd: Forkd) -> None:
    headers = {"X-Int": 5, "X-Null": None, "X-Map": {"a": "b"}, "X-List": [["a"], "yes"], "X-Empty": []}
    with forkd.counting():
        answer = hand_over(forkd.path, json.dumps({"prompt": "a", "response_headers": headers}).encode())
        assert answer.header("x-int") == "5"
        assert answer.header("x-list") == "yes"
        assert not {"x-null", "x-map", "x-empty"} & {name for name, _ in answer.headers}
        for odd in (["text"], [["one"]], [["a", "b", "c"]], [[["a"], "b"]], [{"a": "b"}], [None]):
            answer = hand_over(forkd.path, json.dumps({"prompt": "a", "response_headers": odd}).encode())
            assert answer.complete


def test_response_headers_nested_to_every_depth(forkd: Forkd) -> None:
    """Just below the depth at which reading stops, Python's own str() of what was read gives up."""
    limit = sys.getrecursionlimit()
    with forkd.counting():
        for depth in range(limit - 30, limit + 5):
            for inner in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
                data = b'{"prompt":"a","response_headers":[[' + inner + b',"v"],' + inner + b"]}"
                assert hand_over(forkd.path, data).complete


def test_response_headers_without_end(forkd: Forkd) -> None:
    pairs = [[f"X-{number}", "v" * 1000] for number in range(90)]
    before = forkd.metric("forkd_response_headers_refused_total")
    answer = hand_over(forkd.path, _by_list(pairs))
    assert answer.complete
    assert 30_000 < len(answer.head) < 34_000
    wait_for(lambda: forkd.metric("forkd_response_headers_refused_total") > before, "the rest counted as refused")


# What the log and the head say of it.


@pytest.mark.parametrize(
    "wanted",
    ["", "a b", "a\r\nX-Injected: yes", "a\n", "ü", "x" * 129, '"', "a;b", "\0"],
    ids=lambda wanted: repr(wanted[:20]),
)
def test_a_request_id_that_is_not_harmless_is_replaced(forkd: Forkd, wanted: str) -> None:
    data = json.dumps({"prompt": "a", "request_id": wanted}).encode()
    for payload in (data, envelope({"request_id": wanted}, GOOD)):
        answer = hand_over(forkd.path, payload)
        assert answer.complete
        assert re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", answer.header("x-request-id") or "")
    answer = hand_over(forkd.path, envelope({"request_id": "apaches"}, data))
    assert answer.header("x-request-id") == "apaches"


@pytest.mark.parametrize(
    "evil",
    [
        "1\n2026-01-01T00:00:00.000Z ACCESS  worker 1: request_id=forged",
        "1 status=500 reason=forged",
        '1" status="500',
        "1\r\x1b[2Jforged",
        "1\u2028forged\x85forged",
        "x" * 10_000 + "forged",
    ],
    ids=lambda evil: repr(evil[:20]),
)
def test_nothing_that_comes_in_can_forge_a_log_line(forkd: Forkd, evil: str) -> None:
    def lines() -> list[str]:
        return (forkd.directory / "forkd.log").read_bytes().decode().split("\n")

    before = len(lines())
    payload = envelope({"remote_addr": evil}, json.dumps({"prompt": "a", "user_id": evil}).encode())
    assert hand_over(forkd.path, payload).complete
    (line,) = wait_for(lambda: [line for line in lines()[before - 1 :] if " ACCESS " in line], "the access line")
    assert line.isprintable()
    assert len(line) < 1500
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)
    assert "forged" not in plain
    assert 'user_id="" remote="" backend=mock' in plain
    assert "status=200" in plain


# The senders.


def test_thousands_of_silent_senders_do_not_keep_a_real_one_out(tmp_path: Path) -> None:
    count, pending = 5000, 200
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = {"max_pending_handoffs": pending, "handoff_timeout_secs": 2}
    with running(tmp_path, config={**CONFIG, "server": server}) as daemon, ExitStack() as stack:
        before = daemon.idle_fds()
        silent = [stack.enter_context(connect(daemon.path))]
        for number in range(1, count):
            silent.append(stack.enter_context(connect(daemon.path)))
            if number % 500 == 0:
                assert daemon.ask(GOOD).complete
                assert open_fds(daemon.pid) <= before[0] + pending + 64
        # The youngest of them was only slow.
        client, mine = socket.socketpair()
        send(silent[-1], GOOD, mine.fileno())
        mine.close()
        assert read_answer(client).complete
        silent[-1].close()

        def dropped() -> float:
            found = daemon.counts("forkd_handoff_errors_total")
            assert found.keys() <= {"sender_evicted", "sender_timeout"}
            return sum(found.values())

        wait_for(lambda: dropped() == count - 1, "every silent sender dropped")
        assert 0 < daemon.counts("forkd_handoff_errors_total")["sender_timeout"] <= pending
        # They are told: what they send now fails, and they can act.
        for sock in silent[:-1]:
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                sock.send(GOOD)
        daemon.wait_for_fds(before)
        assert daemon.ask(GOOD).complete


def test_a_sender_may_idle_after_its_first_handoff(forkd: Forkd) -> None:
    with forkd.counting(sender_timeout=1), connect(forkd.path) as sender, connect(forkd.path) as silent:
        for _ in range(2):
            client, server = socket.socketpair()
            send(sender, GOOD, server.fileno())
            server.close()
            assert read_answer(client).complete
            # Another that never spoke is dropped meanwhile.
            assert silent.recv(1) == b""


def test_a_stream_sender_that_stops_halfway(forkd: Forkd) -> None:
    """It still has the client, and hears that it failed."""
    client, server = socket.socketpair()
    with (
        forkd.counting(sender_timeout=1),
        server,
        connect(sibling(forkd, "stream"), socket.SOCK_STREAM) as sender,
    ):
        send(sender, GOOD, server.fileno())
        assert sender.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            sender.send(b"}")
        server.sendall(b"still mine")
        assert client.recv(100) == b"still mine"
    client.close()


def test_a_busy_sender_does_not_keep_others_out(tmp_path: Path) -> None:
    """One connection that sends as fast as it can: the master still hears others, and its own ticks."""
    with running(tmp_path, config=CONFIG) as daemon, connect(daemon.path) as sender:
        sender.setblocking(False)
        client, server = socket.socketpair()
        with client, server:
            pid = os.fork()
            if pid == 0:
                try:
                    sender.setblocking(True)
                    while True:
                        sender.send(GOOD)  # without a client: cheap to send, and not so cheap to refuse
                finally:
                    os._exit(0)
            try:
                for _ in range(5):
                    assert daemon.ask(GOOD).complete
                wait_for(lambda: daemon.metric("forkd_handoff_errors_total", code="no_fd") > 0, "its messages counted")
            finally:
                os.kill(pid, 9)
                os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("allow", "allowed"),
    [
        ({"allow_users": [12345]}, False),
        ({"allow_groups": [12345]}, False),
        ({"allow_users": [12345], "allow_groups": [12346]}, False),
        ({"allow_users": [12345, os.geteuid()]}, True),
        ({"allow_groups": [os.getegid()]}, True),
    ],
    ids=str,
)
def test_only_those_who_are_allowed_may_hand_over(tmp_path: Path, allow: dict[str, Any], allowed: bool) -> None:
    with running(tmp_path, config={**CONFIG, "server": allow}) as daemon:
        if allowed:
            with daemon.counting():
                assert daemon.ask(GOOD).complete
            return
        with daemon.counting(sender_forbidden=1):
            client, server = socket.socketpair()
            with server, connect(daemon.path) as sender, suppress(BrokenPipeError, ConnectionResetError):
                send(sender, GOOD, server.fileno())
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
            client.close()
        assert "not allowed" in daemon.log()


# Out of fds.


def few_fds(limit: int) -> tuple[str, ...]:
    """A command line that runs forkd with so few fds, and without root's right to raise the limit."""
    keep_down = ("setpriv", "--bounding-set", "-sys_resource") if os.geteuid() == 0 else ()
    return ("prlimit", f"--nofile={limit}:{limit}", *keep_down, sys.executable, "-m", "forkd")


@pytest.mark.parametrize("limit", [64, 128])
def test_a_master_short_of_fds_lets_them_wait_and_recovers(tmp_path: Path, limit: int) -> None:
    slow = {"mock": {"provider": "mock", "token_delay_ms": 10}}
    config = {"server": {"queue_timeout_secs": 60, "handoff_timeout_secs": 60}, "backends": slow}
    with running(tmp_path, config=config, command=few_fds(limit)) as daemon:
        before = daemon.idle_fds()
        clients = [daemon.hand_over(GOOD) for _ in range(2 * limit)]
        answers = [read_answer(client) for client in clients]
        assert {answer.status for answer in answers} <= {200, 503}
        assert all(answer.complete for answer in answers if answer.status == 200)
        refused = [answer for answer in answers if answer.status == 503]
        assert {answer.json["code"] for answer in refused} <= {"no_capacity"}
        daemon.wait_for_metric("forkd_handoff_errors_total", len(refused), code="no_capacity")
        assert daemon.counts("forkd_handoff_errors_total").keys() <= {"no_capacity", "out_of_fds"}
        assert refused or "not accepting handoffs for a moment" in daemon.log()
        daemon.wait_for_fds(before)
        assert daemon.ask(GOOD).complete


def test_a_master_short_of_fds_loses_no_client_of_a_persistent_sender(tmp_path: Path) -> None:
    """Idle connections have taken the room that the clients of a busy one need."""
    backends = {"mock": {"provider": "mock", "token_delay_ms": 10}, "quick": {"provider": "mock", "token_delay_ms": 0}}
    with running(tmp_path, config={"backends": backends}, command=few_fds(64)) as daemon, ExitStack() as stack:
        before = daemon.idle_fds()
        senders = []
        for _ in range(24):
            sender = stack.enter_context(connect(daemon.path))
            client, server = socket.socketpair()
            with server:
                send(sender, b'{"prompt":"a","backend":"quick"}', server.fileno())
            assert read_answer(client).complete
            senders.append(sender)
        clients = []
        for _ in range(60):
            client, server = socket.socketpair()
            with server:
                try:
                    send(senders[-1], GOOD, server.fileno())
                except (BrokenPipeError, ConnectionResetError):  # it was closed to make room: connect again
                    senders[-1] = stack.enter_context(connect(daemon.path))
                    send(senders[-1], GOOD, server.fileno())
            clients.append(client)
        answers = [read_answer(client) for client in clients]
        assert {answer.status for answer in answers} <= {200, 503}
        assert all(answer.complete for answer in answers if answer.status == 200)
        stack.close()
        daemon.wait_for_fds(before)
        assert daemon.ask(GOOD).complete


def test_silent_senders_cannot_use_up_the_fds(tmp_path: Path) -> None:
    config = {"server": {"handoff_timeout_secs": 1}, "backends": CONFIG["backends"]}
    with running(tmp_path, config=config, command=few_fds(64)) as daemon, ExitStack() as stack:
        before = daemon.idle_fds()
        for _ in range(100):
            stack.enter_context(connect(daemon.path))
        assert daemon.ask(GOOD).complete
        stack.close()
        daemon.wait_for_fds(before)


def limit_with_room_for(pid: int, more: int) -> int:
    """The RLIMIT_NOFILE under which a process can open so many more fds. (Its present ones may have gaps.)"""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in range(1 << 20) if number not in used)
    return next(itertools.islice(free, more, None))


def test_a_worker_out_of_fds_gives_its_clients_back(tmp_path: Path) -> None:
    slow = {"mock": {"provider": "mock", "token_delay_ms": 50}}
    with running(tmp_path, config={"backends": slow}) as daemon:
        poor, _ = daemon.workers()
        limit = limit_with_room_for(poor, 3)
        with daemon.counting():
            resource.prlimit(poor, resource.RLIMIT_NOFILE, (limit, limit))
            clients = [daemon.hand_over(GOOD) for _ in range(20)]
            assert all(read_answer(client).complete for client in clients)
        assert "is out of file descriptors" in daemon.log()
        assert {line["worker"] for line in daemon.access_lines()} == {"1", "2"}
        assert len(daemon.access_lines()) == 20


def test_all_workers_out_of_fds_make_clients_wait(tmp_path: Path) -> None:
    slow = {"mock": {"provider": "mock", "token_delay_ms": 20}}
    config = {"workers": {"count": 1}, "server": {"queue_timeout_secs": 60}, "backends": slow}
    with running(tmp_path, config=config) as daemon:
        (poor,) = daemon.workers()
        limit = limit_with_room_for(poor, 3)
        with daemon.counting():
            resource.prlimit(poor, resource.RLIMIT_NOFILE, (limit, limit))
            clients = [daemon.hand_over(GOOD) for _ in range(10)]
            assert all(read_answer(client).complete for client in clients)
        assert "is out of file descriptors" in daemon.log()


# Logs that cannot be written.


def serves(daemon: Forkd) -> None:
    """It answers, though its log says nothing."""
    for _ in range(3):
        assert daemon.ask(GOOD).complete


def test_a_log_pipe_that_nobody_reads(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    config = {**CONFIG, "logging": {"file": None}}
    with running(tmp_path, config=config, ready=False, popen={"stderr": write_end}) as daemon:
        os.close(write_end)
        wait_for(lambda: len(daemon.workers()) == 2, "both workers")
        clients = [daemon.hand_over(GOOD) for _ in range(60)]
        assert all(read_answer(client).complete for client in clients)
        wait_for(lambda: daemon.metric("forkd_log_lines_dropped_total") > 0, "dropped lines counted")
        # What was written is whole lines.
        os.set_blocking(read_end, False)
        assert os.read(read_end, 65536).endswith(b"\n")
        serves(daemon)
        assert daemon.stop() == 0
    os.close(read_end)


def test_a_log_pipe_whose_reader_is_gone(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    config = {**CONFIG, "logging": {"file": None}}
    with running(tmp_path, config=config, ready=False, popen={"stderr": write_end}) as daemon:
        os.close(write_end)
        wait_for(lambda: len(daemon.workers()) == 2, "both workers")
        os.close(read_end)
        serves(daemon)
        wait_for(lambda: daemon.metric("forkd_log_lines_dropped_total") >= 3, "dropped lines counted")
        assert daemon.stop() == 0


def test_a_full_log_disk(tmp_path: Path) -> None:
    config = {**CONFIG, "logging": {"file": "/dev/full"}}
    with running(tmp_path, config=config, ready=False) as daemon:
        wait_for(lambda: len(daemon.workers()) == 2, "both workers")
        serves(daemon)
        wait_for(lambda: daemon.metric("forkd_log_lines_dropped_total") >= 3, "dropped lines counted")
        wait_for(lambda: daemon.metric("forkd_log_lines_dropped_total") >= 4, "the master's own counted too")
        assert daemon.stop() == 0


def test_a_json_log_stays_json_whatever_comes_in(tmp_path: Path) -> None:
    config = {**CONFIG, "logging": {"format": "json"}}
    with running(tmp_path, config=config) as daemon:
        evil = '\n\x85\u2028"}{' + "\U0001f600" * 1000
        headers = {f"{evil[:100]}{number}": "v" for number in range(50)}
        data = json.dumps({"prompt": "a", "user_id": evil, "response_headers": headers}).encode()
        assert hand_over(daemon.path, envelope({"remote_addr": evil}, data)).complete
        wait_for(lambda: '"ACCESS"' in daemon.log(), "the access line")
        records = [json.loads(line) for line in daemon.log().splitlines()]
        (access,) = [record for record in records if record["level"] == "ACCESS"]
        assert access["user_id"].startswith("\n\x85")
        assert access["status"] == 200
        assert any("response headers refused" in record["message"] for record in records if "message" in record)


def test_no_room_for_the_metrics_files(tmp_path: Path) -> None:
    """A limit on the size of files fails posix_fallocate as a full disk does."""
    command = ("prlimit", "--fsize=200000", sys.executable, "-m", "forkd")
    with running(tmp_path, config=CONFIG, command=command) as daemon:
        assert daemon.ask(GOOD).complete
        assert daemon.log().count("going on without metrics: ") == 3  # the master and its workers
        where = re.search(r"metrics on (http://\S+)/metrics", daemon.log())
        assert where is not None
        assert requests.get(f"{where[1]}/readyz", timeout=10).status_code == 200
        scraped = requests.get(f"{where[1]}/metrics", timeout=10)
        assert scraped.status_code == 503
        assert "no file of counts" in scraped.text
        os.kill(daemon.workers()[0], signal.SIGKILL)
        wait_for(lambda: daemon.log().count(" ready (pid") == 3, "the next worker")
        assert daemon.ask(GOOD).complete
