"""Server-Sent Events: what we read is what the standard says, and what we write is what a browser's parser reads."""

import itertools
import json
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.harness import Answer
from workers import sse
from workers.sse import Event, EventTooLarge, Parser

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
TEXT = st.text(st.characters(exclude_categories=["Cs"]))

# In ------------------------------------------------------------------------------------------------------------------


def by_the_book(body: bytes) -> list[tuple[str, bytes]]:
    """The standard's algorithm, word for word (9.2.6, "Interpreting an event stream"), all at once."""
    events = []
    name, data = b"", b""
    for line in lines_of(body.removeprefix(b"\xef\xbb\xbf")):
        if not line:
            if data:
                events.append((name.decode(errors="replace"), data[:-1]))
            name, data = b"", b""
        elif not line.startswith(b":"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                name = value
            elif field == b"data":
                data += value + b"\n"
    return events


def lines_of(body: bytes) -> Iterator[bytes]:
    """Every line that has an end."""
    line = b""
    at = 0
    while at < len(body):
        char = body[at : at + 1]
        at += 1
        if char == b"\r" and body[at : at + 1] == b"\n":
            at += 1
        if char in b"\r\n":
            yield line
            line = b""
        else:
            line += char


def told(events: list[Event]) -> list[tuple[str, bytes]]:
    return [(event.name, event.data) for event in events]


def fed(pieces: list[bytes], parser: Parser | None = None) -> list[Event]:
    parser = parser or Parser()
    return [event for piece in pieces for event in parser.feed(piece)]


def split(body: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[a:b] for a, b in itertools.pairwise(places)]


FIELDS = [b"data", b"data:", b"data: ", b"event:", b"event: ", b": ", b"id: 7", b"retry: 5", b"datax: ", b" data: "]
VALUES = [b"x", b"{}", "ü😀".encode(), b"\0", b"\xff", b"\xef\xbb\xbf", b":"]
ENDS = [b"\n", b"\n\n", b"\n\n", b"\r\n", b"\r\n\r\n", b"\r", b"\r\r"]
SPELLED = st.lists(st.sampled_from(FIELDS) | st.sampled_from(VALUES) | st.sampled_from(ENDS)).map(b"".join)
CUTS = st.lists(st.integers(0, 1 << 16), max_size=12)


@given(SPELLED, CUTS)
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", list(range(30)))
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2, 3])
@example(b"data: a\n\r\n", [8])
def test_any_split_gives_the_events_of_the_standard(body: bytes, cuts: list[int]) -> None:
    events = fed(split(body, cuts))
    assert told(events) == by_the_book(body)
    for event in events:
        assert by_the_book(event.raw) == [(event.name, event.data)]


@given(st.binary(), CUTS)
def test_any_bytes(body: bytes, cuts: list[int]) -> None:
    assert told(fed(split(body, cuts))) == by_the_book(body)


@given(SPELLED, CUTS, st.integers(1, 40))
def test_an_event_over_the_limit_is_refused_and_no_other(body: bytes, cuts: list[int], limit: int) -> None:
    parser = Parser(limit)
    events: list[Event] = []
    longest = max((len(raw) for raw in blocks_of(body.removeprefix(b"\xef\xbb\xbf"))), default=0)
    try:
        for piece in split(body, cuts):
            events += parser.feed(piece)
    except EventTooLarge:
        assert longest + 1 > limit  # an LF that comes late counts to the next event
        assert told(events) == by_the_book(body)[: len(events)]
    else:
        assert longest <= limit
        assert told(events) == by_the_book(body)


def blocks_of(body: bytes) -> Iterator[bytes]:
    """What is between two ends of a block, these included; the last may lack its end."""
    while body:
        match = sse._BLOCK_END.search(body)
        end = match.end() if match else len(body)
        yield body[:end]
        body = body[end:]


@pytest.mark.parametrize(
    ("body", "events"),
    [
        # the standard's own examples
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("", b"YHOO\n+2\n10")]),
        (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
         [("", b"first event"), ("", b"second event"), ("", b" third event")]),
        (b"data\n\ndata\ndata\n\ndata:", [("", b""), ("", b"\n")]),
        (b"data:test\n\ndata: test\n\n", [("", b"test"), ("", b"test")]),
        (b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\ndata: x\n\n",
         [("add", b"73857293"), ("remove", b"2153"), ("", b"x")]),
        # what real APIs send
        (b": OPENROUTER PROCESSING\n\ndata: {}\n\n", [("", b"{}")]),
        (b": OPENROUTER PROCESSING\ndata: {}\n\n", [("", b"{}")]),
        (b"event: ping\n\ndata: x\n\n", [("", b"x")]),
        (b"event: ping\nevent:\ndata: x\n\n", [("", b"x")]),
        (b"event: messages\r\ndata: []\r\nid: 3\r\n\r\n", [("messages", b"[]")]),
        (b"data: [DONE]\n\n", [("", b"[DONE]")]),
        (b"data: [DONE]", []),
        (b"data: [DONE]\n", []),
        ("event: ü\ndata: ü\n\n".encode(), [("ü", "ü".encode())]),
        (b"event: \xff\ndata: \xff\n\n", [("\ufffd", b"\xff")]),
        (b"data: a\rb\n\n", [("", b"a")]),
        (b"", []),
    ],
)  # fmt: skip
def test_events(body: bytes, events: list[tuple[str, bytes]]) -> None:
    assert told(fed([body])) == events
    assert told(fed([b"\n", body])) == events, "not at the beginning"
    assert told(fed([body[at : at + 1] for at in range(len(body))])) == events
    assert by_the_book(body) == events


