"""The anthropic backend, without a socket: what it asks for, and what it makes of the events of the Messages API."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.settings import AnthropicBackend as Settings
from forkd.settings import Secret
from tests.workers.asked import IMAGE_BASE64, NOTES, PDF_BASE64, asked_of, attached, handoff_of
from workers.backends.anthropic import AnthropicBackend
from workers.backends.base import BadRequest, Done, Extra, Failure, Finish, Piece, Translation, Usage
from workers.sse import Event

PLAIN = AnthropicBackend("anthropic", Settings())
CURIOUS = AnthropicBackend("anthropic", Settings(events=("reasoning", "tool_calls", "usage", "finish")))


def event(data: str | bytes, name: str = "") -> Event:
    raw = data.encode() if isinstance(data, str) else data
    return Event(name, raw, b"data: " + raw + b"\n\n")


def pieces(translation: Translation) -> list[Piece]:
    if translation is None:
        return []
    return translation if isinstance(translation, list) else [translation]


EVENTS = [
    (
        '{"type":"message_start","message":{"id":"msg_01","type":"message","role":"assistant","model":"claude-sonnet-4-5",'
        '"content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":25,"cache_creation_input_tokens":3,'
        '"cache_read_input_tokens":100,"output_tokens":1,"service_tier":"standard"}}}',
        [Usage(128, 1)],
    ),
    ('{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}', []),
    ('{"type": "ping"}', []),
    ('{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Grüße"}}', ["Grüße"]),
    ('{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Hm"}}', []),
    ('{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"EqQB"}}', []),
    ('{"type":"content_block_delta","index":0,"delta":{"type":"citations_delta","citation":{"cited_text":"x"}}}', []),
    ('{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\\"a"}}', []),
    ('{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"toolu_1","name":"f","input":{}}}',
     []),
    ('{"type":"content_block_start","index":0,"content_block":{"type":"text","text":"all at once"}}', ["all at once"]),
    ('{"type":"content_block_stop","index":0}', []),
    ('{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":15}}',
     [Usage(None, 15), Finish("end_turn")]),
    ('{"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},"usage":{"input_tokens":9,'
     '"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":15}}',
     [Usage(9, 15), Finish("max_tokens")]),
    ('{"type":"message_stop"}', [Done()]),
    ('{"type":"error","error":{"details":null,"type":"overloaded_error","message":"Overloaded"},"request_id":"req_1"}',
     [Failure("backend_overloaded", "overloaded_error")]),
    ('{"type":"error","error":{"type":"rate_limit_error","message":"sk-secret"}}',
     [Failure("backend_rate_limited", "rate_limit_error")]),
    ('{"type":"error","error":{"type":"api_error","message":"Internal server error"}}',
     [Failure("backend_error", "api_error")]),
    # of servers that are like it, of later days, of no sense
    ('{"type":"error"}', [Failure("backend_error", "")]),
    ('{"error":"sk-secret"}', [Failure("backend_error", "")]),
    ('{"type":"something_new","delta":{"type":"x"}}', []),
    ('{"type":"content_block_delta","index":0}', []),
    ('{"type":"message_start"}', []),
    ('{"type":"message_start","message":null}', []),
    ('{"type":"message_delta","delta":{"stop_reason":null}}', []),
    ('{"type":"message_delta","delta":5,"usage":{"output_tokens":"x"}}', [Usage(None, None)]),
    ('{"type":"content_block_delta","index":"0","delta":{"text":"a","thinking":7}}', ["a"]),
    ('{"type":"content_block_start","content_block":[]}', []),
    (b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a\xff"}}', ["a\ufffd"]),
    ('{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\\ud83d"}}', ["\ufffd"]),
    ("{}", []),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), EVENTS)
def test_events(data: str | bytes, expected: list[Piece]) -> None:
    assert pieces(PLAIN.translate(event(data))) == expected
    assert [piece for piece in pieces(CURIOUS.translate(event(data))) if not isinstance(piece, Extra)] == expected


def test_a_piece_of_text_is_a_plain_string() -> None:
    delta = '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}'
    assert PLAIN.translate(event(delta)) == "a"
    assert CURIOUS.translate(event(delta)) == "a"


@pytest.mark.parametrize("data", ["x", "[]", "null", "[DONE]", "[" * 100_000, '{"error":' * 100_000])
def test_what_is_malformed(data: str) -> None:
    with pytest.raises(ValueError):
        CURIOUS.translate(event(data))


KEYS = (
    "type",
    "delta",
    "text",
    "thinking",
    "partial_json",
    "stop_reason",
    "index",
    "content_block",
    "message",
    "usage",
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["message_start", "message_delta", "content_block_start", "content_block_delta", "error"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "error", "id", "name"]), inner),
    max_leaves=12,
)


@given(JSON | st.binary())
def test_any_data_is_translated_or_malformed(data: Any) -> None:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    for backend in (PLAIN, CURIOUS):
        try:
            found = pieces(backend.translate(event(raw)))
        except ValueError:
            continue
        for piece in found:
            assert isinstance(piece, str | Usage | Finish | Extra | Failure | Done)
            if isinstance(piece, str):
                piece.encode()


def extras(backend: AnthropicBackend, data: str) -> list[tuple[str, Any]]:
    return [
        (one.name, json.loads(one.data)) for one in pieces(backend.translate(event(data))) if isinstance(one, Extra)
    ]


def test_further_events_when_they_are_wanted() -> None:
    told = [extra for data, _ in EVENTS[:13] for extra in extras(CURIOUS, str(data))]
    function = {"name": "f", "arguments": ""}
    assert told == [
        ("usage", {"input_tokens": 128, "output_tokens": 1}),
        ("reasoning", {"content": "Hm"}),
        ("tool_calls", [{"index": 1, "function": {"arguments": '{"a'}}]),
        ("tool_calls", [{"index": 1, "id": "toolu_1", "type": "function", "function": function}]),
        ("usage", {"output_tokens": 15}),
        ("finish", {"reason": "end_turn"}),
        ("usage", {"input_tokens": 9, "output_tokens": 15}),
        ("finish", {"reason": "max_tokens"}),
    ]
    assert [extra for data, _ in EVENTS[:13] for extra in extras(PLAIN, str(data))] == []


def test_a_prompt() -> None:
    request = PLAIN.request(handoff_of({"prompt": "Hello"}), "req-1", {})
    assert request.path == "/v1/messages"
    assert json.loads(request.body) == {
        "model": "claude-sonnet-4-5",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "max_tokens": 4096,
    }
    headers = dict(request.headers)
    assert headers["anthropic-version"] == "2023-06-01"
    assert headers["x-request-id"] == "req-1"
    assert "x-api-key" not in headers


def test_everything() -> None:
    backend = AnthropicBackend("a", Settings(api_key=Secret("sk-1"), pass_through=("top_k", "thinking")))
    data = {
        "prompt": "a", "system": "s", "model": "m", "max_tokens": 5, "temperature": 0.5, "test_pattern": "p",
        "top_k": 3, "thinking": {"type": "enabled", "budget_tokens": 1024},
    }  # fmt: skip
    request = backend.request(handoff_of(data), "r", {})
    assert json.loads(request.body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "stream": True,
        "system": "s",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    assert dict(request.headers)["x-api-key"] == "sk-1"
    assert dict(request.headers)["x-test-pattern"] == "p"


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("https://api.anthropic.com", "/v1/messages"),
        ("https://api.anthropic.com/", "/v1/messages"),
        ("https://api.anthropic.com/v1", "/messages"),
        ("https://gateway.example/anthropic/v1/", "/messages"),
        ("https://gateway.example/anthropic", "/v1/messages"),
    ],
)
def test_either_way_to_write_api_base(base: str, path: str) -> None:
    backend = AnthropicBackend("a", Settings(api_base=base))
    assert backend.request(handoff_of({"prompt": "a"}), "r", {}).path == path


def test_the_system_has_a_place_of_its_own() -> None:
    user = {"role": "user", "content": "u"}
    said = [{"role": "system", "content": "b"}, user, {"role": "developer", "content": "c"}]
    asked = asked_of(PLAIN, {"system": "a", "messages": said})
    assert asked["system"] == "a\n\nb\n\nc"
    assert asked["messages"] == [user]
    parts = [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]
    asked = asked_of(PLAIN, {"system": "a", "messages": [{"role": "system", "content": parts}, user]})
    assert asked["system"] == [{"type": "text", "text": "a"}, *parts]
    assert "system" not in asked_of(PLAIN, {"messages": [{"role": "system"}, user]})


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({}, "no_prompt"),
        ({"messages": [{"role": "system", "content": "a"}]}, "no_prompt"),
        ({"messages": [{"role": None}]}, "bad_handoff"),
        ({"prompt": "a", "max_tokens": -1}, "bad_handoff"),
        ({"prompt": "a", "test_pattern": "\x7f"}, "bad_handoff"),
    ],
)
def test_handoffs_that_cannot_be_asked(data: dict[str, Any], code: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        PLAIN.request(handoff_of(data), "r", {})
    assert refusal.value.code == code


def test_attachments() -> None:
    asked = asked_of(PLAIN, {"prompt": "{pic}, {paper}, {notes}"}, "pic", "paper", "notes")
    assert asked["messages"][0]["content"] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE_BASE64}},
        {"type": "text", "text": ", "},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF_BASE64}},
        {"type": "text", "text": f", {NOTES}"},
    ]
    for media_type in ("image/tiff", "video/mp4"):
        with pytest.raises(BadRequest) as refusal:
            PLAIN.request(handoff_of({"prompt": "a"}), "r", attached(("x", media_type, b"x")))
        assert refusal.value.code == "bad_attachment"
