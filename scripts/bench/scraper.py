"""Asks a daemon for its metrics as Prometheus would, but every second, while it is being measured."""

import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trial import TrialError

EVERY_SECS = 1.0
_WHERE = re.compile(r"metrics on (http://\S+)")


def metrics_url(log: Path) -> str:
    """Where forkd serves them, as its log says."""
    found = _WHERE.search(log.read_text(errors="replace"))
    if found is None:
        raise TrialError(f"{log} does not say where the metrics are")
    return found[1]


def scrape(url: str) -> None:
    """Ask once. TrialError if the answer was not one."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            if b"daemon_active_streams" not in answer.read():
                raise TrialError("a scrape without daemon_active_streams")
    except OSError as error:
        raise TrialError(f"a scrape failed: {error}") from error


@contextmanager
def scraping(url: str) -> Iterator[None]:
    """Ask every second until the block ends. TrialError if an answer was not one."""
    ended = threading.Event()
    faults: list[TrialError] = []

    def go_on() -> None:
        while not ended.wait(EVERY_SECS):
            try:
                scrape(url)
            except TrialError as error:
                faults.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if faults:
        raise faults[0]
