"""Apache's own mod_proxy_fdpass hands over to forkd: no module of ours, the head from Apache, the body from forkd."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from harness import Apache, public_dir

from tests.harness import Forkd, running, wait_for
from tests.system.crowd import BACKENDS, WHOLE


def fdpass_conf(prefix: Path) -> str:
    """As docs/fdpass.md has it. mod_proxy takes no `fd:///absolute/path`, so the path goes up from the ServerRoot."""
    up = "fd://../.."
    return f"""
SetOutputFilter DEFLATE
ProxyPass "/chat" "{up}{prefix}/fdpass.sock"
ProxyPass "/still" "{up}{prefix}/still.sock"
ProxyPass "/nobody" "{up}{prefix}/nobody.sock"
<LocationMatch "^/(?:chat|still)$">
    Header set Content-Type "text/plain; charset=utf-8"
    Header set Cache-Control "no-cache"
    Header set X-Accel-Buffering "no"
    SetEnv no-gzip 1
</LocationMatch>
<Location "/chat">
    Require expr "%{{REQUEST_METHOD}} in {{ 'GET', 'POST' }}"
</Location>
"""


@pytest.fixture(scope="module", params=["prefork", "event", "worker"])
def site(request: pytest.FixtureRequest) -> Iterator[tuple[Apache, Forkd]]:
    with public_dir() as docroot, public_dir(0o777) as run, contextlib.ExitStack() as stack:
        own = {"protocol": "fdpass", "mode": "0666"}
        listeners = [
            {**own, "path": str(run / "fdpass.sock")},
            {**own, "path": str(run / "still.sock"), "backend": "still"},
        ]
        forkd = stack.enter_context(running(run, config={"listeners": listeners, "backends": BACKENDS}))
        apache = Apache(request.param, docroot, run, fdpass_conf(run), workers=2, modules=("proxy_fdpass",))
        yield stack.enter_context(apache), forkd


def test_the_head_is_apaches_and_the_body_forkds(site: tuple[Apache, Forkd]) -> None:
    apache, forkd = site
    with forkd.counting():
        for ask in (requests.get, requests.post):
            answer = ask(apache.url + "/chat?x=1", timeout=30)  # asks for gzip
            assert answer.status_code == 200
            assert answer.text == WHOLE
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            assert answer.headers["connection"] == "close"
            assert not {"content-length", "transfer-encoding", "content-encoding"} & {*map(str.lower, answer.headers)}
    assert "answered with defaults" not in forkd.log()


def test_apache_is_free_while_the_streams_last(site: tuple[Apache, Forkd]) -> None:
    """More streams than Apache has workers; and each token arrives when it is said."""
    apache, forkd = site
    clients = []
    for _ in range(5):
        client = socket.create_connection(("127.0.0.1", apache.port), 30)
        client.sendall(b"GET /still HTTP/1.1\r\nHost: localhost\r\n\r\n")
        clients.append(client)
    for client in clients:
        got = b""
        while not got.endswith(b"\r\n\r\nHello! "):
            got += client.recv(65536)
            assert got
    forkd.wait_for_metric("daemon_active_streams", 5)
    assert requests.get(apache.url + "/chat", timeout=30).text == WHOLE
    for client in clients:
        client.close()
    forkd.wait_for_metric("daemon_active_connections", 0)


def test_an_answer_that_is_not_whole_is_an_error_for_curl(site: tuple[Apache, Forkd]) -> None:
    apache, forkd = site
    command = ["curl", "-sN", "--max-time", "30", apache.url + "/still"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        assert curl.stdout.read(7) == b"Hello! "
        workers = forkd.workers()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        assert curl.stdout.read() == b""
    assert curl.returncode == 56  # failure in receiving network data
    wait_for(lambda: len(set(forkd.workers()) - set(workers)) == 2, "new workers")


def test_what_apache_answers_itself(site: tuple[Apache, Forkd]) -> None:
    apache, _ = site
    assert requests.get(apache.url + "/nobody", timeout=30).status_code == 500
    assert requests.get(apache.url + "/chat/below", timeout=30).status_code == 500
    assert requests.put(apache.url + "/chat", timeout=30).status_code == 403
    assert requests.head(apache.url + "/chat", timeout=30).status_code == 403
