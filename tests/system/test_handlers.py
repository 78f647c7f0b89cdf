"""The python backend: handlers of users, in a running daemon."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.harness import Answer, Forkd, envelope, read_answer, running, wait_for

ZOO = str(Path(__file__).parents[1] / "handlers")
BOTH = pytest.mark.parametrize("suffix", ["", "_async"], ids=["plain", "async"])
TELLS_TOO_MUCH = "a secret of the handler's"


def zoo(name: str, **more: Any) -> dict[str, Any]:
    return {"provider": "python", "target": f"zoo:{name}", "path": [ZOO], **more}


NAMES = (
    *("shows", "shows_async", "counts", "counts_async", "waits", "waits_async", "broken", "broken_async"),
    *("empty", "leaks", "writes", "lies", "collects"),
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkd]:
    """One worker with every handler that does it no lasting harm."""
    backends = {name: zoo(name) for name in NAMES}
    backends |= {
        "plain": zoo("shows", format="text"),
        "object": zoo("thing"),
        "one": zoo("waits", threads=1, queue_size=1, queue_timeout_secs=0.5),
    }
    config = {"workers": {"count": 1}, "backends": backends, "default_backend": "shows"}
    with running(tmp_path_factory.mktemp("handlers"), config=config) as forkd:
        assert forkd.ask(data("shows_async")).complete  # which starts the asyncio loop
        wait_for(lambda: status(forkd)["workers"][0]["completed"] == 1 and not status(forkd)["streams"], "it is idle")
        yield forkd


@pytest.fixture
def forkd(daemon: Forkd) -> Iterator[Forkd]:
    """The same for all, and after each test as it was before."""
    before = daemon.idle_fds()
    yield daemon
    wait_for(lambda: daemon.idle_fds() == before, f"its fds are again {before}")


def data(backend: str, **more: Any) -> bytes:
    return json.dumps({"backend": backend, **more}).encode()


def told(trace: Path) -> list[str]:
    return trace.read_text().splitlines() if trace.exists() else []


def events(answer: Answer, name: str) -> list[Any]:
    return [json.loads(event.data) for event in answer.events if event.name == name]


@BOTH
def test_what_is_yielded_and_what_is_given(forkd: Forkd, suffix: str) -> None:
    raw = data(f"shows{suffix}", prompt="Hello", own=[1, {"two": None}], user_id="u1", request_id="r-1")
    request = {"method": "POST", "uri": "/chat", "remote_addr": "192.0.2.7", "headers": {"Accept-Language": "de"}}
    with forkd.counting():
        answer = forkd.ask(envelope(request, raw))
    assert answer.complete
    assert answer.text == "text, ☃ cut \ufffd\ufffd"
    assert [event.name for event in answer.events[:2]] == ["tool_call", "message"]
    assert events(answer, "tool_call") == [{"name": "search", "lines": "a\nb"}]
    assert events(answer, "given") == [
        {
            "prompt": "Hello",
            "own": [1, {"two": None}],
            "raw": len(raw),
            "user": "u1",
            "id": "r-1",
            "backend": f"shows{suffix}",
            "request": ["POST", "/chat", "192.0.2.7", {"Accept-Language": "de"}],
        }
    ]


def test_text_lines_instead_of_json(forkd: Forkd) -> None:
    answer = forkd.ask(data("plain"))
    assert [event.data for event in answer.events if event.name == "message"][:2] == ["text, ", "☃"]


def test_an_object_that_is_called(forkd: Forkd) -> None:
    assert forkd.ask(data("object")).text == "object"


@pytest.mark.parametrize("raw", [b"\0", b"no JSON", b"[1,2]", b'{"prompt":1}'])
def test_data_that_is_none_is_answered_with_defaults(forkd: Forkd, raw: bytes) -> None:
    answer = forkd.ask(raw)
    assert answer.complete
    (given,) = events(answer, "given")
    assert (given["prompt"], given["own"], given["raw"]) == (None, None, len(raw))


def test_nothing_to_say_and_threads_left_behind(forkd: Forkd) -> None:
    with forkd.counting():
        assert (forkd.ask(data("empty")).complete, forkd.ask(data("empty")).text) == (True, "")
        assert forkd.ask(data("leaks")).complete


def test_garbage_is_collected_while_others_code_runs(forkd: Forkd) -> None:
    assert forkd.ask(data("collects")).text == "True"


def test_logging_goes_into_the_log(forkd: Forkd) -> None:
    assert forkd.ask(data("writes")).complete
    wait_for(lambda: "WARNING worker 1: zoo: seen the log" in forkd.log(), "the handler's line")


@BOTH
def test_a_handler_waits_for_a_slow_client(forkd: Forkd, suffix: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with forkd.counting():
        client = forkd.hand_over(data(f"counts{suffix}", pieces=3000, trace=str(trace)))
        assert forkd.ask(data("shows")).complete  # the others go on
        wait_for(lambda: "at 100" in told(trace), "the handler has begun")
        assert forkd.ask(data("shows_async")).complete
        assert "to the end" not in told(trace)
        answer = read_answer(client)
        assert answer.complete
        assert [int(word) for word in answer.text.replace("x", "").split()] == list(range(3000))
        assert told(trace)[-2:] == ["to the end", "finally"]


@BOTH
def test_a_client_that_goes_ends_a_handler_that_is_held(forkd: Forkd, suffix: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with forkd.counting(stream_client_disconnected=1):
        client = forkd.hand_over(data(f"counts{suffix}", pieces=3000, trace=str(trace)))
        wait_for(lambda: "at 100" in told(trace), "the handler has begun")
        client.close()
        wait_for(lambda: told(trace)[-2:] == ["GeneratorExit", "finally"], "it was closed")
    assert "to the end" not in told(trace)


@BOTH
def test_a_client_that_goes_ends_a_handler_that_works(forkd: Forkd, suffix: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with forkd.counting(stream_client_disconnected=1):
        client = forkd.hand_over(data(f"waits{suffix}", trace=str(trace)))
        wait_for(lambda: told(trace) == ["begun"], "the handler has begun")
        client.close()
        ended = ["begun", *(["CancelledError"] if suffix else []), "finally"]
        wait_for(lambda: told(trace) == ended, "it came to its end")


WAYS = (
    ("at once", "handler_error", f"ValueError: {TELLS_TOO_MUCH}"),
    ("in the middle", "handler_error", f"ValueError: {TELLS_TOO_MUCH}"),
    ("exits", "handler_error", "SystemExit: 3"),
    ("a number", "handler_bad_yield", "it yielded int; a handler yields str, bytes"),
    ("a surrogate", "handler_bad_yield", "it yielded text that UTF-8 cannot carry: surrogates not allowed"),
    ("forkd's own event", "handler_error", "ValueError: the event 'done' is forkd's own"),
    ("ignores the end", "handler_bad_yield", "it yielded int"),
)


@BOTH
def test_a_handler_that_breaks(forkd: Forkd, suffix: str) -> None:
    backend = f"broken{suffix}"
    with forkd.counting(stream_handler_error=4, stream_handler_bad_yield=3):
        for way, code, logged in WAYS:
            before = len(forkd.log())
            answer = forkd.ask(data(backend, way=way))
            assert answer.error is not None
            assert answer.error["code"] == code, way
            assert (answer.status, answer.complete) == (502 if way == "at once" else 200, False)
            assert way == "at once" or answer.text == "word"
            assert TELLS_TOO_MUCH.encode() not in answer.raw
            line = f"ERROR   worker 1: {backend} (zoo:{backend}), stream {answer.header('x-request-id')}: {code}: "
            assert line in forkd.log()[before:]
            assert logged in forkd.log()[before:]
    assert forkd.metric("forkd_backend_errors_total", backend=backend, code="handler_error") >= 4


def test_a_function_that_turns_out_to_be_none(forkd: Forkd) -> None:
    with forkd.counting(stream_handler_bad_yield=1):
        answer = forkd.ask(data("lies"))
    assert (answer.status, answer.json["code"]) == (502, "handler_bad_yield")
    assert "it returned list instead of a generator" in forkd.log()


def test_an_asyncio_loop_that_is_ended_is_followed_by_another(forkd: Forkd, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with forkd.counting(stream_handler_error=2):
        neighbour = forkd.hand_over(data("waits_async", trace=str(trace)))
        wait_for(lambda: told(trace) == ["begun"], "the neighbour has begun")
        for client in (forkd.hand_over(data("broken_async", way="ends the loop")), neighbour):
            answer = read_answer(client)
            assert answer.text == "word"
            assert answer.error is not None
            assert answer.error["code"] == "handler_error"
        assert "the asyncio loop has ended: " in forkd.log()
        assert "SystemExit: 3" in forkd.log()
        assert forkd.ask(data("shows_async")).complete


def test_streams_wait_for_a_thread_and_then_no_more(forkd: Forkd, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def begin() -> socket.socket:
        return forkd.hand_over(data("one", trace=str(trace)))

    with forkd.counting(stream_client_disconnected=3, stream_handler_busy=2):
        first = begin()
        wait_for(lambda: told(trace) == ["begun"], "the only thread is taken")
        gone, second = begin(), begin()
        full = read_answer(second)
        assert (full.status, full.json["code"], full.header("retry-after")) == (503, "handler_busy", "1")
        seen = forkd.log().count("reason=client_disconnected")
        gone.close()
        wait_for(lambda: forkd.log().count("reason=client_disconnected") > seen, "its place in the queue is free")
        late = forkd.ask(data("one", trace=str(trace)))
        assert (late.status, late.json["code"]) == (503, "handler_busy")
        first.close()
        wait_for(lambda: told(trace) == ["begun", "finally"], "the thread is free")
        client = begin()
        wait_for(lambda: told(trace)[-1] == "begun", "another has it")
        client.close()


def test_a_handler_that_ends_the_process(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    config = {"workers": {"count": 1}, "backends": {name: zoo(name) for name in NAMES}}
    with running(tmp_path, config=config) as forkd:
        neighbour = forkd.hand_over(data("waits", trace=str(trace)))
        wait_for(lambda: told(trace) == ["begun"], "the neighbour has begun")
        client = forkd.hand_over(data("broken", way="dies"))
        for answer in (read_answer(client), read_answer(neighbour)):
            assert answer.error is not None
            assert answer.error["code"] == "worker_lost"
        assert told(trace) == ["begun"]  # and nobody began it anew
        assert forkd.ask(data("shows")).complete
        assert "exited with status 7; streams: 2 ended" in forkd.log()


def test_handlers_that_block_are_named_and_stop_nobody(tmp_path: Path) -> None:
    until = tmp_path / "until"
    config = {
        "workers": {"count": 1},
        "backends": {
            "dumb": zoo("silent", threads=2, idle_timeout_secs=0.3),
            "blocking": zoo("silent_async", idle_timeout_secs=0.3),
            "fine": zoo("shows_async"),
        },
    }
    with running(tmp_path, config=config) as forkd:
        blocking = read_answer(forkd.hand_over(data("blocking", until=str(until))))
        assert (blocking.text, blocking.error and blocking.error["code"]) == ("word", "handler_timeout")
        dumb = forkd.ask(data("dumb", until=str(until)))
        assert (dumb.status, dumb.json["code"]) == (504, "handler_timeout")

        wait_for(lambda: "blocks its asyncio loop" in forkd.log(), "the loop is missed")
        assert forkd.ask(data("fine")).complete

        def notes() -> list[tuple[int, str]]:
            return [(worker["stuck_handlers"], worker["note"]) for worker in status(forkd)["workers"]]

        wait_for(lambda: notes()[0][0] == 2, "both are counted")
        ((_, note),) = notes()
        assert "blocking (zoo:silent_async), stream " in note
        assert "for " in note
        assert scrape(forkd, "forkd_stuck_handlers") == 2
        assert "ERROR   worker 1: dumb (zoo:silent), stream" in forkd.log()
        until.touch()
        wait_for(lambda: notes() == [(0, "")], "they have ended")
        assert forkd.log().count("ended after all") == 2


def test_a_worker_whose_threads_are_all_stuck_is_replaced(tmp_path: Path) -> None:
    until = tmp_path / "until"
    config = {
        "workers": {"count": 1},
        "backends": {"dumb": zoo("silent", threads=1, idle_timeout_secs=0.3)},
    }
    with running(tmp_path, config=config) as forkd:
        (old,) = forkd.workers()
        assert forkd.ask(data("dumb", until=str(until))).json["code"] == "handler_timeout"
        wait_for(lambda: "asking to be replaced" in forkd.log(), "it gives up")
        wait_for(lambda: forkd.workers() and old not in forkd.workers(), "another takes over")
        until.touch()
        wait_for(lambda: forkd.log().count(" ready (pid") == 2, "it is ready")
        assert forkd.ask(data("dumb", until=str(until))).text == "late"
        assert "ERROR   master" not in forkd.log()


def status(forkd: Forkd) -> dict[str, Any]:
    parsed = json.loads(fetch(forkd, "/status"))
    assert isinstance(parsed, dict)
    return parsed


def scrape(forkd: Forkd, name: str) -> float:
    (line,) = [line for line in fetch(forkd, "/metrics").splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def fetch(forkd: Forkd, path: str) -> str:
    line = next(line for line in forkd.log().splitlines() if "metrics on http://" in line)
    return requests.get(line.partition("metrics on ")[2].replace("/metrics", path), timeout=10).text


@BOTH
def test_a_reload_brings_new_code_and_a_broken_one_changes_nothing(tmp_path: Path, suffix: str) -> None:
    module = tmp_path / "mine.py"
    prefix = "async " if suffix else ""
    module.write_text(f"{prefix}def answer(handoff):\n    yield 'one'\n")
    own = {"provider": "python", "target": "mine:answer", "path": [str(tmp_path)]}
    with running(tmp_path, config={"backends": {"own": own}, "default_backend": "own"}) as forkd:
        assert forkd.process is not None
        assert forkd.ask().text == "one"
        module.write_text(f"{prefix}def answer(handoff):\n    yield 'two'\n")  # as long, within the same second
        forkd.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "generation 2 serves" in forkd.log(), "the reload")
        assert forkd.ask().text == "two"
        module.write_text("import nothing_of_this_name\n")
        forkd.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "the reload failed" in forkd.log(), "it is told")
        log = forkd.log()
        assert "backends.own.target: importing mine failed: ModuleNotFoundError: No module named 'noth" in log
        assert f'File "{module}", line 1' in log
        assert "the reload failed: its workers cannot work with the new configuration (see above); generation 2" in log
        assert forkd.ask().text == "two"
        assert not (tmp_path / "__pycache__").exists()
        assert forkd.stop() == 0


def test_a_first_start_that_cannot_be_ends_and_says_why(tmp_path: Path) -> None:
    backends = {"own": zoo("shows"), "one": zoo("no_such"), "two": zoo("not_a_generator")}
    with running(tmp_path, ready=False, config={"backends": backends}) as forkd:
        assert forkd.process is not None
        assert forkd.process.wait(20) == 1
        log = forkd.log()
        assert f"backends.one.target: there is no no_such in {ZOO}/zoo.py" in log
        assert "backends.two.target: zoo:not_a_generator is no generator: there is no yield in it" in log
        assert "forkd cannot start: no worker can work with this configuration (see above)" in log
        assert f"the log, {tmp_path}/forkd.log, says why" in forkd.output()
        assert not Path(forkd.path).exists()


def test_a_stop_closes_handlers(tmp_path: Path) -> None:
    traces = [tmp_path / "plain", tmp_path / "async"]
    config = {
        "backends": {name: zoo(name) for name in NAMES},
        "server": {"shutdown_timeout_secs": 0.2, "linger_secs": 0.1},
    }
    with running(tmp_path, config=config) as forkd:
        clients = []
        for name, trace in zip(("waits", "waits_async"), traces, strict=True):
            clients.append(forkd.hand_over(data(name, trace=str(trace))))
            wait_for(lambda trace=trace: told(trace) == ["begun"], "it has begun")
        assert forkd.stop() == 0
        assert [told(trace)[-1] for trace in traces] == ["finally"] * 2
        for client in clients:
            answer = read_answer(client)
            assert answer.error is not None
            assert answer.error["code"] == "shutdown"
