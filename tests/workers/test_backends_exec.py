"""What a program is told of a handoff."""

import json
import os
import pwd

import pytest

from forkd import programs
from forkd.handoff import NO_DATA
from forkd.settings import ExecBackend as ExecSettings
from forkd.settings import MockBackend, Settings
from tests.harness import envelope
from workers.backends.exec import STRING_MAX_BYTES, ExecBackend
from workers.request import parse

ENVIRON = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/home/me",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "OPENAI_API_KEY": "sk-secret",
    "DAEMON_SOCKET_PATH": "/x",
    "LD_PRELOAD": "/evil.so",
    "HANDOFF_DATA": "not this",
    "WANTED": "yes",
}


def told(payload: bytes, **settings: object) -> tuple[dict[str, bytes], bytes | None]:
    """The environment, and the data for the file."""
    own = ExecSettings(command=("sh", "-c", "exit"), **settings)  # type: ignore[arg-type]
    command, data = ExecBackend("own", own, ENVIRON).command(parse(payload, envelopes=True), "req-1", "192.0.2.7")
    assert command.file == "/usr/bin/sh"
    assert command.arguments == ("sh", "-c", "exit")
    return dict(command.environment), data


def test_the_environment_is_made_of_what_is_named() -> None:
    variables, data = told(b'{"prompt":"Hi"}', environment={"PORT": 8080}, pass_environment=("WANTED", "UNSET"))
    assert variables == {
        "PATH": b"/usr/bin:/bin",
        "HOME": b"/home/me",
        "LC_ALL": b"C.UTF-8",
        "TZ": b"UTC",
        "PORT": b"8080",
        "WANTED": b"yes",
        "HANDOFF_DATA": b'{"prompt":"Hi"}',
        "HANDOFF_REQUEST_ID": b"req-1",
        "HANDOFF_REMOTE_ADDR": b"192.0.2.7",
    }
    assert data is None


def test_the_request_is_told_where_there_is_one() -> None:
    request = {
        "method": "POST",
        "uri": "/chat?a=b",
        "host": "example.org",
        "protocol": "HTTP/1.1",
        "headers": {"Accept-Language": "de", "x\u0000": "1", "traceparent": "00\u0000"},
    }
    payload = envelope(request, b"plain words", response_headers=[["Set-Cookie", "a=b"], ["Vary", "Origin"]])
    variables, _ = told(payload)
    assert {name: value for name, value in variables.items() if name.startswith("HANDOFF_")} == {
        "HANDOFF_DATA": b"plain words",
        "HANDOFF_REQUEST_ID": b"req-1",
        "HANDOFF_REMOTE_ADDR": b"192.0.2.7",
        "HANDOFF_METHOD": b"POST",
        "HANDOFF_URI": b"/chat?a=b",
        "HANDOFF_HOST": b"example.org",
        "HANDOFF_PROTOCOL": b"HTTP/1.1",
        "HANDOFF_HEADER_ACCEPT_LANGUAGE": b"de",
        "HANDOFF_HEADER_X_": b"1",
        "HANDOFF_RESPONSE_HEADERS": b"Set-Cookie: a=b\r\nVary: Origin\r\n",
    }


def test_no_data_is_empty_data() -> None:
    variables, data = told(NO_DATA)
    assert variables["HANDOFF_DATA"] == b""
    assert data is None


@pytest.mark.parametrize("more", [0, 1])
def test_data_too_large_for_the_environment_goes_into_a_file(more: int) -> None:
    payload = b"x" * (STRING_MAX_BYTES - len("HANDOFF_DATA=") - 1 + more)
    variables, data = told(payload)
    assert ("HANDOFF_DATA" in variables) == (not more)
    assert variables.get("HANDOFF_DATA_FILE") == (b"/proc/self/fd/3" if more else None)
    assert data == (payload if more else None)


def test_data_with_a_nul_goes_into_a_file() -> None:
    variables, data = told(b"a\0b")
    assert "HANDOFF_DATA" not in variables
    assert data == b"a\0b"


def test_who_was_root_and_is_no_more_has_a_home_of_its_own() -> None:
    own = pwd.getpwuid(os.geteuid())
    variables = programs.environment(ExecSettings(command=("x",)), {"USER": "somebody-else", "HOME": "/wrong"})
    assert (variables["USER"], variables["HOME"]) == (own.pw_name, own.pw_dir)


def test_every_exec_backend_has_a_mark_of_its_own() -> None:
    own = ExecSettings(command=("x",))
    many = {f"b{number:03}": own for number in range(300)}
    marks = programs.marks(Settings(backends={"mock": MockBackend(), **many}))
    assert set(marks) == set(many)
    assert len(set(list(marks.values())[:254])) == 254
    assert set(marks.values()) <= set(range(1, 256))


def test_a_mark_stays_the_same_when_backends_come_and_go() -> None:
    """While a reload lasts, workers of both configurations count by it."""
    own = ExecSettings(command=("x",))
    before = programs.marks(Settings(backends={"b": own, "d": own}))
    after = programs.marks(Settings(backends={"a": own, "b": own, "c": own, "d": own}))
    assert before.items() <= after.items()


def test_anything_is_a_question() -> None:
    backend = ExecBackend("own", ExecSettings(command=("x",)), ENVIRON)
    assert backend.has_question(parse(json.dumps({}).encode(), envelopes=True).data)
    assert not backend.costs_money
