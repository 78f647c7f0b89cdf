"""What handlers are given and may yield."""

import datetime
from typing import Any

import pytest

from forkd.handler import Handoff, event


@pytest.mark.parametrize(
    ("data", "encoded"),
    [
        (None, b"null"),
        ({"a": [1, "x\ny", "☃"]}, '{"a":[1,"x\\ny","☃"]}'.encode()),
        ("text\r\n", b'"text\\r\\n"'),
        (datetime.date(2026, 1, 2), b'"2026-01-02"'),
    ],
)
def test_an_event_is_one_line_of_json(data: object, encoded: bytes) -> None:
    assert event("tool call", data).encoded == b"event: tool call\ndata: " + encoded + b"\n\n"


@pytest.mark.parametrize("name", ["", "two\nlines", "a\rb", "nul\0", "x" * 129, "done", "error"])
def test_names_that_no_event_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="event"):
        event(name)


@pytest.mark.parametrize(("name", "data"), [(7, None), ("ok", object()), ("ok", {"f": len})])
def test_what_cannot_be_sent(name: Any, data: object) -> None:
    with pytest.raises(TypeError):
        event(name, data)


def test_a_handoff_can_be_made_for_ones_own_tests() -> None:
    handoff = Handoff("r-1", "mine", prompt="Hello")
    assert (handoff.data, handoff.gone, handoff.request.headers) == ({}, False, {})
