"""The langgraph backend, without a socket: what it asks for, and what it makes of a run's events."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.settings import LangGraphBackend as Settings
from forkd.settings import Secret
from tests.workers.asked import IMAGE, NOTES, PDF, asked_of, attached, handoff_of
from workers.backends.base import BadRequest, Done, Extra, Failure, Finish, Piece, Translation, Usage
from workers.backends.langgraph import LangGraphBackend
from workers.sse import Event

PLAIN = LangGraphBackend("langgraph", Settings())
CURIOUS = LangGraphBackend("langgraph", Settings(events=("reasoning", "tool_calls", "usage", "finish")))
ABOUT = {
    "run_id": "1ef6", "thread_id": "c178", "graph_id": "agent", "assistant_id": "fe09", "langgraph_step": 1,
    "langgraph_node": "agent", "langgraph_triggers": ["start:agent"], "ls_provider": "openai", "ls_model_type": "chat",
}  # fmt: skip


def event(name: str, data: Any) -> Event:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return Event(name, raw, b"event: x\r\ndata: x\r\n\r\n")


def chunk(content: Any = "", **more: Any) -> dict[str, Any]:
    return {
        "content": content, "additional_kwargs": {}, "response_metadata": {}, "type": "AIMessageChunk", "name": None,
        "id": "run-985c", "example": False, "tool_calls": [], "invalid_tool_calls": [], "usage_metadata": None,
        "tool_call_chunks": [], **more,
    }  # fmt: skip


def pieces(translation: Translation) -> list[Piece]:
    if translation is None:
        return []
    return translation if isinstance(translation, list) else [translation]


USAGE = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18, "input_token_details": {"cache_read": 0}}
STOP = {"finish_reason": "stop", "model_name": "gpt-4o", "system_fingerprint": "fp_1"}
HUMAN = {"content": "hi", "type": "human", "id": "833c", "additional_kwargs": {}, "response_metadata": {}}
TOOL = {"content": "sunny", "type": "tool", "id": "9", "name": "weather", "tool_call_id": "call_1"}
ANSWER = {"content": "Hello!", "type": "ai", "id": "run-985c", "response_metadata": STOP, "usage_metadata": USAGE}

EVENTS: list[tuple[str, Any, list[Piece]]] = [
    ("metadata", {"run_id": "1ef6", "attempt": 1}, []),
    # messages-tuple
    ("messages", [chunk(), ABOUT], []),
    ("messages", [chunk("Grüße"), ABOUT], ["Grüße"]),
    ("messages|tools:1ef6", [chunk("from below"), ABOUT], ["from below"]),
    ("messages", [chunk([{"type": "text", "text": "a", "index": 0}]), ABOUT], ["a"]),
    ("messages", [chunk([{"type": "thinking", "thinking": "Hm", "index": 0}]), ABOUT], []),
    ("messages", [chunk(response_metadata=STOP), ABOUT], [Finish("stop")]),
    ("messages", [chunk("!", response_metadata={"done": True, "done_reason": "stop"}), ABOUT], ["!", Finish("stop")]),
    ("messages", [chunk(response_metadata={"stop_reason": "end_turn"}), ABOUT], [Finish("end_turn")]),
    ("messages", [chunk(response_metadata={"finish_reason": "tool_calls"}), ABOUT], []),
    ("messages", [chunk(usage_metadata=USAGE), ABOUT], [Usage(11, 7, "run-985c")]),
    ("messages", [HUMAN, ABOUT], []),
    ("messages", [TOOL, ABOUT], []),
    ("messages", [ANSWER, ABOUT], ["Hello!", Finish("stop"), Usage(11, 7, "run-985c")]),
    # updates and values
    ("updates", {"agent": {"messages": [ANSWER]}}, ["Hello!", Finish("stop"), Usage(11, 7, "run-985c")]),
    ("updates", {"agent": {"messages": [HUMAN, ANSWER | {"content": "x"}, HUMAN]}}, []),
    ("updates", {"agent": {"messages": ANSWER}}, ["Hello!", Finish("stop"), Usage(11, 7, "run-985c")]),
    ("updates", {"a": {"messages": [chunk("1")]}, "b": {"messages": [HUMAN, chunk("2")]}}, ["1", "2"]),
    ("updates", {"tools": {"messages": [TOOL]}, "rest": None, "count": {"n": 1}}, []),
    ("updates", {"__interrupt__": [{"value": "sure?", "id": "1"}]}, []),
    ("values", {"messages": [HUMAN]}, []),
    ("values", {"messages": [HUMAN, ANSWER]}, ["Hello!", Finish("stop"), Usage(11, 7, "run-985c")]),
    ("values", {}, []),
    # what other modes send, and the end
    ("messages/metadata", {"run-985c": {"metadata": ABOUT}}, []),
    ("messages/partial", [{"content": "He", "type": "ai"}], ["He"]),
    ("messages/complete", [HUMAN], []),
    ("custom", {"messages": [ANSWER]}, []),
    ("debug", {"type": "task"}, []),
    ("end", None, [Done()]),
    ("end", b"", [Done()]),
    ("error", {"error": "ValueError", "message": "sk-secret"}, [Failure("backend_error", "ValueError")]),
    ("error", {"error": "RateLimitError", "message": "x"}, [Failure("backend_rate_limited", "RateLimitError")]),
    ("error", {"error": "anthropic.OverloadedError"}, [Failure("backend_overloaded", "anthropic.OverloadedError")]),
    ("error", {"error": "no such thing: sk-secret"}, [Failure("backend_error", "")]),
    ("error", {}, [Failure("backend_error", "")]),
    # what makes no sense
    ("messages", [], []),
    ("messages", ["text"], []),
    ("messages", [{"content": "a"}, ABOUT], []),
    ("messages", [chunk("a", usage_metadata=5, tool_call_chunks={}), ABOUT], ["a"]),
    ("messages", b'[{"content":"a\xff","type":"AIMessageChunk"}]', ["a\ufffd"]),
    ("messages", b'[{"content":"\\ud83d","type":"AIMessageChunk"}]', ["\ufffd"]),
    ("messages/partial", {}, []),
    ("updates", [], []),
    ("updates", {"a": 5, "b": {"messages": "x"}, "c": {"messages": []}, "d": []}, []),
    ("values", [1], []),
    ("", {"x": 1}, []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "expected"), EVENTS)
def test_events(name: str, data: Any, expected: list[Piece]) -> None:
    assert pieces(PLAIN.translate(event(name, data))) == expected
    found = pieces(CURIOUS.translate(event(name, data)))
    assert [piece for piece in found if not isinstance(piece, Extra)] == expected


def test_a_piece_of_text_is_a_plain_string() -> None:
    assert PLAIN.translate(event("messages", [chunk("a"), ABOUT])) == "a"
    assert CURIOUS.translate(event("messages", [chunk("a"), ABOUT])) == "a"


@pytest.mark.parametrize("name", ["messages", "messages|a", "messages/partial", "values", "updates", "error"])
@pytest.mark.parametrize("data", [b"x", b"", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_malformed(name: str, data: bytes) -> None:
    with pytest.raises(ValueError):
        CURIOUS.translate(event(name, data))


KEYS = (
    "messages",
    "content",
    "type",
    "text",
    "additional_kwargs",
    "response_metadata",
    "finish_reason",
    "index",
    "args",
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["ai", "AIMessageChunk"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "usage_metadata", "input_tokens", "tool_calls", "error"]), inner)
    ),
    max_leaves=12,
)


@given(st.sampled_from(sorted({name for name, _, _ in EVENTS})), JSON | st.binary())
def test_any_data_is_translated_or_malformed(name: str, data: Any) -> None:
    for backend in (PLAIN, CURIOUS):
        try:
            found = pieces(backend.translate(event(name, data)))
        except ValueError:
            continue
        for piece in found:
            assert isinstance(piece, str | Usage | Finish | Extra | Failure | Done)
            if isinstance(piece, str):
                piece.encode()


def extras(name: str, data: Any) -> list[tuple[str, Any]]:
    found = pieces(CURIOUS.translate(event(name, data)))
    return [(one.name, json.loads(one.data)) for one in found if isinstance(one, Extra)]


def test_further_events_when_they_are_wanted() -> None:
    said = {"name": "weather", "args": '{"city"', "id": "call_1", "index": 0, "type": "tool_call_chunk"}
    more = {"name": None, "args": ': "Köln"}', "id": None, "index": 0, "type": "tool_call_chunk"}
    whole = {"name": "weather", "args": {"city": "Köln"}, "id": "call_1", "type": "tool_call"}
    function = {"name": "weather", "arguments": '{"city"'}
    assert extras("messages", [chunk(tool_call_chunks=[said]), ABOUT]) == [
        ("tool_calls", [{"index": 0, "id": "call_1", "type": "function", "function": function}])
    ]
    assert extras("messages", [chunk(tool_call_chunks=[more], tool_calls=[whole]), ABOUT]) == [
        ("tool_calls", [{"index": 0, "function": {"arguments": ': "Köln"}'}}])
    ]
    function = {"name": "weather", "arguments": '{"city":"Köln"}'}
    assert extras(
        "updates", {"agent": {"messages": [{"content": "", "type": "ai", "tool_calls": [whole, whole]}]}}
    ) == [
        ("tool_calls", [{"index": index, "id": "call_1", "type": "function", "function": function}]) for index in (0, 1)
    ]
    for content, kwargs in (
        ("", {"reasoning_content": "Hm"}),
        ([{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": ""}], {}),
        ([{"type": "reasoning", "reasoning": "Hm"}], {}),
    ):
        assert extras("messages", [chunk(content, additional_kwargs=kwargs), ABOUT]) == [
            ("reasoning", {"content": "Hm"})
        ]
    assert extras("messages", [chunk(response_metadata={"finish_reason": "tool_calls"}), ABOUT]) == [
        ("finish", {"reason": "tool_calls"})
    ]
    assert extras("messages", [chunk(usage_metadata=USAGE), ABOUT]) == [
        ("usage", {"input_tokens": 11, "output_tokens": 7})
    ]
    assert extras("messages", [HUMAN, ABOUT]) == []


# What is asked for ---------------------------------------------------------------------------------------------------


def test_a_prompt() -> None:
    request = PLAIN.request(handoff_of({"prompt": "Hello", "model": "ignored"}), "req-1", {})
    assert request.path == "/runs/stream"
    assert json.loads(request.body) == {
        "assistant_id": "agent",
        "input": {"messages": [{"role": "user", "content": "Hello"}]},
        "stream_mode": ["messages-tuple"],
        "on_disconnect": "cancel",
    }
    headers = dict(request.headers)
    assert headers["x-request-id"] == "req-1"
    assert "x-api-key" not in headers
    assert not PLAIN.repeatable


def test_everything() -> None:
    backend = LangGraphBackend("l", Settings(api_key=Secret("k-1"), pass_through=("config", "on_disconnect")))
    data = {
        "messages": [{"role": "human", "content": "a"}], "system": "s", "thread_id": "1ef6-A_b",
        "assistant_id": "other", "stream_mode": "updates", "config": {"configurable": {"x": 1}},
        "on_disconnect": "continue", "test_pattern": "p",
    }  # fmt: skip
    request = backend.request(handoff_of(data), "r", {})
    assert request.path == "/threads/1ef6-A_b/runs/stream"
    assert json.loads(request.body) == {
        "assistant_id": "other",
        "input": {"messages": [{"role": "system", "content": "s"}, {"role": "human", "content": "a"}]},
        "stream_mode": ["updates"],
        "on_disconnect": "continue",
        "config": {"configurable": {"x": 1}},
    }
    assert dict(request.headers)["x-api-key"] == "k-1"
    assert dict(request.headers)["x-test-pattern"] == "p"


def test_an_input_of_the_applications_own() -> None:
    for own in ({"question": "a", "n": [1.5, None]}, [], "text", 0):
        assert asked_of(PLAIN, {"prompt": "ignored", "langgraph_input": own})["input"] == own
    assert asked_of(PLAIN, {"prompt": "a", "langgraph_input": None})["input"]["messages"]
    with pytest.raises(BadRequest) as refusal:
        asked_of(PLAIN, {"langgraph_input": {}}, "notes")
    assert refusal.value.code == "bad_attachment"


def test_a_command_takes_the_place_of_an_input() -> None:
    backend = LangGraphBackend("l", Settings(pass_through=("command",)))
    asked = asked_of(backend, {"prompt": "", "thread_id": "t", "command": {"resume": True}})
    assert asked["command"] == {"resume": True}
    assert "input" not in asked


@pytest.mark.parametrize(
    ("wanted", "plain", "raw"),
    [
        (None, ["messages-tuple"], ["messages-tuple"]),
        ([], ["messages-tuple"], ["messages-tuple"]),
        ("messages", ["messages-tuple"], ["messages"]),
        ("updates", ["updates"], ["updates"]),
        ("values", ["updates"], ["values"]),
        (["values", "updates"], ["updates"], ["values", "updates"]),
        (["custom", "values", "messages"], ["messages-tuple"], ["custom", "values", "messages"]),
        ("custom", None, ["custom"]),
        (["debug", "events"], None, ["debug", "events"]),
        ("x", None, None),
        (["updates", ""], None, None),
    ],
)
def test_stream_modes(wanted: Any, plain: list[str] | None, raw: list[str] | None) -> None:
    for modes, form in ((plain, "json"), (plain, "text"), (raw, "raw")):
        backend = LangGraphBackend("l", Settings(format=form))  # type: ignore[arg-type]
        data = {"prompt": "a", "stream_mode": wanted}
        if modes is not None:
            assert asked_of(backend, data)["stream_mode"] == modes
            continue
        with pytest.raises(BadRequest) as refusal:
            asked_of(backend, data)
        assert refusal.value.code == "bad_handoff"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({}, "no_prompt"),
        ({"messages": [1]}, "bad_handoff"),
        *[({"prompt": "a", "thread_id": bad}, "bad_handoff") for bad in ("", "..", "a/b", "a?", "ü", "a\n", "x" * 129)],
        ({"prompt": "a", "test_pattern": "\n"}, "bad_handoff"),
    ],
)  # fmt: skip
def test_handoffs_that_cannot_be_asked(data: dict[str, Any], code: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        PLAIN.request(handoff_of(data), "r", {})
    assert refusal.value.code == code


def test_the_assistant_is_the_model() -> None:
    backend = LangGraphBackend("l", Settings(assistant_id="a", models=("b",)))
    assert [backend.model(handoff_of(data).data) for data in ({}, {"assistant_id": "c", "model": "x"})] == ["a", "c"]
    assert [backend.label(name) for name in ("a", "b", "c")] == ["a", "b", "other"]


def test_attachments() -> None:
    asked = asked_of(PLAIN, {"prompt": "{pic}{paper}{notes}"}, "pic", "paper", "notes")
    assert asked["input"]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": IMAGE}},
        {"type": "file", "file": {"filename": "paper.pdf", "file_data": PDF}},
        {"type": "text", "text": NOTES},
    ]
    with pytest.raises(BadRequest) as refusal:
        PLAIN.request(handoff_of({"prompt": "a"}), "r", attached(("x", "audio/wav", b"x")))
    assert refusal.value.code == "bad_attachment"
