"""The endpoint in any language: every example of apache/examples under a real Apache, handed over to a real forkd."""

import contextlib
import runpy
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
import requests
from harness import Apache, public_dir

from tests.harness import Answer, Forkd, running

EXAMPLES = Path(__file__).parents[2] / "apache" / "examples"
HTDOCS = EXAMPLES.parent / "htdocs"
PROMPT = 'Grüße,\n"quoted" & more'


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(application: Callable[..., Any]) -> Iterator[int]:
    """A WSGI server, and its port."""
    with make_server("127.0.0.1", 0, application, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Site:
    def __init__(self, apache: Apache, forkd: Forkd) -> None:
        self.apache = apache
        self.forkd = forkd

    def ask(self, path: str, method: str = "GET", **how: Any) -> Answer:
        response = requests.request(method, self.apache.url + path, timeout=30, **how)
        head = f"HTTP/1.1 {response.status_code} {response.reason}\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in response.headers.items()
        )
        answer = Answer(head.encode("latin-1") + b"\r\n" + response.content)
        assert not any(name.startswith(("x-socket-", "x-handoff-")) for name, _ in answer.headers)
        return answer

    def question(self, answer: Answer) -> str:
        """What forkd was asked: the backend of these tests says it back."""
        assert (answer.status, answer.header("content-type")) == (200, "text/event-stream"), answer
        assert answer.complete
        return answer.text


@pytest.fixture(scope="module", params=["prefork", "event"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with public_dir() as public, public_dir(0o777) as run, contextlib.ExitStack() as stack:
        config = {
            "server": {"socket_mode": "0666"},
            "workers": {"count": 1},
            "default_backend": "echo",
            "backends": {"echo": {"provider": "typing", "token_delay_ms": 0}},
        }
        forkd = stack.enter_context(running(run, config=config))
        docroot = public / "htdocs"
        shutil.copytree(HTDOCS, docroot)
        for name in ("stream.cgi", "stream.sh"):
            shutil.copy(EXAMPLES / name, docroot)
        (docroot / "members").mkdir()
        for name in ("ask.txt", "members/ask.txt"):
            (docroot / name).write_text("nobody sees this\n")
        members = public / "members"
        members.write_text("me:{SHA}2jmj7l5rSw0yVb/vlWAYkK/YBwk=\n")  # the empty password
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FORKD_SOCKET", forkd.path)
            application = runpy.run_path(str(EXAMPLES / "stream_wsgi.py"))["application"]
        port = stack.enter_context(serving(application))
        conf = f"""
Define FORKD_SOCKET {forkd.path}
Define MEMBERS {members}
SetEnv FORKD_SOCKET ${{FORKD_SOCKET}}
SocketHandoffFormat envelope
SetOutputFilter DEFLATE
AddHandler cgi-script .cgi .sh
<Directory {docroot}>
    Options +ExecCGI
</Directory>
ProxyPass "/app/" "http://127.0.0.1:{port}/"
Include {EXAMPLES}/static.conf
"""
        modules = ("cgi", "proxy_http", "auth_basic", "authn_file", "authz_user")
        yield Site(stack.enter_context(Apache(request.param, docroot, run, conf, modules=modules)), forkd)


@pytest.mark.parametrize("path", ["/stream.php", "/stream.cgi", "/app/stream"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_endpoint_that_takes_a_prompt(site: Site, path: str, method: str) -> None:
    form = {"prompt": PROMPT}
    answer = site.ask(path, method, **{"params" if method == "GET" else "data": form})
    assert PROMPT in site.question(answer)
    assert "=" in (answer.header("set-cookie") or "")
    long = site.ask(path, "POST", data={"prompt": "Long " * 4000})
    assert "Long Long" in site.question(long)


@pytest.mark.parametrize("path", ["/stream.php", "/stream.cgi", "/app/stream"])
def test_an_error_of_the_endpoints_own_is_its_answer(site: Site, path: str) -> None:
    answer = site.ask(path)
    assert (answer.status, answer.json["code"]) == (400, "no_prompt")


def test_a_shell_script(site: Site) -> None:
    assert "What is new?" in site.question(site.ask("/stream.sh"))


def test_a_static_handoff(site: Site) -> None:
    assert "Tell me a joke" in site.question(site.ask("/ask.txt"))
    fresh = {"If-Modified-Since": "Fri, 31 Dec 2100 23:59:59 GMT", "If-None-Match": "*"}
    assert "Tell me a joke" in site.question(site.ask("/ask.txt", headers=fresh))


def test_a_static_handoff_for_members(site: Site) -> None:
    assert site.ask("/members/ask.txt").status == 401
    assert "Tell a member a joke" in site.question(site.ask("/members/ask.txt", auth=("me", "")))
