"""Server-Sent Events out: what we write is what a browser's parser reads."""

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.harness import Answer
from workers import sse

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXT))
def test_any_text_arrives(pieces: list[str]) -> None:
    answer = Answer(HEAD + b"".join(map(sse.content_event, pieces)) + sse.DONE)
    assert [json.loads(event.data)["content"] for event in answer.events[:-2]] == pieces
    assert answer.complete
    assert answer.error is None


@given(TEXT, TEXT, TEXT)
def test_any_error_arrives(code: str, message: str, request_id: str) -> None:
    answer = Answer(HEAD + sse.error_event(sse.error_body(code, message, request_id)))
    assert answer.error == {"error": message, "code": code, "request_id": request_id}
    assert not answer.complete


@given(TEXT)
def test_an_event_is_one_line_of_data_and_a_blank_one(text: str) -> None:
    event = sse.content_event(text)
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert b"\r" not in event


def test_a_heartbeat_is_no_event() -> None:
    answer = Answer(HEAD + sse.HEARTBEAT + sse.content_event("a") + sse.HEARTBEAT + sse.DONE)
    assert answer.text == "a"
    assert len(answer.events) == 3
