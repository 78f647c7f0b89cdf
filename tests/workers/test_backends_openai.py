"""The openai backend, without a socket: what it asks for, and what it makes of the chunks that servers send."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.settings import OpenAiBackend as Settings
from forkd.settings import Secret
from tests.workers.asked import IMAGE, NOTES, PDF, asked_of, attached, handoff_of
from workers.backends.base import BadRequest, Done, Extra, Failure, Finish, Piece, Translation, Usage
from workers.backends.openai import OpenAiBackend
from workers.sse import Event

PLAIN = OpenAiBackend("openai", Settings())
CURIOUS = OpenAiBackend("openai", Settings(events=("reasoning", "tool_calls", "usage", "finish")))


def event(data: str | bytes, name: str = "") -> Event:
    raw = data.encode() if isinstance(data, str) else data
    return Event(name, raw, b"data: " + raw + b"\n\n")


def chunk(*choices: dict[str, Any], **more: Any) -> str:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1741570283, "model": "m"}
    return json.dumps({**head, "choices": choices, **more}, ensure_ascii=False)


def delta(*, finish_reason: str | None = None, **delta: Any) -> str:
    return chunk({"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason})


def pieces(translation: Translation) -> list[Piece]:
    if translation is None:
        return []
    return translation if isinstance(translation, list) else [translation]


# What servers send ---------------------------------------------------------------------------------------------------

OPENAI = [
    (
        '{"id":"chatcmpl-B9","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06",'
        '"service_tier":"default","system_fingerprint":"fp_50cad350e4","choices":[{"index":0,"delta":{"role":"assistant",'
        '"content":"","refusal":null},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"aZ3"}',
        [],
    ),
    (
        '{"id":"chatcmpl-B9","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06",'
        '"service_tier":"default","system_fingerprint":"fp_50cad350e4","choices":[{"index":0,"delta":{"content":'
        '" wörld"},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"kL"}',
        [" wörld"],
    ),
    (
        '{"id":"chatcmpl-B9","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06",'
        '"choices":[{"index":0,"delta":{"content":null,"refusal":"I cannot"},"finish_reason":null}]}',
        ["I cannot"],
    ),
    (
        '{"id":"chatcmpl-B9","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06",'
        '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}',
        [Finish("stop")],
    ),
    (
        '{"id":"chatcmpl-B9","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06",'
        '"choices":[],"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":'
        '{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}}',
        [Usage(19, 10)],
    ),
    ("[DONE]", [Done()]),
]
AZURE = [
    (
        '{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,'
        '"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}}}]}',
        [],
    ),
]
OPENROUTER = [
    (
        '{"id":"gen-1","provider":"DeepSeek","model":"deepseek/deepseek-r1","object":"chat.completion.chunk",'
        '"created":1741570283,"choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":"Hm",'
        '"reasoning_details":[{"type":"reasoning.text","text":"Hm"}]},"finish_reason":null,"native_finish_reason":null,'
        '"logprobs":null}]}',
        [],
    ),
    (
        '{"id":"gen-1","provider":"OpenAI","model":"openai/gpt-4o","object":"chat.completion.chunk","created":1741570283,'
        '"choices":[{"index":0,"delta":{"role":"assistant","content":"."},"finish_reason":"stop",'
        '"native_finish_reason":"stop","logprobs":null}],"usage":{"prompt_tokens":5,"completion_tokens":2,"cost":0.1}}',
        [".", Finish("stop"), Usage(5, 2)],
    ),
    (
        '{"id":"gen-1","object":"chat.completion.chunk","created":1741570283,"model":"m","provider":"openai",'
        '"error":{"code":"server_error","message":"Provider disconnected"},"choices":[{"index":0,"delta":{"content":'
        '""},"finish_reason":"error"}]}',
        [Failure("backend_error", "server_error")],
    ),
    ('{"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}',
     [Failure("backend_error", "finish_reason error")]),
    ('{"error":{"code":429,"message":"Rate limited: sk-secret"}}', [Failure("backend_rate_limited", "429")]),
]  # fmt: skip
OLLAMA = [
    (
        '{"id":"chatcmpl-494","object":"chat.completion.chunk","created":1741570283,"model":"llama3.2",'
        '"system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},'
        '"finish_reason":null}]}',
        ["Hi"],
    ),
    (
        '{"id":"chatcmpl-494","object":"chat.completion.chunk","created":1741570283,"model":"llama3.2",'
        '"system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":""},'
        '"finish_reason":"stop"}]}',
        [Finish("stop")],
    ),
    ('{"error":{"message":"an error was encountered while running the model: unexpected EOF","type":"api_error",'
     '"param":null,"code":null}}', [Failure("backend_error", "api_error")]),
    ('{"error":"model runner has unexpectedly stopped"}', [Failure("backend_error", "")]),
]  # fmt: skip
VLLM = [
    (
        '{"id":"cmpl-1","object":"chat.completion.chunk","created":1741570283,"model":"Qwen","choices":[{"index":0,'
        '"delta":{"content":"x"},"logprobs":null,"finish_reason":null,"token_ids":null}],"usage":{"prompt_tokens":9,'
        '"total_tokens":11,"completion_tokens":2}}',
        ["x", Usage(9, 2)],
    ),
    (
        '{"id":"cmpl-1","object":"chat.completion.chunk","created":1741570283,"model":"Qwen","choices":[{"index":0,'
        '"delta":{"content":""},"logprobs":null,"finish_reason":"length","stop_reason":null}]}',
        [Finish("length")],
    ),
    ('{"object":"error","message":"Internal","type":"InternalServerError","param":null,"code":500}',
     [Failure("backend_error", "InternalServerError 500")]),
    ('{"error":{"object":"error","message":"busy","type":"ServiceUnavailable","code":503}}',
     [Failure("backend_overloaded", "ServiceUnavailable 503")]),
]  # fmt: skip
GROQ = [
    (
        '{"id":"chatcmpl-f","object":"chat.completion.chunk","created":1741570283,"model":"llama-3.1-8b-instant",'
        '"system_fingerprint":"fp_1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        '"finish_reason":null}],"x_groq":{"id":"req_01"}}',
        [],
    ),
    (
        '{"id":"chatcmpl-f","object":"chat.completion.chunk","created":1741570283,"model":"llama-3.1-8b-instant",'
        '"system_fingerprint":"fp_1","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],'
        '"x_groq":{"id":"req_01","usage":{"queue_time":0.02,"prompt_tokens":44,"prompt_time":0.004,'
        '"completion_tokens":7,"completion_time":0.009,"total_tokens":51}}}',
        [Finish("stop"), Usage(44, 7)],
    ),
]
OTHERS = [
    # Mistral: a list of parts
    ('{"choices":[{"index":0,"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"no"}]},'
     '{"type":"text","text":"a"},{"type":"text","text":"b"}]},"finish_reason":null}]}', ["ab"]),
    # the older completions
    ('{"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" old","finish_reason":null}]}', [" old"]),
    # more than one choice was asked for: the first is the answer
    ('{"choices":[{"index":1,"delta":{"content":"another"},"finish_reason":"stop"}]}', []),
    ('{"choices":[{"index":0,"delta":null,"finish_reason":null}]}', []),
    ('{"choices":[{"index":0}]}', []),
    ('{"choices":[{}]}', []),
    ('{"choices":null}', []),
    ("{}", []),
    ("", []),
    # members of types that nobody expects
    ('{"choices":[{"index":"0","delta":{"content":"a"},"finish_reason":0}]}', ["a"]),
    ('{"choices":[{"index":0,"delta":{"content":"a","reasoning":{}},"finish_reason":null}]}', ["a"]),
    ('{"choices":[{"index":0,"delta":{"content":5},"finish_reason":"stop"}]}', [Finish("stop")]),
    ('{"choices":{"0":1},"usage":{"prompt_tokens":1.5,"completion_tokens":"7"}}', [Usage(None, None)]),
    ('{"choices":[],"usage":{"prompt_tokens":-1,"completion_tokens":99999999999999999999}}', [Usage(None, None)]),
    ('{"choices":[7]}', []),
    ('{"choices":[],"error":null}', []),
    ('{"choices":[],"error":{}}', []),
    # bytes that are no UTF-8, and half of a pair
    (b'{"choices":[{"index":0,"delta":{"content":"a\xffb"},"finish_reason":null}]}', ["a\ufffdb"]),
    ('{"choices":[{"index":0,"delta":{"content":"a\\ud83d"},"finish_reason":null}]}', ["a\ufffd"]),
    ('{"choices":[{"index":0,"delta":{"content":"\\ud83d\\ude00"},"finish_reason":null}]}', ["😀"]),
    # errors by other names
    ('{"error":{"type":"rate_limit_error","code":"rate_limit_exceeded"}}',
     [Failure("backend_rate_limited", "rate_limit_error rate_limit_exceeded")]),
    ('{"error":{"type":"insufficient_quota"}}', [Failure("backend_rate_limited", "insufficient_quota")]),
    ('{"error":{"status":"RESOURCE_EXHAUSTED","code":429}}',
     [Failure("backend_rate_limited", "429 RESOURCE_EXHAUSTED")]),
    ('{"error":{"type":"engine_overloaded_error"}}', [Failure("backend_overloaded", "engine_overloaded_error")]),
    ('{"error":{"type":["x"],"code":99999999999}}', [Failure("backend_error", "")]),
    ('{"type":"error","message":"sk-secret"}', [Failure("backend_error", "error")]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), [*OPENAI, *AZURE, *OPENROUTER, *OLLAMA, *VLLM, *GROQ, *OTHERS])
def test_chunks(data: str | bytes, expected: list[Piece]) -> None:
    assert pieces(PLAIN.translate(event(data))) == expected
    assert [piece for piece in pieces(CURIOUS.translate(event(data))) if not isinstance(piece, Extra)] == expected


def test_a_piece_of_text_is_a_plain_string() -> None:
    assert PLAIN.translate(event(delta(content="a"))) == "a"
    assert CURIOUS.translate(event(delta(content="a"))) == "a"


def test_an_event_named_error_is_one() -> None:
    assert PLAIN.translate(event('{"message":"x","code":"overloaded"}', "error")) == Failure(
        "backend_overloaded", "overloaded"
    )
    assert PLAIN.translate(event('{"type":7,"code":8}', "error")) == Failure("backend_error", "8")


def test_no_message_of_an_error_is_repeated() -> None:
    for error in ('{"error":{"message":"sk-secret","param":"sk-secret"}}', '{"error":"sk-secret"}'):
        (failure,) = pieces(PLAIN.translate(event(error)))
        assert "secret" not in repr(failure)


@pytest.mark.parametrize("data", ["x", "[]", "null", "5", '"a"', '{"choices":', "[" * 100_000, '{"a":' * 100_000])
def test_what_is_malformed(data: str) -> None:
    for backend in (PLAIN, CURIOUS):
        with pytest.raises(ValueError):
            backend.translate(event(data))


KEYS = (
    *("choices", "delta", "content", "text", "index", "finish_reason", "usage", "prompt_tokens", "completion_tokens"),
    *("error", "type", "code", "tool_calls", "reasoning", "x_groq", "object"),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["stop", "error", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON | st.fixed_dictionaries({"choices": st.lists(JSON), "usage": JSON}) | st.binary())
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
            elif isinstance(piece, Extra):
                json.loads(piece.data)
                assert b"\n" not in piece.data


# Further events ------------------------------------------------------------------------------------------------------


def extras(backend: OpenAiBackend, data: str) -> list[tuple[str, Any]]:
    return [
        (one.name, json.loads(one.data)) for one in pieces(backend.translate(event(data))) if isinstance(one, Extra)
    ]


CALLS = [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}]


def test_further_events_when_they_are_wanted() -> None:
    for key in ("reasoning_content", "reasoning"):
        assert extras(CURIOUS, delta(content=None, **{key: "Hm"})) == [("reasoning", {"content": "Hm"})]
    assert extras(CURIOUS, delta(tool_calls=CALLS)) == [("tool_calls", CALLS)]
    assert extras(CURIOUS, delta(finish_reason="stop")) == [("finish", {"reason": "stop"})]
    usage = chunk(usage={"prompt_tokens": 3, "completion_tokens": 4})
    assert extras(CURIOUS, usage) == [("usage", {"input_tokens": 3, "output_tokens": 4})]


def test_text_comes_before_the_end_in_the_same_chunk() -> None:
    assert pieces(CURIOUS.translate(event(delta(content="a", finish_reason="stop")))) == [
        "a",
        Extra("finish", b'{"reason":"stop"}'),
        Finish("stop"),
    ]


def test_further_events_are_a_line_each() -> None:
    data = json.dumps(json.loads(delta(tool_calls=CALLS)), indent=1)
    (extra,) = pieces(CURIOUS.translate(event(data)))
    assert isinstance(extra, Extra)
    assert b"\n" not in extra.data
    assert json.loads(extra.data) == CALLS


def test_only_those_that_are_wanted() -> None:
    backend = OpenAiBackend("openai", Settings(events=("usage",)))
    assert extras(backend, delta(reasoning="Hm", tool_calls=CALLS, finish_reason="stop")) == []
    assert len(extras(backend, chunk(usage={"prompt_tokens": 3}))) == 1
    raw = OpenAiBackend("openai", Settings(events=("usage",), format="raw"))
    assert raw.raw
    assert extras(raw, chunk(usage={"prompt_tokens": 3})) == []


def test_format_text() -> None:
    assert OpenAiBackend("openai", Settings(format="text")).encode("a\nb") == b"data: a\ndata: b\n\n"
    assert PLAIN.encode("a") == b'data: {"content":"a"}\n\n'


# What is asked for ---------------------------------------------------------------------------------------------------


def test_a_prompt() -> None:
    request = PLAIN.request(handoff_of({"prompt": "Hello"}), "req-1", {})
    assert request.path == "/chat/completions"
    assert json.loads(request.body) == {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = dict(request.headers)
    assert headers.pop("user-agent").startswith("forkd/")
    assert headers == {
        "content-type": "application/json",
        "accept": "text/event-stream",
        "x-request-id": "req-1",
    }


def test_everything() -> None:
    backend = OpenAiBackend(
        "openai",
        Settings(api_key=Secret("sk-1"), default_model="d", usage=False, pass_through=("top_p", "tools", "seed")),
    )
    data = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [1]}, {"role": "user", "content": "b"}],
        "prompt": "ignored", "system": "s", "model": "m", "max_tokens": "5", "temperature": 0.5, "user_id": 7,
        "test_pattern": "slow ~!", "top_p": 0.25, "tools": [{"a": None}], "unknown": 1,
    }  # fmt: skip
    request = backend.request(handoff_of(data), "r", {})
    assert json.loads(request.body) == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, *data["messages"]],
        "stream": True,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.25,
        "tools": [{"a": None}],
    }
    headers = dict(request.headers)
    assert headers["authorization"] == "Bearer sk-1"
    assert headers["x-test-pattern"] == "slow ~!"


def test_models() -> None:
    backend = OpenAiBackend("openai", Settings(default_model="d", models=("m",)))
    wanted = [{"prompt": "a"}, {"model": ""}, {"model": "x"}]
    assert [backend.model(handoff_of(data).data) for data in wanted] == ["d", "d", "x"]
    assert [backend.label(model) for model in ("d", "m", "x")] == ["d", "m", "other"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({}, "no_prompt"),
        ({"prompt": ""}, "no_prompt"),
        ({"messages": []}, "no_prompt"),
        ({"messages": ["a"]}, "bad_handoff"),
        ({"messages": [{"role": "user", "content": "a"}, None]}, "bad_handoff"),
        ({"messages": [{"content": "a"}]}, "bad_handoff"),
        ({"messages": [{"role": 5}]}, "bad_handoff"),
        ({"prompt": "a", "test_pattern": ""}, "bad_handoff"),
        ({"prompt": "a", "test_pattern": "a\r\nX: y"}, "bad_handoff"),
        ({"prompt": "a", "test_pattern": "ü"}, "bad_handoff"),
        ({"prompt": "a", "test_pattern": "x" * 257}, "bad_handoff"),
        ({"prompt": "a", "max_tokens": 0}, "bad_handoff"),
        ({"prompt": "a", "temperature": "nan"}, "bad_handoff"),
        ({"prompt": "a", "temperature": "-inf"}, "bad_handoff"),
    ],
)
def test_handoffs_that_cannot_be_asked(data: dict[str, Any], code: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        PLAIN.request(handoff_of(data), "r", {})
    assert refusal.value.code == code


def test_depth_is_no_crash() -> None:
    """What a decoder just took may be too deep for an encoder that is called from further down."""
    for depth in range(900, 1000):
        raw = b'{"messages":[{"role":"user","content":' + b"[" * depth + b"]" * depth + b"}]}"
        handoff = handoff_of(raw)
        if handoff.fault is None:
            with contextlib.suppress(BadRequest):
                PLAIN.request(handoff, "r", {})


# Attachments ---------------------------------------------------------------------------------------------------------


def content(data: dict[str, Any], *names: str) -> Any:
    return asked_of(PLAIN, data, *names)["messages"][-1]["content"]


IMAGE_PART = {"type": "image_url", "image_url": {"url": IMAGE}}
PDF_PART = {"type": "file", "file": {"filename": "paper.pdf", "file_data": PDF}}


def test_attachments_in_a_prompt() -> None:
    assert content({"prompt": "Sum up {notes}, please: {other}"}, "notes") == f"Sum up {NOTES}, please: {{other}}"
    assert content({"prompt": "Sum up"}, "notes") == f"Sum up\n\n{NOTES}"
    assert content({"prompt": "{notes}"}, "notes") == NOTES
    assert content({"prompt": "See {pic} and {paper}."}, "pic", "paper") == [
        {"type": "text", "text": "See "},
        IMAGE_PART,
        {"type": "text", "text": " and "},
        PDF_PART,
        {"type": "text", "text": "."},
    ]
    assert content({"prompt": "See"}, "pic") == [{"type": "text", "text": "See"}, IMAGE_PART]
    assert content({"prompt": "{pic}"}, "pic") == [IMAGE_PART]
    assert content({"prompt": "See {pic}"}, "pic", "notes") == [
        {"type": "text", "text": "See "}, IMAGE_PART, {"type": "text", "text": NOTES},
    ]  # fmt: skip


def test_attachments_in_the_last_message_of_the_user() -> None:
    said = [{"role": "user", "content": "{notes}"}, {"role": "user", "content": "x{notes}"}]
    answered = [*said, {"role": "assistant", "content": "{notes}"}]
    asked = asked_of(PLAIN, {"messages": answered}, "notes")["messages"]
    assert [message["content"] for message in asked] == ["{notes}", f"x{NOTES}", "{notes}"]
    parts = [{"type": "text", "text": "See {pic}", "a": 1}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert content({"messages": [{"role": "user", "content": parts, "name": "me"}]}, "pic", "notes") == [
        {"type": "text", "text": "See "}, IMAGE_PART, parts[1], {"type": "text", "text": NOTES},
    ]  # fmt: skip
    for nothing in (None, "", [], 5):
        assert content({"messages": [{"role": "user", "content": nothing}]}, "pic") == [IMAGE_PART]
    with pytest.raises(BadRequest) as refusal:
        asked_of(PLAIN, {"messages": [{"role": "assistant", "content": "a"}]}, "notes")
    assert refusal.value.code == "bad_attachment"


def test_parts_without_a_placeholder_stay_as_they_are() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": ""}, 5]
    assert content({"messages": [{"role": "user", "content": parts}]}, "pic") == [parts[0], 5, IMAGE_PART]


def test_a_name_stands_for_its_file_once() -> None:
    """Else a short prompt could ask for a large file a thousand times over."""
    assert content({"prompt": "{notes}" * 1000}, "notes") == NOTES + "{notes}" * 999
    assert content({"prompt": "{a}{b}"}, "a", "b") == "{b}{a}", "what was put in is not looked through"


def test_large_texts() -> None:
    large = 'Grüße "\n☕\0' * 200_000
    for prompt, filled in (("{x}", large), ("a {x} b", f"a {large} b"), ("a", f"a\n\n{large}")):
        request = PLAIN.request(handoff_of({"prompt": prompt}), "r", attached(("x", "text/plain", large.encode())))
        assert json.loads(request.body)["messages"][0]["content"] == filled
    files = attached(("x", "text/plain", large.encode()), ("y", "image/png", b"y"))
    request = PLAIN.request(handoff_of({"prompt": "a"}), "r", files)
    assert json.loads(request.body)["messages"][0]["content"][0]["text"] == f"a\n\n{large}"


def test_names_are_no_patterns() -> None:
    assert content({"prompt": "{a.b} {axb}"}, "a.b") == f"{NOTES} {{axb}}"


def test_no_way_to_attach_it() -> None:
    with pytest.raises(BadRequest) as refusal:
        PLAIN.request(handoff_of({"prompt": "a"}), "r", attached(("x", "audio/wav", b"x")))
    assert refusal.value.code == "bad_attachment"
