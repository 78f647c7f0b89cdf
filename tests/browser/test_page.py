"""The chat page in Chromium, behind the embedded front door: with the real forkd, or with one that a test plays."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from forkd.front_door import FrontDoor
from tests.browser.chat import TRANSPORTS, Chat
from tests.fake_daemon import HEAD, FakeDaemon, Handoff
from tests.harness import PATIENCE_SECS, Forkd, running, wait_for

DONE = b"data: [DONE]\n\nevent: done\ndata: {}\n\n"
TEXT = "Hello! I am forkd's mock backend. Each of these words comes to you as its own server-sent event."
ERROR = b'{"error":"The stream was interrupted","code":"worker_lost","request_id":"fake-1"}'
NEVER_MS = 3_600_000

both_transports = pytest.mark.parametrize("transport", TRANSPORTS)


def said(text: str) -> bytes:
    return b"data: %b\n\n" % json.dumps({"content": text}).encode()


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(stack: ExitStack, socket_path: str) -> FrontDoor:
    door = FrontDoor("127.0.0.1", 0, socket_path)
    door.start()
    stack.callback(door.close)
    return door


@pytest.fixture(scope="module")
def forkd(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Forkd:
    return stack.enter_context(running(tmp_path_factory.mktemp("forkd")))


@pytest.fixture(scope="module")
def url(stack: ExitStack, forkd: Forkd) -> str:
    """The page, answered by the real forkd."""
    return serve(stack, forkd.path).url


@pytest.fixture(scope="module")
def slow_forkd(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Forkd:
    """Says one word, and then nothing for an hour."""
    config = {"backends": {"mock": {"provider": "mock", "token_delay_ms": NEVER_MS}}}
    return stack.enter_context(running(tmp_path_factory.mktemp("slow"), config=config))


@pytest.fixture(scope="module")
def slow_url(stack: ExitStack, slow_forkd: Forkd) -> str:
    return serve(stack, slow_forkd.path).url


Play = Callable[..., str]
Scheme = Literal["light", "dark"]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """`play(script, …)` returns the URL of a page whose nth question is answered by the nth script."""
    with ExitStack() as stack:

        def play(*scripts: Callable[[Handoff], None]) -> str:
            waiting = list(scripts)

            def answer(handoff: Handoff) -> None:
                waiting.pop(0)(handoff)

            stack.enter_context(FakeDaemon(tmp_path / "s", answer))
            return serve(stack, str(tmp_path / "s")).url

        yield play


def script(*pieces: bytes, reset: bool = False) -> Callable[[Handoff], None]:
    def run(handoff: Handoff) -> None:
        for piece in pieces:
            handoff.say(piece)
        handoff.end(reset=reset)

    return run


# The whole way


@both_transports
def test_an_answer_streams_into_the_page(chat: Chat, url: str, forkd: Forkd, transport: str) -> None:
    before = len(forkd.access_lines())
    chat.page.goto(url)
    expect(chat.prompt).to_be_focused()
    expect(chat.send).to_be_disabled()
    chat.choose(transport)
    turn = chat.ask("What is a handoff?")
    turn.expect_answer(TEXT)
    expect(turn.question).to_have_text("What is a handoff?")
    expect(turn.stats).to_contain_text("first token ")
    expect(turn.stats).to_contain_text("18 chunks")
    expect(chat.status).to_have_text("The answer is complete")
    chat.ask("And again?").expect_answer(TEXT)
    lines = wait_for(lambda: forkd.access_lines()[before:][1:] and forkd.access_lines()[before:], "two access lines")
    assert [line["reason"] for line in lines] == ["ok", "ok"]
    if transport == "fetch":
        expect(turn.stats).to_contain_text(f"request {lines[0]['request_id']}")
    assert lines[0]["user_id"] == lines[1]["user_id"], "the cookie that came with the answer"


@both_transports
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_stopped(chat: Chat, slow_url: str, slow_forkd: Forkd, transport: str, how: str) -> None:
    before = len(slow_forkd.access_lines())
    turn = chat.open(slow_url, transport).ask("Tell me everything")
    expect(turn.answer).to_have_text("Hello! ")
    expect(chat.send).to_be_hidden()
    if how == "button":
        chat.stop.click()
    else:
        chat.prompt.press("Escape")
    turn.expect_problem("You stopped the answer.")
    expect(turn.answer).to_have_text("Hello! ")
    expect(turn.stats).to_contain_text("1 chunk")
    expect(chat.stop).to_be_hidden()
    expect(chat.prompt).to_be_focused()
    (line,) = wait_for(lambda: slow_forkd.access_lines()[before:], "forkd noticed")
    assert line["reason"] == "client_disconnected"


def test_one_question_at_a_time(chat: Chat, slow_url: str) -> None:
    turn = chat.open(slow_url).ask("First")
    expect(turn.answer).to_have_text("Hello! ")
    expect(chat.status).to_have_text("Waiting for the answer")
    assert turn.item.locator(".answer").get_attribute("aria-busy") == "true"
    chat.prompt.fill("Second")
    chat.prompt.press("Enter")
    expect(chat.prompt).to_have_value("Second")
    chat.stop.click()
    turn.expect_problem("You stopped")
    assert turn.item.locator(".answer").get_attribute("aria-busy") == "false"
    expect(chat.send).to_be_enabled()
    chat.send.click()
    expect(chat.log.get_by_role("listitem")).to_have_count(2)
    chat.stop.click()


@both_transports
def test_a_killed_worker(chat: Chat, tmp_path: Path, transport: str) -> None:
    config = {"workers": {"count": 1}, "backends": {"mock": {"provider": "mock", "token_delay_ms": NEVER_MS}}}
    with ExitStack() as stack:
        forkd = stack.enter_context(running(tmp_path, config=config))
        turn = chat.open(serve(stack, forkd.path).url, transport).ask("Tell me everything")
        expect(turn.answer).to_have_text("Hello! ")
        (worker,) = forkd.workers()
        os.kill(worker, signal.SIGKILL)
        turn.expect_problem("The stream was interrupted", "worker_lost")
        expect(turn.answer).to_have_text("Hello! ")


# What goes along


def test_the_conversation_goes_along(chat: Chat, play: Play) -> None:
    asked: list[Handoff] = []

    def answer(text: str) -> Callable[[Handoff], None]:
        def run(handoff: Handoff) -> None:
            asked.append(handoff)
            script(HEAD, said(text), DONE)(handoff)

        return run

    failing = script(HEAD, b"event: error\ndata: %b\n\n" % ERROR)
    chat.open(play(answer("Ho"), failing, answer("Great, 20 % & more"), answer("Bye")))
    chat.ask("Hi").expect_answer("Ho")
    chat.ask("Lost").expect_problem("interrupted")
    chat.ask("How are\nyou?").expect_answer("Great, 20 % & more")
    assert asked[0].data["prompt"] == "Hi"
    assert asked[0].data["messages"] == [{"role": "user", "content": "Hi"}]
    assert asked[1].data["prompt"] == "How are\nyou?"
    assert asked[1].data["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "How are\nyou?"},
    ]
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.log.get_by_role("listitem")).to_have_count(0)
    chat.ask("Who am I?").expect_answer("Bye")
    assert [message["content"] for message in asked[2].data["messages"]] == ["Who am I?"]


def test_eventsource_asks_by_address_and_only_what_fits(chat: Chat, play: Play) -> None:
    asked: list[str] = []

    def run(handoff: Handoff) -> None:
        asked.append(handoff.envelope["request"]["method"])
        assert handoff.data["prompt"] == "100 % ü & more?"
        script(HEAD, said("Yes"), DONE)(handoff)

    chat.open(play(run), "EventSource")
    chat.ask("ü" * 2000).expect_problem("too long for EventSource")
    chat.ask("100 % ü & more?").expect_answer("Yes")
    assert asked == ["GET"]


# What can go wrong


@both_transports
def test_without_a_daemon(chat: Chat, tmp_path: Path, transport: str) -> None:
    with ExitStack() as stack:
        turn = chat.open(serve(stack, str(tmp_path / "s")).url, transport).ask("Hello?")
        if transport == "fetch":
            turn.expect_problem(
                "The streaming service is not available", "daemon_unavailable · HTTP 503", "try again in 2 s"
            )
            expect(turn.stats).to_contain_text("request ")
        else:
            turn.expect_problem("The server refused the request", "fetch does")
        expect(chat.status).to_have_text(turn.problem.locator(".what").inner_text())


@both_transports
def test_without_a_server(chat: Chat, play: Play, transport: str) -> None:
    with ExitStack() as stack:
        chat.open(serve(stack, "/nowhere").url, transport)
    chat.ask("Hello?").expect_problem("The server could not be reached", "network")


@both_transports
@pytest.mark.parametrize(
    "before",
    [
        b"",
        said("half an "),
        said("half an ") + b'data: {"content":"ans\n',
        said("half an ") + b'data: {"content":"answer"}\n',
        said("half an ") + b"data: [DO\n",
        said("half an ") + b": comm\n",
        said("half an ") + b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/event-stream\r\n\r\n",
    ],
)
def test_an_error_event(chat: Chat, play: Play, transport: str, before: bytes) -> None:
    """Also behind an event that was cut, whose pieces are then the first lines of the error's data."""
    url = play(script(HEAD, before, b"event: error\ndata: %b\n\n" % ERROR))
    turn = chat.open(url, transport).ask("Hello?")
    turn.expect_problem("The stream was interrupted", "worker_lost")
    expect(turn.stats).to_contain_text("request fake-1")
    expect(turn.answer).to_have_text("half an " if before else "")


