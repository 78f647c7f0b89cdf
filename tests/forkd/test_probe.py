"""Asking a backend's API, on real sockets."""

import contextlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from forkd import probe as probe_module
from forkd.finding import Finding, Level
from forkd.probe import probe
from forkd.settings import AnthropicBackend, Http2, HttpBackend, LangGraphBackend, OpenAiBackend, Secret
from tests.fake_api import FakeApi as RelayApi
from tests.fake_api.exchange import Exchange

KEY = "sk-very-secret-0123456789"
Pattern = Callable[[Exchange], Awaitable[None]]


class FakeApi(RelayApi):
    """One that is asked for other things than answers."""

    def _pattern(self, exchange: Exchange) -> Pattern:
        exchange.known = True
        return super()._pattern(exchange)


def saying(body: Any, status: int = 200) -> Pattern:
    """An API that says this, whatever it is asked."""

    async def pattern(ask: Exchange) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        await ask.whole(status, "application/json", text.encode())

    return pattern


def models(*names: str) -> Pattern:
    return saying({"object": "list", "data": [{"id": name} for name in names]})


def openai(base: str, **more: Any) -> OpenAiBackend:
    return OpenAiBackend(**{"api_base": base, "api_key": Secret(KEY), **more})


def ask(backend: HttpBackend, name: str = "openai") -> Finding:
    found = probe(name, backend)
    assert KEY not in found.text
    assert found.subject == f"backend {name}"
    assert found.text.startswith(f"{backend.api_base}")
    return found


def test_openai() -> None:
    with FakeApi(default=models("gpt-4o", "o3")) as api:
        found = ask(openai(api.base + "/"))
    assert (found.level, found.text) == (Level.OK, f"{api.base}/: takes the key")
    (seen,) = api.requests
    assert (seen.method, seen.path, seen.body) == ("GET", "/v1/models", b"")
    assert seen.headers["authorization"] == f"Bearer {KEY}"


def test_an_api_without_keys() -> None:
    with FakeApi(default=models("gpt-4o")) as api:
        found = ask(openai(api.base, api_key=None))
    assert (found.level, found.text) == (Level.OK, f"{api.base}: asks for no key")
    assert "authorization" not in api.requests[0].headers


@pytest.mark.parametrize("slash", ["", "/", "/v1", "/v1/"])
def test_anthropic(slash: str) -> None:
    with FakeApi(default=models("claude-sonnet-4-5-20250929")) as api:
        found = ask(AnthropicBackend(api_base=api.root + slash, api_key=Secret(KEY)), "anthropic")
    assert (found.level, found.text.endswith(": takes the key")) == (Level.OK, True)
    (seen,) = api.requests
    assert (seen.method, seen.path) == ("GET", "/v1/models?limit=1000")
    assert (seen.headers["x-api-key"], seen.headers["anthropic-version"]) == (KEY, "2023-06-01")


def test_langgraph() -> None:
    with FakeApi(default=saying([{"assistant_id": "1", "graph_id": "agent"}])) as api:
        found = ask(LangGraphBackend(api_base=api.root, api_key=Secret(KEY)), "graph")
    assert found.level is Level.OK
    (seen,) = api.requests
    assert (seen.method, seen.path, seen.headers["x-api-key"]) == ("POST", "/assistants/search", KEY)
    assert seen.json == {"graph_id": "agent", "limit": 1}


def test_langgraph_without_the_graph() -> None:
    with FakeApi(default=saying([])) as api:
        found = ask(LangGraphBackend(api_base=api.root), "graph")
        by_id = ask(LangGraphBackend(api_base=api.root, assistant_id="fe096781-5601-53d2-b2f6-0d3403f7e9ca"), "graph")
    assert found.level is Level.WARNING
    assert "has no graph 'agent' (assistant_id)" in found.text
    assert by_id.level is Level.OK


def test_a_model_that_is_not_there() -> None:
    with FakeApi(default=models("gpt-4", "o3")) as api:
        found = ask(openai(api.base))
    assert found.level is Level.WARNING
    assert found.text.endswith("takes the key, but does not list the model 'gpt-4o' (default_model) among its 2")


@pytest.mark.parametrize("body", [{"data": []}, {"data": "none"}, [], {}, None, {"data": [1, {"id": 2}]}])
def test_a_list_of_another_form_is_no_fault(body: Any) -> None:
    with FakeApi(default=saying(body)) as api:
        assert ask(openai(api.base)).level is Level.OK


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        (401, Level.FAULT, "the key is refused (401)"),
        (403, Level.FAULT, "the key is refused (403)"),
        (404, Level.WARNING, "is the path of api_base right?"),
        (405, Level.WARNING, "keeps no list"),
        (400, Level.WARNING, "not as expected (400)"),
        (429, Level.WARNING, "enough requests"),
        (500, Level.FAULT, "out of order (500)"),
        (503, Level.FAULT, "out of order (503)"),
        (529, Level.FAULT, "out of order (529)"),
    ],
)
def test_what_a_status_means(status: int, level: Level, words: str) -> None:
    with FakeApi(default=str(status)) as api:  # whose message quotes the key
        found = ask(openai(api.base))
    assert (found.level, words in found.text) == (level, True), found.text


def test_a_key_that_is_missing() -> None:
    with FakeApi(default="401") as api:
        assert "backends.openai.api_key_file, or OPENAI_API_KEY" in ask(openai(api.base, api_key=None)).text
        own = ask(openai(api.base, api_key=None), "own").text
    assert own.endswith("none is configured: backends.own.api_key_file")


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_does_not_get_the_key(code: int) -> None:
    with FakeApi() as other, FakeApi(default=f"redirect code={code} to={other.base}/models") as api:
        found = ask(openai(api.base))
        assert not other.requests
    assert (found.level, f"redirects ({code})" in found.text) == (Level.FAULT, True)


