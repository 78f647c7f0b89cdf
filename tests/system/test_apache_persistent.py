"""SocketHandoffPersistent with the real forkd, which reloads, upgrades and restarts meanwhile."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator

import requests
from handoff_site import make_docroot
from harness import Apache, public_dir

from tests.harness import Answer, Forkd, wait_for
from tests.system.succession import daemon, reload, upgrade

CONF = "SocketHandoffFormat envelope\nSocketHandoffPersistent On\nSocketHandoffMaxRetries {retries}\n"


class Asking:
    """Browsers that ask again and again, each request under a name of its own."""

    def __init__(self, url: str, path: str, threads: int = 4) -> None:
        self._url, self._path = url, path
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]
        self.statuses: dict[str, int] = {}
        """By the request's name."""
        self.faults: list[str] = []

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def more(self, count: int) -> None:
        """Wait until so many more requests are answered."""
        wanted = len(self.statuses) + count
        wait_for(lambda: len(self.statuses) >= wanted or self.faults, "more answers")

    def _run(self, number: int) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            name = f"{number}-{count}"
            try:
                self._ask(name)
            except Exception as error:  # whatever it is, a request was lost
                self.faults.append(f"{name}: {error}")

    def _ask(self, name: str) -> None:
        data = json.dumps({"prompt": name, "request_id": name})
        parameters = {"path": self._path, "source": "body", "data": data}
        response = requests.get(self._url + "/handoff.php", params=parameters, timeout=30)
        if response.status_code == 200:
            answer = Answer(b"HTTP/1.1 200 OK\r\n\r\n" + response.content)
            if not answer.complete or answer.text != name:
                self.faults.append(f"{name}: {response.text}")
        self.statuses[name] = response.status_code


@contextlib.contextmanager
def site(retries: int = 2) -> Iterator[tuple[Apache, Forkd]]:
    with public_dir() as docroot, public_dir(0o777) as run:
        make_docroot(docroot)
        config = {
            "server": {"socket_mode": "0666"},
            "backends": {"typing": {"provider": "typing", "token_delay_ms": 0}},
        }
        with (
            daemon(run, default_backend="typing", logging={"access": True}, **config) as forkd,
            Apache("event", docroot, run, CONF.format(retries=retries)) as apache,
        ):
            yield apache, forkd


def streamed(forkd: Forkd) -> Counter[str]:
    """How often each request was streamed, by what forkd logged."""
    return Counter(line["request_id"] for line in forkd.access_lines() if line["reason"] == "ok")


def test_reloads_and_upgrades_lose_and_double_nothing() -> None:
    with site() as (apache, forkd):
        with Asking(apache.url, forkd.path) as asking:
            asking.more(20)
            for change in (reload, upgrade, reload, upgrade):
                change(forkd)
                asking.more(20)
        assert not asking.faults
        assert set(asking.statuses.values()) == {200}
        expected = Counter(dict.fromkeys(asking.statuses, 1))
        wait_for(lambda: streamed(forkd) == expected, "each was streamed once")


def test_restarts_lose_and_double_nothing() -> None:
    """Without a daemon the answer is 503; who was given a 200 was streamed to, once, and nobody else was."""
    with site(retries=0) as (apache, forkd):
        with Asking(apache.url, forkd.path) as asking:
            for _ in range(3):
                asking.more(20)
                assert forkd.stop() == 0
                asking.more(5)
                ready = forkd.log().count(" ready (pid")
                forkd.start(ready=False)
                wait_for(lambda ready=ready: forkd.log().count(" ready (pid") == ready + 2, "it is ready")
            asking.more(20)
        assert not asking.faults
        assert set(asking.statuses.values()) == {200, 503}
        expected = Counter(name for name, status in asking.statuses.items() if status == 200)
        wait_for(lambda: streamed(forkd) == expected, "each was streamed once")