@both_transports
@pytest.mark.parametrize("reset", [False, True])
def test_a_stream_that_ends_without_its_end(chat: Chat, play: Play, transport: str, reset: bool) -> None:
    shown = Event()  # a reset may overtake what was sent before it

    def cut_off(handoff: Handoff) -> None:
        handoff.say(HEAD + b"retry: 1\n\n" + said("half an ") + b'data: {"content":"ans')
        shown.wait(PATIENCE_SECS)
        handoff.end(reset=reset)

    # "retry: 1": an EventSource that connects again does so at once, and would take the answer of the second question.
    chat.open(play(cut_off, script(HEAD, said("whole"), DONE)), transport)
    turn = chat.ask("Hello?")
    expect(turn.answer).to_have_text("half an ")
    shown.set()
    turn.expect_problem("The connection ended before the answer was complete.", "truncated")
    chat.ask("Again?").expect_answer("whole")
    expect(turn.answer).to_have_text("half an ")


def test_an_answer_that_is_no_stream(chat: Chat, play: Play) -> None:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<p>Sign in"
    chat.open(play(script(page))).ask("Hello?").expect_problem("not with a stream", "not_a_stream")


def test_an_error_without_json(chat: Chat, play: Play) -> None:
    page = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<p>Sorry"
    chat.open(play(script(page))).ask("Hello?").expect_problem("The server answered HTTP 500 Internal Server Error.")


