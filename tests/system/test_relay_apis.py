"""The relay to Anthropic's Messages and to LangGraph, end to end; what it shares with OpenAI's is in test_relay.py."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.fake_api import INPUT_TOKENS, text
from tests.fake_api.dialects import TOOL
from tests.fake_api.exchange import Exchange
from tests.fake_api.patterns.parts import begin, conclude, speak
from tests.harness import read_answer, wait_for
from tests.system.relaying import Relay, relaying, settled

PNG = bytes.fromhex("89504e470d0a1a0a") + b"not much of a picture"
MODELS = {"anthropic": "claude-sonnet-4-5", "langgraph": "agent"}


def counted(relay: Relay, provider: str, read: int, written: int) -> None:
    """The metrics and the access line say that so many tokens went in and came out."""
    labels = {"backend": provider, "model": MODELS[provider]}
    relay.forkd.wait_for_metric("forkd_tokens_total", read, direction="input", **labels)
    relay.forkd.wait_for_metric("forkd_tokens_total", written, direction="output", **labels)
    (line,) = wait_for(relay.forkd.access_lines, "the access line")
    assert (line["backend"], line["model"], line["reason"]) == (provider, MODELS[provider], "ok")
    assert (line["input_tokens"], line["output_tokens"]) == (str(read), str(written))


@pytest.mark.parametrize("api", [{}, {"tls": "good"}])
def test_anthropic_answers(tmp_path: Path, api: dict[str, Any]) -> None:
    with relaying(tmp_path, provider="anthropic", api=api) as relay:
        answer = relay.ask("ok words=9", system="Be brief.", max_tokens=99)
        assert answer.complete, answer
        assert answer.text == text(9)
        (seen,) = relay.api.requests
        assert seen.path == "/v1/messages"
        assert (seen.headers["x-api-key"], seen.headers["anthropic-version"]) == ("sk-secret-key", "2023-06-01")
        assert seen.json == {
            "model": "claude-sonnet-4-5",
            "messages": [{"role": "user", "content": "Hello"}],
            "system": "Be brief.",
            "max_tokens": 99,
            "stream": True,
        }
        counted(relay, "anthropic", INPUT_TOKENS, 9)
        settled(relay)


@pytest.mark.parametrize(("provider", "reason"), [("anthropic", "tool_use"), ("langgraph", "stop")])
def test_further_events(tmp_path: Path, provider: str, reason: str) -> None:
    async def everything(ask: Exchange) -> None:
        await begin(ask)
        await ask.say(*ask.dialect.reasoning("Hm."))
        await speak(ask, ["Well: "])
        await ask.say(*ask.dialect.tool_call())
        await conclude(ask, reason)

    with relaying(tmp_path, provider=provider, events=["reasoning", "tool_calls", "usage", "finish"]) as relay:
        relay.api.script = [everything]
        answer = relay.ask()
        assert answer.complete, answer
        assert answer.text == "Well: "
        named = [(event.name, json.loads(event.data)) for event in answer.events if event.name != "message"]
        assert [data for name, data in named if name == "reasoning"] == [{"content": "Hm."}]
        calls = [data[0] for name, data in named if name == "tool_calls"]
        assert calls[0]["function"]["name"] == TOOL
        assert len({call["index"] for call in calls}) == 1
        assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Köln"}
        assert ("finish", {"reason": reason}) in named
        usage = [data for name, data in named if name == "usage"]
        assert usage[-1]["output_tokens"] == 3


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("error-event kind=overloaded_error", "backend_overloaded"),
        ("error-event kind=rate_limit_error", "backend_rate_limited"),
        ("error-event kind=api_error", "backend_error"),
        ("close-after", "backend_reset"),
    ],
)
@pytest.mark.parametrize("provider", MODELS)
def test_an_error_in_the_middle(tmp_path: Path, provider: str, pattern: str, code: str) -> None:
    with relaying(tmp_path, provider=provider) as relay:
        answer = relay.ask(pattern)
        assert (answer.status, answer.complete) == (200, False)
        assert answer.text == text(2)
        assert answer.error is not None
        assert answer.error["code"] == code
        assert len(relay.api.requests) == 1
        settled(relay)


def test_an_answer_of_anthropic_that_just_ends_was_cut_short(tmp_path: Path) -> None:
    with relaying(tmp_path, provider="anthropic") as relay:
        answer = relay.ask("truncated")
        assert answer.error is not None
        assert answer.error["code"] == "backend_truncated"


@pytest.mark.parametrize("provider", MODELS)
def test_an_overloaded_one_is_asked_again(tmp_path: Path, provider: str) -> None:
    with relaying(tmp_path, provider=provider) as relay:
        relay.api.script = ["529", "529 retry_after_ms=10"]
        assert relay.ask().complete
        assert len(relay.api.requests) == 3
        relay.forkd.wait_for_metric("forkd_backend_retries_total", 2, code="backend_overloaded")


def test_an_image_for_anthropic(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "cat.png").write_bytes(PNG)
    with relaying(tmp_path, provider="anthropic", server={"data_dir": str(files)}) as relay:
        assert relay.ask(prompt="What is {cat}?", attachments={"cat": "cat.png"}).complete
        before, image, after = relay.api.requests[0].json["messages"][0]["content"]
        assert (before, after) == ({"type": "text", "text": "What is "}, {"type": "text", "text": "?"})
        assert (image["type"], image["source"]["media_type"]) == ("image", "image/png")
        wait_for(lambda: not (files / "cat.png").exists(), "the file's end")


# LangGraph.


@pytest.mark.parametrize(
    ("data", "path"),
    [({}, "/runs/stream"), ({"thread_id": "t-1", "assistant_id": "agent"}, "/threads/t-1/runs/stream")],
)
def test_langgraph_answers(tmp_path: Path, data: dict[str, Any], path: str) -> None:
    with relaying(tmp_path, provider="langgraph") as relay:
        answer = relay.ask("ok words=9", **data)
        assert answer.complete, answer
        assert answer.text == text(9)
        (seen,) = relay.api.requests
        assert (seen.path, seen.headers["x-api-key"]) == (path, "sk-secret-key")
        assert seen.json == {
            "assistant_id": "agent",
            "input": {"messages": [{"role": "user", "content": "Hello"}]},
            "stream_mode": ["messages-tuple"],
            "on_disconnect": "cancel",
        }
        counted(relay, "langgraph", INPUT_TOKENS, 9)
        settled(relay)


def test_an_input_of_the_applications_own_is_enough(tmp_path: Path) -> None:
    with relaying(tmp_path, provider="langgraph") as relay:
        answer = relay.forkd.ask(b'{"langgraph_input":{"topic":"cats","deep":[1.50]}}')
        assert answer.complete, answer
        assert relay.api.requests[0].json["input"] == {"topic": "cats", "deep": [1.5]}
        for nothing in (b'{"langgraph_input":null}', b'{"thread_id":"t"}'):
            answer = relay.forkd.ask(nothing)
            assert (answer.status, answer.json["code"]) == (400, "no_prompt")
        assert len(relay.api.requests) == 1


def test_a_command_takes_the_place_of_an_input_where_it_is_allowed(tmp_path: Path) -> None:
    with relaying(tmp_path, provider="langgraph", pass_through=["command"]) as relay:
        assert relay.forkd.ask(b'{"thread_id":"t","command":{"resume":true}}').complete
        assert relay.api.requests[0].json["command"] == {"resume": True}
        answer = relay.forkd.ask(b'{"thread_id":"t"}')
        assert (answer.status, answer.json["code"]) == (400, "no_prompt")


@pytest.mark.parametrize("pattern", ["no-done", "truncated"])
def test_a_run_whose_body_just_ends_is_over(tmp_path: Path, pattern: str) -> None:
    with relaying(tmp_path, provider="langgraph") as relay:
        answer = relay.ask(pattern, thread_id="t")
        assert answer.complete, answer
        assert answer.text == text(5)


@pytest.mark.parametrize("pattern", ["500", "cut-before-answer"])
def test_a_run_that_may_have_begun_is_not_begun_again(tmp_path: Path, pattern: str) -> None:
    with relaying(tmp_path, provider="langgraph") as relay:
        assert relay.ask(pattern, thread_id="t").status == 502
        assert len(relay.api.requests) == 1


def test_a_run_is_not_begun_again_by_another_worker(tmp_path: Path) -> None:
    with relaying(tmp_path, provider="langgraph") as relay:
        client = relay.begin("gate-headers", thread_id="t")
        relay.api.wait_for(lambda api: api.requests, "the request")
        (worker,) = relay.forkd.workers()
        os.kill(worker, signal.SIGKILL)
        assert read_answer(client).status == 502
        assert len(relay.api.requests) == 1


@pytest.mark.parametrize("modes", [["messages-tuple"], ["updates"]])
def test_the_tokens_of_every_call_of_a_model_are_counted(tmp_path: Path, modes: list[str]) -> None:
    async def two_calls(ask: Exchange) -> None:
        await begin(ask)
        await speak(ask, ["Let me ", "see. "])
        await ask.say(*ask.dialect.finish("tool_calls"))
        await speak(ask, ["It ", "is ", "so."])
        await conclude(ask)

    with relaying(tmp_path, provider="langgraph") as relay:
        relay.api.script = [two_calls]
        answer = relay.ask(stream_mode=modes)
        assert answer.complete, answer
        assert answer.text == "Let me see. It is so."
        counted(relay, "langgraph", 2 * INPUT_TOKENS, 5)


def test_tokens_that_are_told_again_and_again_are_counted_once(tmp_path: Path) -> None:
    with relaying(tmp_path, provider="langgraph", format="raw") as relay:
        answer = relay.ask("ok words=3", stream_mode=["messages-tuple", "updates", "values"])
        assert {"messages", "updates", "values"} <= {event.name for event in answer.events}
        counted(relay, "langgraph", INPUT_TOKENS, 3)
