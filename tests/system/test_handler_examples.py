"""The examples of docs/handlers.md, as they stand there."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Forkd, read_answer, running, wait_for

PAGE = Path(__file__).parents[2] / "docs" / "handlers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
EXAMPLES = {block.splitlines()[0].removeprefix("# example: "): block for block in BLOCKS if "# example: " in block}


class Service(ThreadingHTTPServer):
    """Another HTTP service: says what it was asked, in two chunks, the second when it may."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.go = threading.Event()
        self.broken = threading.Event()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if question["question"] == "refuse":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(f"{question['user']} asks {question['question']}, ")
        self.server.go.wait(20)
        try:
            while question["question"] == "for ever":
                self._chunk("x" * 10_000)
            self._chunk("and it was ☃.")
            self._chunk("")
        except OSError:
            self.server.broken.set()
            self.close_connection = True

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.05,))
        thread.start()
        yield service
        service.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def forkd(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkd]:
    directory = tmp_path_factory.mktemp("examples")
    backends = {}
    for name, source in EXAMPLES.items():
        (directory / f"{name}.py").write_text(source.replace("127.0.0.1:8000", f"127.0.0.1:{service.server_port}"))
        backends[name] = {"provider": "python", "target": f"{name}:answer", "path": [str(directory)]}
    with running(directory, config={"backends": backends, "workers": {"count": 1}}) as forkd:
        yield forkd


def data(backend: str, **more: Any) -> bytes:
    return json.dumps({"backend": backend, "user_id": "u1", **more}).encode()


def test_there_are_three() -> None:
    assert sorted(EXAMPLES) == ["relay", "relay_async", "tools"]


@pytest.mark.parametrize("name", ["relay", "relay_async"])
def test_another_service_is_streamed(forkd: Forkd, service: Service, name: str) -> None:
    service.go.clear()
    client = forkd.hand_over(data(name, prompt="why"))
    first = b""
    while b"u1 asks why, " not in first:  # before the service says more
        first += client.recv(65536)
    service.go.set()
    rest = read_answer(client)
    assert "and it was ☃." in rest.raw.decode()
    assert rest.raw.endswith(b"event: done\ndata: {}\n\n")


@pytest.mark.parametrize("name", ["relay", "relay_async"])
def test_a_service_that_refuses(forkd: Forkd, name: str) -> None:
    answer = forkd.ask(data(name, prompt="refuse"))
    assert (answer.status, answer.json["code"]) == (502, "handler_error")
    assert "404" in forkd.log()
    assert answer.json["error"] == "The backend reported an error"  # and not the 404 of the service


@pytest.mark.parametrize("name", ["relay", "relay_async"])
def test_the_service_learns_that_the_client_has_gone(forkd: Forkd, service: Service, name: str) -> None:
    service.go.set()
    service.broken.clear()
    client = forkd.hand_over(data(name, prompt="for ever"))
    assert client.recv(65536)
    client.close()
    assert service.broken.wait(20)
    wait_for(lambda: "reason=client_disconnected" in forkd.log(), "the stream's end")


def test_tools(forkd: Forkd) -> None:
    answer = forkd.ask(data("tools", zone_hours=2))
    assert answer.complete
    call, result = (event for event in answer.events if event.name.startswith("tool_"))
    assert (call.name, json.loads(call.data)) == ("tool_call", {"name": "clock", "arguments": {"zone_hours": 2}})
    assert result.name == "tool_result"
    assert answer.text == f"It is {json.loads(result.data)['result']} where you are."