@both_transports
def test_trying_again(chat: Chat, play: Play, transport: str) -> None:
    failing = script(HEAD, said("half"), b"event: error\ndata: %b\n\n" % ERROR)
    turn = chat.open(play(failing, script(HEAD, said("whole"), DONE)), transport).ask("Hello?")
    turn.expect_problem("interrupted")
    turn.retry.click()
    turn.expect_answer("whole")
    expect(chat.prompt).to_be_focused()
    expect(chat.log.get_by_role("listitem")).to_have_count(1)


# What comes in


@both_transports
def test_events_in_every_shape(chat: Chat, play: Play, transport: str) -> None:
    """A byte at a time, with every kind of line end, comments, the upstream's own events, and plain text."""
    stream = (
        b": keep-alive\n\n"
        + said("Grüße 😀 ")
        + b'data:{"content":"CRLF "}\r\n\r\n: comment\rdata: {"content":"CR "}\r\r'
        + b'id: 7\nevent: other\ndata: {"content":"not for us"}\n\n'
        + b'data: {"choices":[{"delta":{"content":"delta "}}]}\n\ndata: {"choices":[{"delta":{}}]}\n\n'
        + b"data: plain \ndata: text\n\n"
        + said("\n<img src=x onerror=alert(1)>")
        + DONE
    )
    pieces = [bytes((byte,)) for byte in HEAD + stream]
    turn = chat.open(play(script(*pieces)), transport).ask("Hello?")
    turn.expect_answer("Grüße 😀 CRLF CR delta plain \ntext\n<img src=x onerror=alert(1)>")


@both_transports
@pytest.mark.parametrize("ending", [b"data: [DONE]\n\n", b"event: done\ndata: {}\n\n"])
def test_either_ending_will_do(chat: Chat, play: Play, transport: str, ending: bytes) -> None:
    chat.open(play(script(HEAD, said("whole"), ending)), transport).ask("Hello?").expect_answer("whole")


