"""What a handoff asks for: any bytes give a Request, never an exception."""

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.handoff import encode_envelope
from tests.harness import envelope
from workers.request import HandoffData, Request, RequestLine, choose_id, parse

KEYS = sorted(HandoffData.__struct_fields__)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
DATA = st.dictionaries(st.sampled_from(KEYS) | st.text(), JSON)
ENVELOPES = st.fixed_dictionaries(
    {},
    optional={
        "request": JSON | st.dictionaries(st.sampled_from(sorted(RequestLine.__struct_fields__)), JSON),
        "response_headers": JSON,
        "tls": JSON,
    },
)


def check(request: Request) -> None:
    """It holds what its users rely on."""
    assert isinstance(request.data, HandoffData)
    assert isinstance(request.line, RequestLine)
    assert b"\r\n\r\n" not in request.fields
    assert request.fault is None or (isinstance(request.fault, str) and len(request.fault) < 300)
    assert not request.bad_envelope or request.fault is not None
    request_id = choose_id(request, 3, 12.5)
    assert request_id.isascii()
    assert request_id.isprintable()
    assert 0 < len(request_id) <= 128


@given(st.binary(), st.booleans())
def test_any_bytes(payload: bytes, envelopes: bool) -> None:
    check(parse(payload, envelopes=envelopes))


@given(st.binary())
def test_any_bytes_behind_soh(payload: bytes) -> None:
    check(parse(b"\x01" + payload, envelopes=True))


@given(st.binary(), st.binary())
def test_any_line_of_json(line: bytes, data: bytes) -> None:
    check(parse(b"\x01\0" + line + b"\n" + data, envelopes=True))


@given(DATA)
def test_any_data(data: dict[str, Any]) -> None:
    check(parse(json.dumps(data).encode(), envelopes=True))


@given(ENVELOPES, DATA)
def test_any_envelope(envelope: dict[str, Any], data: dict[str, Any]) -> None:
    check(parse(b"\x01\0" + json.dumps(envelope).encode() + b"\n" + json.dumps(data).encode(), envelopes=True))


@pytest.mark.parametrize("key", KEYS)
def test_every_depth_in_every_place(key: str) -> None:
    for depth in (*range(sys.getrecursionlimit() - 20, sys.getrecursionlimit() + 5), 100_000):
        for inner in (b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
            check(parse(b'{"%b":%b}' % (key.encode(), inner), envelopes=True))
            check(parse(b'{"%b":[[%b,"v"],%b]}' % (key.encode(), inner, inner), envelopes=True))


def test_good_data() -> None:
    data = {
        "prompt": "a", "messages": [{"role": "user"}], "model": "m", "system": "s", "max_tokens": 5, "temperature": 0.5,
        "user_id": 7, "request_id": "r", "backend": "b", "attachments": {"a": "b"}, "test_pattern": "t", "unknown": 1,
        "thread_id": "i", "assistant_id": "g", "stream_mode": ["updates"],
    }  # fmt: skip
    raw = json.dumps(data).encode()
    request = parse(raw, envelopes=True)
    assert request.fault is None
    assert request.raw == raw
    for key, value in data.items():
        assert key == "unknown" or getattr(request.data, key) == value


def test_an_input_of_the_applications_own_is_kept_as_it_was_written() -> None:
    for written in (b'{"a": [1,  2]}', b"[]", b'"a"', b"0"):
        kept = parse(b'{"prompt":"a","langgraph_input":%b}' % written, envelopes=True).data.langgraph_input
        assert bytes(kept) == written
    assert bytes(HandoffData().langgraph_input) == b""


def test_phps_habits() -> None:
    data = b'{"prompt":"a","max_tokens":"5","temperature":"0.5","user_id":"7","response_headers":[],"attachments":[]}'
    request = parse(data, envelopes=True)
    assert request.fault is None
    assert (request.data.max_tokens, request.data.temperature, request.data.user_id) == (5, 0.5, "7")
    assert (request.fields, request.refused_fields) == (b"", [])


@pytest.mark.parametrize("payload", [b"", b"\0"])
def test_no_data_is_a_fault_that_has_a_name(payload: bytes) -> None:
    request = parse(payload, envelopes=True)
    assert request.fault == "no data"
    assert request.data == HandoffData()


@pytest.mark.parametrize("payload", [b"[]", b"x", b"\xff", b'{"prompt":1}', b'{"prompt":"a"', b"null"])
def test_bad_data_leaves_defaults_and_a_fault(payload: bytes) -> None:
    request = parse(payload, envelopes=True)
    assert request.fault
    assert request.data == HandoffData()
    assert not request.bad_envelope


def test_an_envelope() -> None:
    envelope = {
        "request": {"method": "POST", "remote_addr": "::1", "request_id": "r", "headers": {"A": "b"}, "unknown": 1},
        "response_headers": [["Set-Cookie", "a=1"]],
        "unknown": 1,
    }
    data = b'{"prompt":"a\\n\\u0001","response_headers":{"Set-Cookie":["b=2","c=3"],"X":5}}'
    request = parse(encode_envelope(envelope, data), envelopes=True)
    assert request.fault is None
    assert request.raw == data
    assert request.line == RequestLine(method="POST", remote_addr="::1", request_id="r", headers={"A": "b"})
    assert request.fields == b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nSet-Cookie: c=3\r\nX: 5\r\n"


@pytest.mark.parametrize(("flags", "relayed"), [(0, False), (1, False), (4, True), (5, True)])
def test_the_envelope_says_whether_the_client_is_relayed(flags: int, relayed: bool) -> None:
    payload = envelope({"method": "GET"}, b"{}", flags=flags)
    assert parse(payload, envelopes=True).relayed is relayed
    assert not parse(payload, envelopes=False).relayed


def test_an_envelopes_headers_outlive_bad_data() -> None:
    request = parse(encode_envelope({"response_headers": [["A", "b"]]}, b"no JSON"), envelopes=True)
    assert request.fault
    assert not request.bad_envelope
    assert request.fields == b"A: b\r\n"


def test_an_envelope_where_none_is_taken() -> None:
    request = parse(encode_envelope({"request": {"request_id": "forged"}}, b"{}"), envelopes=False)
    assert request.line == RequestLine()
    assert request.fault


@pytest.mark.parametrize("headers", [["a"], [1], [None], [{"a": "b"}], [["a"]], [["a", "b", "c"]], [[["a"], "b"]]])
def test_lists_of_headers_that_are_no_pairs(headers: list[Any]) -> None:
    request = parse(json.dumps({"response_headers": headers}).encode(), envelopes=True)
    assert request.fields == b""
    assert len(request.refused_fields) == 1


def test_request_ids() -> None:
    def choose(by_data: Any, by_apache: str | None, slot: int = 1) -> str:
        request = Request(HandoffData(request_id=by_data), RequestLine(request_id=by_apache), b"", b"", None, [])
        return choose_id(request, slot, 2.5)

    assert choose("data", "apache") == "data"
    assert choose(5, "apache") == "5"
    assert choose("da ta", "apache") == "apache"
    assert choose("x" * 129, "aZ0_.:@/+=-") == "aZ0_.:@/+=-"
    ours = choose(None, None)
    assert choose("a\n", "a\r\nb") == ours  # the same handoff has the same id in every worker
    assert choose("ü", "") == ours
    assert len({choose(None, None, slot) for slot in range(100)}) == 100
