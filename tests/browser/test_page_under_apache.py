"""The same page and its PHP endpoint under a real Apache with mod_socket_handoff, PHP and the real forkd."""

import json
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import requests
from playwright.sync_api import expect

from tests.apache.harness import ROOT, Apache, public_dir
from tests.browser.chat import TRANSPORTS, Chat
from tests.harness import PATIENCE_SECS, Answer, Forkd, running, wait_for

HTDOCS = ROOT / "apache" / "htdocs"
# What the typing backend repeats shows what arrived: text beyond ASCII, quotes, line ends, DEL, markup.
TRICKY = 'Grüße 😀 "quoted" \\back\\ \x7f <b>\r\n\ttab ${x} %41 \u2028 end'
CONFIG = {
    "server": {"socket_mode": "0666"},
    "default_backend": "typing",
    "backends": {"typing": {"provider": "typing", "token_delay_ms": 0}},
}


class Site(NamedTuple):
    url: str
    forkd: Forkd


@pytest.fixture(scope="module", params=["prefork", "event"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """prefork with mod_php, event with PHP-FPM."""
    with public_dir() as docroot, public_dir() as prefix, running(prefix, config=CONFIG) as forkd:
        shutil.copytree(HTDOCS, docroot, dirs_exist_ok=True)
        conf = f"SocketHandoffFormat envelope\nSetEnv FORKD_SOCKET {forkd.path}"
        with Apache(request.param, docroot, prefix, conf) as apache:
            yield Site(apache.url, forkd)


def post(site: Site, **how: object) -> Answer:
    response = requests.post(site.url + "/stream.php", timeout=PATIENCE_SECS, **how)  # type: ignore[arg-type]
    for name in response.headers:
        assert "handoff" not in name.lower()
    head = "".join(f"\r\n{name}: {value}" for name, value in response.headers.items())
    return Answer(f"HTTP/1.1 {response.status_code} x{head}\r\n\r\n".encode() + response.content)


# The page


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_answer_streams_into_the_page(chat: Chat, site: Site, transport: str) -> None:
    before = len(site.forkd.access_lines())
    chat.open(site.url, transport)
    turn = chat.ask("Grüße an alle, 100 % & more")
    turn.expect_answer("Grüße an alle, 100 % & more")
    chat.ask("Again").expect_answer("Again")
    lines = wait_for(lambda: site.forkd.access_lines()[before:][1:] and site.forkd.access_lines()[before:], "the lines")
    assert [(line["reason"], line["remote"]) for line in lines] == [("ok", "127.0.0.1")] * 2
    (cookie,) = chat.page.context.cookies()
    assert cookie["name"] == "visitor"
    assert [line["user_id"] for line in lines] == [cookie["value"]] * 2
    if transport == "fetch":
        expect(turn.stats).to_contain_text(f"request {lines[0]['request_id']}")


def test_a_refusal_of_the_endpoint_is_shown(chat: Chat, site: Site) -> None:
    chat.open(site.url)
    # The page never sends an empty prompt; somebody else's might.
    chat.page.route("**/stream.php", lambda route: route.continue_(post_data="prompt="))
    chat.ask("Hello?").expect_problem("Please enter a prompt", "no_prompt · HTTP 400")


@pytest.mark.parametrize("mpm", ["prefork", "event"])
def test_without_a_daemon(chat: Chat, mpm: str) -> None:
    with public_dir() as docroot, public_dir() as prefix:
        shutil.copytree(HTDOCS, docroot, dirs_exist_ok=True)
        with Apache(mpm, docroot, prefix, f"SetEnv FORKD_SOCKET {prefix}/none") as apache:
            chat.open(apache.url).ask("Hello?").expect_problem("daemon_unavailable · HTTP 503")
            chat.choose("EventSource")
            chat.ask("Hello?").expect_problem("The server refused the request")


# The endpoint


def test_whatever_is_asked_arrives(site: Site) -> None:
    answer = post(site, data={"prompt": TRICKY})
    assert answer.complete
    assert answer.text == TRICKY
    assert post(site, json={"prompt": TRICKY}).text == TRICKY
    response = requests.get(site.url + "/stream.php", params={"prompt": TRICKY}, timeout=PATIENCE_SECS)
    assert Answer(b"HTTP/1.1 200 OK\r\n\r\n" + response.content).text == TRICKY
    broken = post(site, data=b"prompt=a%ff%feb", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert broken.text == "a\ufffd\ufffdb"


@pytest.mark.parametrize("size", [6_000, 7_500, 20_000, 100_000])
def test_a_long_conversation_arrives(site: Site, size: int) -> None:
    """Below and above what a header may hold under PHP-FPM, and above what a message may hold."""
    prompt = "".join(f"{i:07x} " for i in range(size // 8)).strip()
    messages = [{"role": "user", "content": prompt}]
    assert post(site, data={"prompt": prompt, "messages": json.dumps(messages)}).text == prompt


def test_a_visitor_is_known_again(site: Site) -> None:
    with requests.Session() as session:
        for _ in range(2):
            response = session.post(site.url + "/stream.php", data={"prompt": "Hi"}, timeout=PATIENCE_SECS)
            assert response.status_code == 200
        assert "Set-Cookie" not in response.headers
        assert len(session.cookies["visitor"]) == 16


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        ({}, 400, "no_prompt"),
        ({"data": {"prompt": " \n"}}, 400, "no_prompt"),
        ({"data": {"prompt[]": "x"}}, 400, "no_prompt"),
        ({"json": {"prompt": 7}}, 400, "no_prompt"),
        ({"data": b"{", "headers": {"Content-Type": "application/json"}}, 400, "bad_request"),
        ({"data": b"7", "headers": {"Content-Type": "application/json"}}, 400, "bad_request"),
        ({"data": b"x", "headers": {"Content-Type": "text/plain"}}, 413, "payload_too_large"),
        ({"data": {"prompt": "Hi", "messages": "{"}}, 400, "bad_request"),
        ({"data": {"prompt": "Hi", "messages": "7"}}, 400, "bad_request"),
        ({"data": {"prompt": "Hi", "messages": '{"role":"user"}'}}, 400, "bad_request"),
        ({"data": {"prompt": "Hi", "messages": "[7]"}}, 400, "bad_request"),
        ({"data": {"prompt": "Hi", "messages": '["text"]'}}, 400, "bad_request"),
        ({"json": {"prompt": "Hi", "messages": [{"role": "system", "content": "x"}]}}, 400, "bad_request"),
        ({"json": {"prompt": "Hi", "messages": [{"role": "user", "content": 7}]}}, 400, "bad_request"),
    ],
    ids=repr,
)
def test_what_is_refused(site: Site, how: dict[str, object], status: int, code: str) -> None:
    answer = post(site, **how)
    assert answer.status == status
    assert answer.header("content-type") == "application/json"
    assert answer.header("cache-control") == "no-store"
    assert answer.json["code"] == code
    assert answer.json["error"]
    assert answer.json["request_id"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD"])
def test_other_methods_are_refused(site: Site, method: str) -> None:
    response = requests.request(method, site.url + "/stream.php", timeout=PATIENCE_SECS)
    assert response.status_code == 405
    assert response.headers["Allow"] == "GET, POST"