def test_the_end_of_a_long_answer_stays_in_view(chat: Chat, play: Play) -> None:
    lines = [said(f"line {i}\n") for i in range(200)]
    turn = chat.open(play(script(HEAD, *lines, DONE))).ask("Count")
    expect(turn.stats).to_be_in_viewport()


# The composer


def test_keys(chat: Chat, url: str) -> None:
    chat.open(url)
    chat.prompt.press("Enter")
    chat.prompt.fill("  ")
    chat.prompt.press("Enter")
    expect(chat.send).to_be_disabled()
    expect(chat.log.get_by_role("listitem")).to_have_count(0)
    height = chat.prompt.bounding_box()
    chat.prompt.fill("")
    chat.prompt.press_sequentially("one")
    chat.prompt.press("Shift+Enter")
    chat.prompt.press_sequentially("two")
    grown = chat.prompt.bounding_box()
    assert height is not None
    assert grown is not None
    assert grown["height"] > height["height"]
    expect(chat.prompt).to_have_value("one\ntwo")
    chat.prompt.press("Enter")
    expect(chat.log.locator(".question .text")).to_have_text("one\ntwo")
    expect(chat.prompt).to_have_value("")


def test_an_example_is_a_question(chat: Chat, url: str) -> None:
    chat.open(url)
    example = chat.page.get_by_role("button", name="SCM_RIGHTS")
    text = example.inner_text()
    example.click()
    expect(chat.log.locator(".question .text")).to_have_text(text)
    expect(example).to_be_hidden()
    expect(chat.log.locator(".stats")).to_be_visible()


def test_the_transport_is_remembered(chat: Chat, url: str) -> None:
    chat.open(url, "EventSource")
    chat.page.reload()
    expect(chat.page.get_by_role("radio", name="EventSource")).to_be_checked()


def test_the_keyboard_reaches_everything(chat: Chat, url: str) -> None:
    chat.open(url)
    chat.prompt.fill("x")
    reached = []
    for _ in range(8):
        chat.page.keyboard.press("Tab")
        reached.append(
            chat.page.evaluate(
                "() => { const e = document.activeElement; return e.ariaLabel || e.value || e.innerText }"
            )
        )
    assert {"Send", "fetch", "New chat", "Write a haiku about file descriptors"} <= set(reached)


# Looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Browser, play: Play, scheme: Scheme) -> None:
    context = browser.new_context(
        viewport={"width": 320, "height": 640}, is_mobile=True, has_touch=True, color_scheme=scheme
    )
    try:
        chat = Chat(context.new_page())
        long_word = "https://example.com/" + "a" * 300
        failing = script(HEAD, said(long_word), b"event: error\ndata: %b\n\n" % ERROR)
        chat.open(play(script(HEAD, said(f"# Title\n{long_word}\n"), DONE), failing))
        chat.expect_no_sideways_scroll()
        chat.prompt.fill(long_word)
        chat.send.tap()
        expect(chat.log.locator(".stats").first).to_be_visible()
        chat.expect_no_sideways_scroll()
        chat.ask("And this?").expect_problem("interrupted")
        chat.expect_no_sideways_scroll()
        for control in (chat.send, chat.page.get_by_role("button", name="New chat")):
            box = control.bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) >= 44, "large enough for a thumb"
            assert box["x"] + box["width"] <= 320
    finally:
        context.close()


CONTRASTS = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => {
        const [r, g, b] = channels(color).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        const color = getComputedStyle(node).backgroundColor;
        return channels(color)[3] === 0 && node.parentElement ? ground(node.parentElement) : color;
    };
    const shown = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
        && [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim()));
    return shown.map((node) => {
        const [a, b] = [luminance(getComputedStyle(node).color), luminance(ground(node))];
        return [node.className || node.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page: Page, play: Play, scheme: Scheme) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    page.emulate_media(color_scheme=scheme)
    failing = script(HEAD, said("half"), b"event: error\ndata: %b\n\n" % ERROR)
    chat = Chat(page).open(play(script(HEAD, said("Yes"), DONE), failing))
    contrasts = page.evaluate(CONTRASTS)
    chat.ask("Hello?").expect_answer("Yes")
    chat.ask("Hello?").expect_problem("interrupted")
    contrasts += page.evaluate(CONTRASTS)
    assert len(contrasts) > 15
    assert [(name, contrast) for name, contrast in contrasts if contrast < 4.5] == []