def test_a_web_page() -> None:
    with FakeApi(default=saying("<!doctype html>")) as api:
        found = ask(openai(api.base))
    assert (found.level, "not with JSON" in found.text) == (Level.WARNING, True)


def test_a_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with FakeApi(default=models("gpt-4o")) as api:
        assert ask(openai(api.base)).level is Level.OK


@pytest.mark.parametrize("alpn", [("h2", "http/1.1"), ("http/1.1",), ()])
def test_tls(alpn: tuple[str, ...]) -> None:
    with FakeApi(tls="good", alpn=alpn, default=models("gpt-4o")) as api:
        found = ask(openai(api.base, ca_file=str(api.ca_file)))
        assert found.level is Level.OK, found.text
        assert api.requests[0].connection.server_name in (None, "localhost")


@pytest.mark.parametrize(
    ("kind", "words"), [("expired", "expired"), ("other-name", "mismatch"), ("self-signed", "self")]
)
def test_certificates_that_workers_would_not_trust(kind: Any, words: str) -> None:
    with FakeApi(tls=kind, default=models("gpt-4o")) as api:
        found = ask(openai(api.base, ca_file=str(api.ca_file)))
        assert not api.requests
        assert ask(openai(api.base, insecure_ssl=True)).level is Level.OK
    assert found.level is Level.FAULT
    assert "its certificate is not trusted: " in found.text
    assert words in found.text


def test_an_authority_that_is_not_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeApi(tls="good", default=models("gpt-4o")) as api:
        # Python's requests would listen to this; workers do not.
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(api.ca_file))
        found = ask(openai(api.base))
    assert found.level is Level.FAULT
    assert "name its authority in ca_file" in found.text


def test_tls_where_there_is_none() -> None:
    with FakeApi() as api:
        found = ask(openai(api.base.replace("http:", "https:")))
    assert (found.level, "TLS fails" in found.text) == (Level.FAULT, True), found.text


@pytest.mark.parametrize("tls", [None, "good"])
def test_by_a_unix_socket(tmp_path: Path, tls: Any) -> None:
    path = tmp_path / "api.sock"
    with FakeApi(unix_path=path, tls=tls, default=models("gpt-4o")) as api:
        found = ask(openai(api.base, api_socket=str(path), ca_file=str(api.ca_file) if tls else None))
    assert (found.level, found.text) == (Level.OK, f"{api.base} by {path}: takes the key")
    assert api.requests[0].headers["host"] == "localhost"


def test_a_unix_socket_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    backend = openai("http://localhost/v1", api_socket=str(path))
    assert ask(backend).text.endswith("cannot connect: No such file or directory")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert ask(backend).text.endswith("nothing listens there (connection refused)")


def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        found = ask(openai(f"http://127.0.0.1:{bound.getsockname()[1]}/v1"))
    assert (found.level, "nothing listens there" in found.text) == (Level.FAULT, True)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70 + ".invalid", "a..b"])
def test_no_such_host(host: str) -> None:
    found = ask(openai(f"http://{host}/v1"))
    assert found.level is Level.FAULT
    assert "cannot find" in found.text or "there can be no such host" in found.text


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "ANSWER_SECS", 0.2)
    with FakeApi() as api:
        api.on_accept = ["silent"]
        assert ask(openai(api.base)).text.endswith("no answer within 0.2 s")


def test_no_connection_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(8):  # from the second on nobody answers a SYN
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        found = ask(openai(f"http://127.0.0.1:{full.getsockname()[1]}/v1", connect_timeout_secs=0.2))
    assert (found.level, found.text.endswith("no connection within 0.2 s")) == (Level.FAULT, True), found.text


def test_a_reset() -> None:
    with FakeApi() as api:
        api.on_accept = ["reset"]
        assert ask(openai(api.base)).level is Level.FAULT


def test_http2_alone_cannot_be_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.listen()
        base = f"http://127.0.0.1:{server.getsockname()[1]}/v1"

        def answer() -> None:
            for _ in range(2):
                peer, _ = server.accept()
                with peer:
                    peer.recv(65536)
                    peer.sendall(b"\0\0\0\x04\0\0\0\0\0")  # an empty SETTINGS frame, and good-bye

        thread = threading.Thread(target=answer)
        thread.start()
        forced = ask(openai(base, http2=Http2(enabled="force")))
        plain = ask(openai(base))
        thread.join()
    assert (forced.level, "speaks no HTTP/2" in forced.text) == (Level.WARNING, True)
    assert (plain.level, "without an answer in HTTP" in plain.text) == (Level.FAULT, True)


@pytest.mark.parametrize("pattern", ["status-without-body code=204"])
def test_an_empty_answer(pattern: str) -> None:
    with FakeApi(default=pattern) as api:
        assert ask(openai(api.base)).level is Level.WARNING


def test_an_answer_that_breaks_off() -> None:
    async def broken(ask: Exchange) -> None:
        await ask.head(200, [("content-type", "application/json"), ("content-length", "1000")])
        await ask.send(b'{"data": [')
        ask.pipe.close()

    with FakeApi(default=broken) as api:
        found = ask(openai(api.base))
    assert (found.level, "breaks off" in found.text) == (Level.FAULT, True), found.text
