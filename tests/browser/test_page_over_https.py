"""Chromium over Apache's own HTTPS: HTTP/1.1 under prefork, HTTP/2 under event. Both are relayed, token by token."""

import shutil
import socket
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.apache.handoff_site import make_docroot
from tests.apache.harness import ROOT, public_dir
from tests.apache.receiver import Receiver
from tests.apache.secure import SecureSite, query, secure_site
from tests.browser.chat import TRANSPORTS, Chat
from tests.harness import running

CONF = "SocketHandoffFormat envelope\nSocketHandoffFallback relay\nSetEnv FORKD_SOCKET {prefix}/forkd.sock"
CONFIG = {
    "server": {"socket_mode": "0666"},
    "default_backend": "typing",
    "backends": {"typing": {"provider": "typing", "token_delay_ms": 0}},
}
READ = """target => {
    window.got = '';
    window.ended = '';
    (async () => {
        const reader = (await fetch(target)).body.pipeThrough(new TextDecoderStream()).getReader();
        for (let next = await reader.read(); !next.done; next = await reader.read()) window.got += next.value;
    })().then(() => { window.ended = 'whole'; }, () => { window.ended = 'broken'; });
}"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.fixture(scope="module", params=["prefork", "event"])
def site(request: pytest.FixtureRequest) -> Iterator[SecureSite]:
    with public_dir() as docroot, public_dir(0o777) as prefix:
        shutil.copytree(ROOT / "apache" / "htdocs", docroot, dirs_exist_ok=True)
        make_docroot(docroot)
        with (
            running(prefix, config=CONFIG),
            secure_site(request.param, docroot, prefix, CONF.format(prefix=prefix)) as secure,
        ):
            yield secure


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """One that trusts the site's certificate, whose authority is as old as this test."""
    context = browser.new_context(ignore_https_errors=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    yield page
    context.close()


def spoken(page: Page) -> str:
    """The protocol by which the page came."""
    return str(page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol"))


def test_token_by_token(page: Page, site: SecureSite) -> None:
    """Each token is on the page before the next one is said; then the end, and an answer that is cut."""
    with Receiver(site.sock, answer=False) as daemon:
        page.goto(site.url + "/plain.html")
        assert spoken(page) == ("http/1.1" if site.apache.mpm == "prefork" else "h2")
        for ending in ("whole", "broken"):
            page.evaluate(READ, query("/handoff.php", path=site.sock))
            client = daemon.get().client
            client.sendall(HEAD)
            for number in range(10):
                client.sendall(f"data: token {number}\n\n".encode())
                page.wait_for_function("end => window.got.endsWith(end)", arg=f"token {number}\n\n")
            if ending == "whole":
                client.shutdown(socket.SHUT_WR)
                page.wait_for_function("window.ended")
            client.close()
            page.wait_for_function("window.ended")
            assert page.evaluate("window.ended") == ending


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_chat_page(page: Page, site: SecureSite, transport: str) -> None:
    chat = Chat(page)
    chat.open(site.url, transport)
    chat.ask("Grüße an alle").expect_answer("Grüße an alle")
    chat.ask("Again").expect_answer("Again")
