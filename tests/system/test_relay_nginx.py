"""The relay through Debian's nginx, a proxy whose HTTP/2 and TLS are none of ours, in front of the fake API."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake_api import Certificates, text
from tests.harness import read_answer, read_answers, reset, wait_for
from tests.system.relaying import Relay, relaying, settled

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
CONFIG = """
daemon off;
worker_processes 1;
{user}
pid {directory}/pid;
error_log {directory}/error.log info;
events {{ worker_connections 2048; }}
http {{
    log_format streams '$connection $server_protocol $status';
    access_log {directory}/access.log streams;
    client_body_temp_path {directory}/client_body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi;
    uwsgi_temp_path {directory}/uwsgi;
    upstream api {{ server 127.0.0.1:{api_port}; keepalive 16; }}
    server {{
        listen 127.0.0.1:{port} ssl{http2} backlog=4096;
        ssl_certificate {certificate};
        ssl_certificate_key {certificate};
        client_max_body_size 64m;
        {more}
        location / {{
            proxy_pass http://api;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 60s;
        }}
    }}
}}
"""


@dataclass
class Nginx:
    """A running one. `directory` has all that it writes."""

    directory: Path
    process: "subprocess.Popen[bytes]"

    def requests(self) -> list[list[str]]:
        """For each request that has ended: the number of its connection, its protocol and its status."""
        return [line.split(" ") for line in (self.directory / "access.log").read_text().splitlines()]

    def connections(self) -> int:
        """On how many connections they came."""
        return len({number for number, _, _ in self.requests()})

    def workers(self) -> set[int]:
        return {child.pid for child in psutil.Process(self.process.pid).children()}

    def reload(self) -> None:
        """Read the configuration again: a new worker takes over, the old one ends with its last connection."""
        old = self.workers()
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.workers() - old, "nginx's new worker")
        wait_for(
            lambda: "gracefully shutting down" in (self.directory / "error.log").read_text(), "the old one's leave"
        )


@contextlib.contextmanager
def proxying(directory: Path, api_port: int, *, http2: bool, more: str) -> Iterator[tuple[Nginx, str, str]]:
    """An nginx in front of that port; its base URL and the authority to trust."""
    assert NGINX is not None
    directory.mkdir()
    certificates = Certificates(directory)
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(
        CONFIG.format(
            user="user root;" if os.geteuid() == 0 else "",
            directory=directory,
            api_port=api_port,
            port=port,
            http2=" http2" if http2 else "",
            certificate=certificates.server(),
            more=more,
        )
    )
    with open(directory / "output", "wb") as output:
        process = subprocess.Popen(
            [NGINX, "-e", str(directory / "error.log"), "-p", str(directory), "-c", str(config)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: process.poll() is not None or listens(port), "nginx's listener")
        assert process.poll() is None, (directory / "output").read_text()
        yield Nginx(directory, process), f"https://127.0.0.1:{port}/v1", str(certificates.ca_file)
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def relaying_through_nginx(
    directory: Path, *, http2: bool = True, more: str = "", **own: Any
) -> Iterator[tuple[Relay, Nginx]]:
    """A fake API, an nginx with `more` in its configuration before it, and a forkd before that."""
    api_port = free_port()
    with (
        proxying(directory / "nginx", api_port, http2=http2, more=more) as (nginx, base, ca_file),
        relaying(directory, api={"port": api_port}, **{"api_base": base, "ca_file": ca_file, **own}) as relay,
    ):
        yield relay, nginx


@pytest.mark.parametrize(("http2", "protocol"), [(True, "HTTP/2.0"), (False, "HTTP/1.1")])
def test_answers_arrive_whole_on_one_connection(tmp_path: Path, http2: bool, protocol: str) -> None:
    with relaying_through_nginx(tmp_path, http2=http2) as (relay, nginx):
        for number in range(5):
            answer = relay.ask("ok words=200")
            assert answer.complete, answer
            assert answer.text == text(200)
            wait_for(lambda wanted=number + 1: len(nginx.requests()) == wanted, "nginx's access line")
        assert {(said, status) for _, said, status in nginx.requests()} == {(protocol, "200")}
        assert nginx.connections() == 1
        settled(relay)


def test_more_streams_than_one_connection_takes(tmp_path: Path) -> None:
    with relaying_through_nginx(tmp_path) as (relay, nginx):  # http2_max_concurrent_streams is 128
        clients = [relay.begin("gate-body words=20") for _ in range(150)]
        relay.api.wait_for(lambda api: len(api.requests) == 150, "every request")
        relay.api.gate.open()
        for answer in read_answers(clients):
            assert answer.complete, answer
            assert answer.text == text(20)
        wait_for(lambda: len(nginx.requests()) == 150, "nginx's access lines")
        assert {(said, status) for _, said, status in nginx.requests()} == {("HTTP/2.0", "200")}
        assert nginx.connections() == 2
        settled(relay)


@pytest.mark.parametrize("pattern", ["gate-headers", "gate-tokens"])
@pytest.mark.parametrize("http2", [True, False])
def test_a_client_that_goes_ends_its_request_at_the_api(tmp_path: Path, http2: bool, pattern: str) -> None:
    with relaying_through_nginx(tmp_path, http2=http2) as (relay, _):
        stays, goes = relay.begin("gate-tokens words=5"), relay.begin(pattern)
        relay.api.wait_for(lambda api: len(api.requests) == 2 and api.gate.waiting == 2, "both requests")
        gone = next(seen for seen in relay.api.requests if seen.pattern == pattern)
        reset(goes)
        relay.api.wait_for(lambda api: any(seen.cancelled_at for seen in api.requests), "the cancellation")
        if pattern != "gate-tokens":
            assert gone.cancelled_at
        relay.api.gate.open()
        assert read_answer(stays).complete
        settled(relay)


def test_a_reload_loses_no_stream(tmp_path: Path) -> None:
    with relaying_through_nginx(tmp_path, retries=0) as (relay, nginx):
        old = nginx.workers()
        clients = [relay.begin("gate-tokens words=3") for _ in range(20)]
        relay.api.wait_for(lambda api: len(api.requests) == 20, "every request")
        relay.api.gate.let(20)
        relay.api.wait_for(lambda api: all(seen.body_sent for seen in api.requests), "the first tokens")
        nginx.reload()
        clients += [relay.begin("gate-tokens words=3") for _ in range(20)]
        relay.api.wait_for(lambda api: len(api.requests) == 40, "every request")
        relay.api.gate.open()
        for answer in read_answers(clients):
            assert answer.complete, answer
            assert answer.text == text(3)
        wait_for(lambda: not old & nginx.workers(), "the old worker's end")
        assert relay.ask().complete
        settled(relay)


def test_connections_that_end_after_a_few_requests_lose_none(tmp_path: Path) -> None:
    with relaying_through_nginx(tmp_path, more="keepalive_requests 10;", retries=0) as (relay, nginx):
        clients = [relay.begin("ok words=10 delay=0.01") for _ in range(95)]
        for answer in read_answers(clients):
            assert answer.complete, answer
            assert answer.text == text(10)
        wait_for(lambda: len(nginx.requests()) == 95, "nginx's access lines")
        assert nginx.connections() >= 9
        settled(relay)


def test_an_api_that_is_down_is_a_status(tmp_path: Path) -> None:
    with relaying_through_nginx(tmp_path, retries=0) as (relay, nginx):
        assert relay.ask().complete
        relay.api.stop_listening()
        relay.api.drop_connections()
        answer = relay.ask()
        assert (answer.status, answer.json["code"]) == (502, "backend_error")
        relay.forkd.wait_for_metric("forkd_stream_errors_total", 1, code="backend_error")
        relay.api.listen()
        # nginx leaves a server alone for fail_timeout; it is the only one here, so that it is tried all the same.
        assert relay.ask().complete
        assert nginx.connections() == 1


def test_an_api_that_breaks_off_is_an_event(tmp_path: Path) -> None:
    with relaying_through_nginx(tmp_path) as (relay, _):
        answer = relay.ask("close-after")
        assert answer.error is not None
        assert answer.error["code"] in ("backend_reset", "backend_truncated")
        assert relay.ask().complete
        settled(relay)


@pytest.mark.parametrize("http2", [True, False])
def test_a_large_request_waits_for_the_windows(tmp_path: Path, http2: bool) -> None:
    files = tmp_path / "files"
    files.mkdir()
    with relaying_through_nginx(tmp_path, http2=http2, server={"data_dir": str(files)}) as (relay, _):
        clients = []
        for number in range(4):
            (files / f"note-{number}").write_text(f"{number} " * 2_000_000)
            clients.append(relay.begin(prompt="Read {note}", attachments={"note": f"note-{number}"}))
        for answer in read_answers(clients):
            assert answer.complete, answer
        contents = [seen.json["messages"][-1]["content"] for seen in relay.api.requests]
        assert sorted(contents) == [f"Read {f'{number} ' * 2_000_000}" for number in range(4)]
        settled(relay)
