"""The head of the answer: whatever the application says, it is a head, and ours."""

import email.parser
import email.policy
import re
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import response

ANYTHING: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())
)
# Most of what hypothesis makes up is no field at all; these nearly are.
NAMES = st.text(st.sampled_from("abXYZ-_09:\r\n \t\0é"), max_size=8) | st.sampled_from(sorted(response.OURS))
PAIRS = st.lists(st.lists(ANYTHING, max_size=3) | st.tuples(NAMES, ANYTHING))


@given(PAIRS)
def test_whatever_is_given_only_whole_fields_come_out(pairs: list[Any]) -> None:
    lines, refused = response.fields(pairs)
    for line in lines.split(b"\r\n")[:-1]:
        assert re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [^\x00-\x1f\x7f]*", line)
        assert line.split(b":")[0].lower().decode() not in response.OURS
    assert lines == b"" or lines.endswith(b"\r\n")
    assert all(isinstance(name, str) and len(name) <= 64 for name in refused)
    assert lines.count(b"\r\n") + len(refused) <= len(pairs)


@given(PAIRS)
def test_the_head_stays_one_head(pairs: list[Any]) -> None:
    lines, _ = response.fields(pairs)
    for head in (response.stream_head("id", lines), response.error_response(502, "id", lines, b"body", 1)):
        assert head.count(b"\r\n\r\n") == 1
        start, _, rest = head.partition(b"\r\n")
        assert re.fullmatch(rb"HTTP/1\.1 \d\d\d [\w ]+", start)
        parsed = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(rest)
        for ours in ("content-type", "cache-control", "connection", "x-request-id"):
            assert len(parsed.get_all(ours)) == 1


def test_harmless_fields_pass_in_order_and_as_often_as_given() -> None:
    pairs = [("Set-Cookie", "a=1"), ("set-cookie", "b=2"), ("X-Number", 5), ("X-Float", 1.5), ("X-Empty", "")]
    lines, refused = response.fields(pairs)
    assert lines == b"Set-Cookie: a=1\r\nset-cookie: b=2\r\nX-Number: 5\r\nX-Float: 1.5\r\nX-Empty: \r\n"
    assert refused == []


@pytest.mark.parametrize(
    "name", ["Content-Length", "TRANSFER-ENCODING", "connection", "X-Request-ID", "X-Socket-Handoff"]
)
def test_what_is_ours_is_left_out_without_a_word(name: str) -> None:
    assert response.fields([(name, "x"), ("A", "b")]) == (b"A: b\r\n", [])


@pytest.mark.parametrize("value", ["a\r\nb", "a\nb", "a\rb", "\0", "\x1b", "\x7f", "a\tb", "\n", "a\r\n"])
def test_values_that_could_end_the_field(value: str) -> None:
    assert response.fields([("Name", value), ("A", "b")]) == (b"A: b\r\n", ["Name"])


@pytest.mark.parametrize("name", ["", " ", "a b", "a:", "a\r\n", "a\n", "é", "(", "a" * 257, "\0"])
def test_names_that_are_no_token(name: str) -> None:
    assert response.fields([(name, "x"), ("A", "b")]) == (b"A: b\r\n", [name[:64]])


@pytest.mark.parametrize(
    "pair", [(), ("A",), ("A", "b", "c"), (["A"], "b"), (None, "b"), (1, "b"), ("A", None), ("A", {})]
)
def test_pairs_that_are_none(pair: Any) -> None:
    lines, refused = response.fields([pair])
    assert lines == b""
    assert len(refused) == 1


def test_there_is_an_end_to_them() -> None:
    lines, refused = response.fields(("X", "v" * 1000) for _ in range(1000))
    assert response.MAX_FIELDS_BYTES - 1100 < len(lines) <= response.MAX_FIELDS_BYTES
    assert refused == ["X"]


def test_the_heads_to_the_letter() -> None:
    assert response.stream_head("req", b"A: b\r\n") == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nConnection: close\r\n"
        b"X-Accel-Buffering: no\r\nX-Request-Id: req\r\nA: b\r\n\r\n"
    )
    assert response.error_response(503, "req", b"A: b\r\n", b"{}", 1) == (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nContent-Length: 2\r\n"
        b"Cache-Control: no-store\r\nConnection: close\r\nX-Request-Id: req\r\nA: b\r\n\r\n{}"
    )


def test_every_status_that_a_reason_has() -> None:
    from forkd.reasons import REASONS  # noqa: PLC0415

    for status in {reason.status for reason in REASONS.values()} - {0}:
        assert response.error_response(status, "r", b"", b"").startswith(b"HTTP/1.1 %d " % status)
        assert HTTPStatus(status).phrase.encode() in response.stream_head("r", b"", status)
