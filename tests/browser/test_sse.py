"""The page's parser of Server-Sent Events (apache/htdocs/sse.js), in the browser that runs it."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page

from forkd.front_door import FrontDoor

# What a stream says, and the events that the HTML standard makes of it.
STREAMS: list[tuple[str, list[tuple[str, str]]]] = [
    ("data: one\n\n", [("message", "one")]),
    ("data:one\n\ndata:  two\n\n", [("message", "one"), ("message", " two")]),
    ("data: one\r\n\r\ndata: two\r\n\r\n", [("message", "one"), ("message", "two")]),
    ("data: one\r\rdata: two\r\r", [("message", "one"), ("message", "two")]),
    ("data: one\r\n\ndata: two\n\r\ndata: three\r\r\n", [("message", "one"), ("message", "two"), ("message", "three")]),
    ("data: a\ndata: b\ndata\ndata:\n\n", [("message", "a\nb\n\n")]),
    ("event: error\ndata: {}\n\ndata: next\n\n", [("error", "{}"), ("message", "next")]),
    ("event: nothing\n\ndata: x\n\n", [("message", "x")]),
    ("event: a\nevent: b\ndata: x\n\n", [("b", "x")]),
    (": comment\n:data: no\n\ndata: x\n: in between\n\n", [("message", "x")]),
    ("id: 7\nretry: 10\nunknown: y\nData: no\n data: no\ndata: x\n\n", [("message", "x")]),
    ("data\n\n", [("message", "")]),
    ("HTTP/1.1 502 Bad Gateway\r\nContent-Type: a\r\n\r\nevent: error\ndata: {}\n\n", [("error", "{}")]),
    ("data: cut off\n", []),
    ("data: cut off", []),
    ("", []),
    ("\ufeffdata: behind a mark\n\n", [("message", "behind a mark")]),
    ("data: grüße 😀 \u2028 \x00\n\n", [("message", "grüße 😀 \u2028 \x00")]),
]

CUT_IN_ALL_WAYS = """async ([bytes, ways]) => {
    const { events } = await import("/sse.js");
    const seen = [];
    for (const cuts of ways) {
        const body = new ReadableStream({
            start(to) {
                let from = 0;
                for (const cut of [...cuts, bytes.length]) {
                    to.enqueue(new Uint8Array(bytes.slice(from, cut)));
                    from = cut;
                }
                to.close();
            },
        });
        const found = [];
        for await (const { type, data } of events(body)) found.push([type, data]);
        seen.push(found);
    }
    return seen;
}"""

RANDOM_STREAMS = r"""async (seed) => {
    const { EventStreamParser } = await import("/sse.js");
    const random = (n) => ((seed = (Math.imul(seed, 1664525) + 1013904223) | 0) >>> 12) % n;
    const words = ["\r", "\n", "\r\n", "\n\n", ":", ": ", " ", "data", "data: ", "event", "event:x", "id", "ü😀", "x"];
    const simply = (text) => {
        const seen = [];
        let data = [], type = "";
        for (const line of text.split(/\r\n|\r|\n/).slice(0, -1)) {
            const [, field, value = ""] = /^([^:]*)(?:: ?([^]*))?$/.exec(line);
            if (line === "") {
                if (data.length) seen.push({ type: type || "message", data: data.join("\n") });
                data = [];
                type = "";
            } else if (field === "data") data.push(value);
            else if (field === "event") type = value;
        }
        return seen;
    };
    for (let i = 0; i < 5000; i++) {
        const text = Array.from({ length: random(30) }, () => words[random(words.length)]).join("");
        const parser = new EventStreamParser();
        const seen = [];
        for (let from = 0; from < text.length; ) {
            const to = from + random(4);
            seen.push(...parser.push(text.slice(from, to)));
            from = to;
        }
        if (JSON.stringify(seen) !== JSON.stringify(simply(text))) return [text, seen, simply(text)];
    }
    return null;
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    door = FrontDoor("127.0.0.1", 0, str(tmp_path_factory.mktemp("s") / "none"))
    door.start()
    yield door.url
    door.close()


@pytest.fixture
def open_page(page: Page, url: str) -> Page:
    page.goto(url)
    return page


@pytest.mark.parametrize(("stream", "expected"), STREAMS, ids=lambda value: repr(value[:30]))
def test_a_stream_cut_anywhere(open_page: Page, stream: str, expected: list[tuple[str, str]]) -> None:
    raw = list(stream.encode())
    every_byte = list(range(1, len(raw)))
    ways = [[], every_byte, every_byte[::2], *([cut] for cut in every_byte)]
    seen: Any = open_page.evaluate(CUT_IN_ALL_WAYS, [raw, ways])
    for cuts, found in zip(ways, seen, strict=True):
        assert [tuple(event) for event in found] == expected, f"cut at {cuts}"


def test_random_streams_cut_at_random(open_page: Page) -> None:
    assert open_page.evaluate(RANDOM_STREAMS, 20260) is None
