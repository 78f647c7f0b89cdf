"""Measures how long a token takes through the module's relay: from the daemon's write to the client that has it.

For HTTPS by HTTP/1.1 (prefork, event) and HTTP/2 (event), with a client in Python, curl and headless Chromium. The
daemon is a script that says a token every 20 ms; all is on this machine, so one clock serves both ends.

    .venv/bin/python scripts/relay_latency.py [--tokens 200]
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "apache")]

from handoff_site import make_docroot  # noqa: E402
from harness import public_dir  # noqa: E402
from playwright.sync_api import Browser, sync_playwright  # noqa: E402
from receiver import Receiver  # noqa: E402
from secure import Http1, Http2, SecureSite, curl, query, secure_site  # noqa: E402

CONF = "SocketHandoffFormat envelope\nSocketHandoffFallback relay"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVERY_SECS = 0.02
READ = """async target => {
    const reader = (await fetch(target)).body.getReader();
    const seen = [];
    for (let next = await reader.read(); !next.done; next = await reader.read())
        seen.push([next.value.length, performance.timeOrigin + performance.now()]);
    return seen;
}"""


class Tokens:
    """What the daemon said and when, and when how much of it had arrived."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.events = [b"data: token %06d\n\n" % number for number in range(count)]
        self.said: list[float] = []
        self.arrived: list[tuple[float, int]] = []

    def say(self, daemon: Receiver) -> None:
        """Answer the next handoff."""
        with daemon.get().client as client:
            client.sendall(HEAD)
            for event in self.events:
                time.sleep(EVERY_SECS)
                self.said.append(time.time())
                client.sendall(event)
            client.shutdown(socket.SHUT_WR)
            client.recv(1)

    def delays_ms(self) -> list[float]:
        """For each token the time until its last byte had arrived, sorted."""
        delays, arrivals, total = [], iter(self.arrived), 0
        at, needed = 0.0, 0
        for said, event in zip(self.said, self.events, strict=True):
            needed += len(event)
            while total < needed:
                at, length = next(arrivals)
                total += length
            delays.append(1000 * (at - said))
        return sorted(delays)


def by_python(kind: type[Http1] | type[Http2]) -> Callable[[SecureSite, Receiver, Tokens], None]:
    """The tests' own client."""

    def run(site: SecureSite, daemon: Receiver, tokens: Tokens) -> None:
        answer = kind(site, query("/handoff.php", path=site.sock))
        with in_thread(tokens, daemon):
            while piece := answer.read():
                tokens.arrived.append((time.time(), len(piece)))
        answer.close()

    return run


def by_curl(option: str) -> Callable[[SecureSite, Receiver, Tokens], None]:
    """curl, read through a pipe."""

    def run(site: SecureSite, daemon: Receiver, tokens: Tokens) -> None:
        command = curl(site, query("/handoff.php", path=site.sock), option)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process, in_thread(tokens, daemon):
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 65536):
                tokens.arrived.append((time.time(), len(piece)))

    return run


def by_chromium(browser: Browser) -> Callable[[SecureSite, Receiver, Tokens], None]:
    """fetch() in a page."""

    def run(site: SecureSite, daemon: Receiver, tokens: Tokens) -> None:
        context = browser.new_context(ignore_https_errors=True)
        page = context.new_page()
        page.goto(site.url + "/plain.html")
        with in_thread(tokens, daemon):
            seen = page.evaluate(READ, query("/handoff.php", path=site.sock))
        tokens.arrived = [(at / 1000, length) for length, at in seen]
        context.close()

    return run


@contextlib.contextmanager
def in_thread(tokens: Tokens, daemon: Receiver) -> Iterator[None]:
    """The daemon says its tokens beside what is inside."""
    thread = threading.Thread(target=tokens.say, args=(daemon,))
    thread.start()
    yield
    thread.join()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200, help="how many (200)")
    count = parser.parse_args().tokens
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    print(
        f"{count} tokens, {1000 * EVERY_SECS:g} ms apart; ms from the daemon's write to the client: p50, p99, slowest"
    )
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        ways = [("HTTP/1.1", "Python", by_python(Http1)), ("HTTP/1.1", "curl", by_curl("--http1.1"))]
        h2 = [("HTTP/2", "Python", by_python(Http2)), ("HTTP/2", "curl", by_curl("--http2"))]
        for mpm, protocol in (("prefork", "HTTP/1.1"), ("event", "HTTP/2")):
            clients = [*ways, *(h2 if mpm == "event" else []), (protocol, "Chromium", by_chromium(browser))]
            with public_dir() as docroot, public_dir() as prefix:
                make_docroot(docroot)
                with secure_site(mpm, docroot, prefix, CONF) as site, Receiver(site.sock, answer=False) as daemon:
                    for spoken, client, run in clients:
                        tokens = Tokens(count)
                        run(site, daemon, tokens)
                        delays = tokens.delays_ms()
                        p50, p99 = delays[len(delays) // 2], delays[len(delays) * 99 // 100]
                        print(f"{mpm:8} {spoken:8} {client:8} {p50:8.2f} {p99:8.2f} {delays[-1]:8.2f}", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