def test_raw_is_the_events_own_bytes() -> None:
    body = b"\xef\xbb\xbfdata: a\n\n: note\ndata: b\r\n\r\n\revent: c\rdata: c\r\rdata: d"
    assert [event.raw for event in fed([body])] == [
        b"data: a\n\n",
        b": note\ndata: b\r\n\r\n",
        b"\revent: c\rdata: c\r\r",
    ]


def test_an_event_is_given_out_at_its_last_byte() -> None:
    for body in (b"data: a\n\n", b"data: a\r\n\r", b"data: a\r\r", b"event: x\ndata: a\n\n"):
        parser = Parser()
        assert fed([body[:-1]], parser) == []
        assert [event.data for event in fed([body[-1:]], parser)] == [b"a"]


@pytest.mark.parametrize("line", [b"data: x", b"data: x\n", b"data: x\r\n", b": comment\n"])
def test_an_endless_event_ends_at_the_limit(line: bytes) -> None:
    parser = Parser(100_000)
    pieces = 0

    def feed_on() -> None:
        nonlocal pieces
        while pieces < 1000:
            parser.feed(line * 1000)
            pieces += 1

    with pytest.raises(EventTooLarge):
        feed_on()
    assert len(line) * 1000 * pieces <= 100_000


def test_a_large_event_in_one_piece_is_refused_too() -> None:
    for end in (b"\n\n", b"\r\n\r\n", b"\r\n\n", b""):
        parser = Parser(1000)
        parser.feed(b"data: a\n\n")
        with pytest.raises(EventTooLarge):
            parser.feed(b"data: " + b"x" * 1000 + end)


def test_ten_megabytes_are_too_many() -> None:
    parser = Parser()
    piece = b"x" * 65536
    with pytest.raises(EventTooLarge):
        fed([b"data: ", *[piece] * 160], parser)


@pytest.mark.parametrize("line", [b"x" * 10, b"data: x\r\n", b"data: abcd\n", b"\rdata:xxx"])
def test_a_trickle_costs_what_its_bytes_cost(line: bytes) -> None:
    """Twice the bytes, twice the time; a parser that began anew with each piece would take minutes for these."""
    parser = Parser(1 << 30)
    parser.feed(b"data: ")
    started = time.process_time()
    for _ in range(300_000):
        parser.feed(line)
    assert len(parser.feed(b"\n\n")) == 1
    assert time.process_time() - started < 20


def test_many_events_in_one_piece_cost_what_their_bytes_cost() -> None:
    started = time.process_time()
    assert len(Parser(1 << 30).feed(b"data: x\n\n" * 300_000)) == 300_000
    assert len(Parser(1 << 30).feed(b"\n" * 3_000_000)) == 0
    assert time.process_time() - started < 20


# Out -----------------------------------------------------------------------------------------------------------------


@given(st.lists(TEXT))
def test_any_text_arrives(pieces: list[str]) -> None:
    answer = Answer(HEAD + b"".join(map(sse.content_event, pieces)) + sse.DONE)
    assert [json.loads(event.data)["content"] for event in answer.events[:-2]] == pieces
    assert answer.complete
    assert answer.error is None


@given(st.lists(TEXT))
@example(["a\n", "\r\n", "", "\n\n", "a\rb", " a", "data: x"])
def test_any_plain_text_arrives(pieces: list[str]) -> None:
    """A receiver joins lines by LF: that is all that is lost."""
    events = fed(list(map(sse.text_event, pieces)))
    assert [event.data.decode() for event in events] == [
        piece.replace("\r\n", "\n").replace("\r", "\n") for piece in pieces
    ]


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


def test_named_events() -> None:
    event = sse.named_event("usage", b'{"input_tokens":1}')
    assert event == b'event: usage\ndata: {"input_tokens":1}\n\n'
    assert told(fed([event])) == [("usage", b'{"input_tokens":1}')]


def test_a_heartbeat_is_no_event() -> None:
    answer = Answer(HEAD + sse.HEARTBEAT + sse.content_event("a") + sse.HEARTBEAT + sse.DONE)
    assert answer.text == "a"
    assert len(answer.events) == 3
