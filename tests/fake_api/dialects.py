"""What the three APIs say: the events of an answer, in the order in which the real ones send them. Pure.

    opening(), then any of text(), reasoning(), tool_call(), then finish(), then closing()

OpenAI     https://platform.openai.com/docs/api-reference/chat-streaming
Anthropic  https://platform.claude.com/docs/en/build-with-claude/streaming
LangGraph  https://docs.langchain.com/langsmith/streaming (lines end with CRLF there, and events have ids)
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import count, cycle, islice
from typing import Any, ClassVar, Final

from tests.fake_api.wire import Event, Spelling

INPUT_TOKENS: Final = 11
TOOL: Final = "get_weather"
TOOL_ARGUMENTS: Final = ('{"city":', ' "Köln"}')
_WORDS: Final = ("Grüße", "from", "the", "fake", "API:", "naïve", "café", "☕", "and", "so", "on")


def words(number: int) -> list[str]:
    """The pieces of an answer of so many words. Some have characters of two and three bytes."""
    return [word + " " for word in islice(cycle(_WORDS), number)]


def text(number: int) -> str:
    """The whole answer of so many words."""
    return "".join(words(number))


class Dialect(ABC):
    """One API's way to stream one answer. Counts what it says, so it is made anew for each."""

    spelling: ClassVar[Spelling] = Spelling()

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.model = str(request.get("model", "fake-model"))
        self.output_tokens = 0
        """One for each text, reasoning and tool_call."""

    @abstractmethod
    def opening(self) -> list[Event]: ...
    @abstractmethod
    def text(self, piece: str) -> list[Event]: ...
    @abstractmethod
    def reasoning(self, piece: str, key: str = "reasoning_content") -> list[Event]: ...
    @abstractmethod
    def tool_call(self) -> list[Event]:
        """A call of TOOL, its arguments in the pieces of TOOL_ARGUMENTS."""

    @abstractmethod
    def finish(self, reason: str = "") -> list[Event]:
        """Why the model stopped (in the API's own words; "" is the ordinary reason), and the usage."""

    @abstractmethod
    def closing(self) -> list[Event]: ...
    @abstractmethod
    def failure(self, kind: str, message: str) -> Event:
        """An error in the middle of the answer."""

    @abstractmethod
    def whole(self, answer: str) -> dict[str, Any]:
        """The answer as one JSON document, as without streaming."""

    def error(self, status: int, kind: str, message: str) -> dict[str, Any]:
        """The body of an error status."""
        return {"error": {"message": message, "type": kind, "param": None, "code": kind}}


class OpenAI(Dialect):
    """Chat Completions."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__(request)
        self._with_usage = bool((request.get("stream_options") or {}).get("include_usage"))

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> Event:
        """Any chunk with one choice."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event(choices=[choice], **({"usage": None} if self._with_usage else {}))

    def usage(self) -> Event:
        tokens = {
            "prompt_tokens": INPUT_TOKENS,
            "completion_tokens": self.output_tokens,
            "total_tokens": INPUT_TOKENS + self.output_tokens,
        }
        return self._event(choices=[], usage=tokens)

    def opening(self) -> list[Event]:
        return [self.chunk({"role": "assistant", "content": "", "refusal": None})]

    def text(self, piece: str) -> list[Event]:
        self.output_tokens += 1
        return [self.chunk({"content": piece})]

    def reasoning(self, piece: str, key: str = "reasoning_content") -> list[Event]:
        self.output_tokens += 1
        return [self.chunk({key: piece})]

    def tool_call(self) -> list[Event]:
        self.output_tokens += 1
        first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": TOOL, "arguments": ""}}
        rest = [{"index": 0, "function": {"arguments": piece}} for piece in TOOL_ARGUMENTS]
        return [self.chunk({"tool_calls": [call]}) for call in [first, *rest]]

    def finish(self, reason: str = "") -> list[Event]:
        return [self.chunk({}, reason or "stop"), *([self.usage()] if self._with_usage else [])]

    def closing(self) -> list[Event]:
        return [Event("[DONE]")]

    def failure(self, kind: str, message: str) -> Event:
        return Event(json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}))

    def whole(self, answer: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer}
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": 1700000000,
            "model": self.model,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }

    def _event(self, **more: Any) -> Event:
        chunk = {
            "id": "chatcmpl-fake",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "model": self.model,
            **more,
        }
        return Event(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))


class Anthropic(Dialect):
    """Messages. Its content comes in blocks, begun and ended by events of their own."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__(request)
        self._block = ""
        self._index = -1

    def opening(self) -> list[Event]:
        message: dict[str, Any] = {
            "id": "msg_fake",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": INPUT_TOKENS, "output_tokens": 1},
        }
        return [self._event("message_start", message=message)]

    def text(self, piece: str) -> list[Event]:
        self.output_tokens += 1
        return [*self._in("text", text=""), self._delta("text_delta", text=piece)]

    def reasoning(self, piece: str, key: str = "reasoning_content") -> list[Event]:
        self.output_tokens += 1
        return [*self._in("thinking", thinking="", signature=""), self._delta("thinking_delta", thinking=piece)]

    def tool_call(self) -> list[Event]:
        self.output_tokens += 1
        begun = self._in("tool_use", id="toolu_1", name=TOOL, input={})
        return [*begun, *(self._delta("input_json_delta", partial_json=piece) for piece in TOOL_ARGUMENTS)]

    def finish(self, reason: str = "") -> list[Event]:
        delta = {"stop_reason": reason or "end_turn", "stop_sequence": None}
        usage = {"output_tokens": self.output_tokens}
        return [*self._out(), self._event("message_delta", delta=delta, usage=usage)]

    def closing(self) -> list[Event]:
        return [self._event("message_stop")]

    def failure(self, kind: str, message: str) -> Event:
        return self._event("error", error={"type": kind, "message": message})

    def whole(self, answer: str) -> dict[str, Any]:
        return {"id": "msg_fake", "type": "message", "content": [{"type": "text", "text": answer}]}

    def error(self, status: int, kind: str, message: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": kind, "message": message}}

    def _in(self, kind: str, **content: Any) -> list[Event]:
        """Begin a block of this kind, if the last one is another."""
        if self._block == kind:
            return []
        events = self._out()
        self._block = kind
        self._index += 1
        events.append(self._event("content_block_start", index=self._index, content_block={"type": kind, **content}))
        if self._index == 0:
            events.append(self._event("ping"))
        return events

    def _out(self) -> list[Event]:
        """End the block that is open."""
        if not self._block:
            return []
        events = [self._event("content_block_stop", index=self._index)]
        if self._block == "thinking":
            events.insert(0, self._delta("signature_delta", signature="c2lnbmVk"))
        self._block = ""
        return events

    def _delta(self, kind: str, **delta: Any) -> Event:
        return self._event("content_block_delta", index=max(self._index, 0), delta={"type": kind, **delta})

    @staticmethod
    def _event(kind: str, **more: Any) -> Event:
        return Event(json.dumps({"type": kind, **more}, ensure_ascii=False), kind)


class LangGraph(Dialect):
    """Runs of a graph, with and without a thread, in the stream modes `messages-tuple`, `updates` and `values`.

    What follows a `finish` is another call of the model, with a message and a usage of its own.
    """

    spelling: ClassVar[Spelling] = Spelling(line_end="\r\n")

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__(request)
        modes = request.get("stream_mode", "values")
        self._modes: Sequence[str] = [modes] if isinstance(modes, str) else modes
        given = request.get("input")
        self._messages: list[Any] = list(given.get("messages", [])) if isinstance(given, dict) else []
        self._assistant = str(request.get("assistant_id", "agent"))
        self._said = ""
        self._message = 1
        self._ids = count()

    def opening(self) -> list[Event]:
        events = [self._event("metadata", {"run_id": "1ef00000-0000-6000-8000-000000000000", "attempt": 1})]
        return [*events, *self._values()]

    def text(self, piece: str) -> list[Event]:
        self.output_tokens += 1
        self._said += piece
        return self._chunk(content=piece)

    def reasoning(self, piece: str, key: str = "reasoning_content") -> list[Event]:
        self.output_tokens += 1
        return self._chunk(additional_kwargs={key: piece})

    def tool_call(self) -> list[Event]:
        self.output_tokens += 1
        names: list[tuple[str | None, str | None]] = [(TOOL, "call_1"), (None, None)]
        pieces = [
            {"name": name, "args": piece, "id": number, "index": 0, "type": "tool_call_chunk"}
            for (name, number), piece in zip(names, TOOL_ARGUMENTS, strict=True)
        ]
        return [event for piece in pieces for event in self._chunk(tool_call_chunks=[piece])]

    def finish(self, reason: str = "") -> list[Event]:
        usage = {
            "input_tokens": INPUT_TOKENS,
            "output_tokens": self.output_tokens,
            "total_tokens": INPUT_TOKENS + self.output_tokens,
        }
        last = self._chunk(response_metadata={"finish_reason": reason or "stop"}, usage_metadata=usage)
        message = {"content": self._said, "type": "ai", "id": f"run-{self._message}", "usage_metadata": usage}
        self._messages.append(message)
        self._message, self._said, self.output_tokens = self._message + 1, "", 0
        if "updates" in self._modes:
            last.append(self._event("updates", {"agent": {"messages": [message]}}))
        return [*last, *self._values()]

    def closing(self) -> list[Event]:
        return [self._event("end", None)]

    def failure(self, kind: str, message: str) -> Event:
        return self._event("error", {"error": kind, "message": message})

    def whole(self, answer: str) -> dict[str, Any]:
        return {"messages": [*self._messages, {"content": answer, "type": "ai"}]}

    def error(self, status: int, kind: str, message: str) -> dict[str, Any]:
        return {"detail": message}

    def _chunk(self, **more: Any) -> list[Event]:
        if not {"messages-tuple", "messages"} & set(self._modes):
            return []
        chunk = {
            "content": "",
            "additional_kwargs": {},
            "response_metadata": {},
            "type": "AIMessageChunk",
            "name": None,
            "id": f"run-{self._message}",
            "tool_calls": [],
            "invalid_tool_calls": [],
            "usage_metadata": None,
            "tool_call_chunks": [],
            **more,
        }
        about = {"graph_id": self._assistant, "langgraph_step": 1, "langgraph_node": "agent"}
        return [self._event("messages", [chunk, about])]

    def _values(self) -> list[Event]:
        return [self._event("values", {"messages": list(self._messages)})] if "values" in self._modes else []

    def _event(self, name: str, data: Any) -> Event:
        return Event(json.dumps(data, ensure_ascii=False), name, str(next(self._ids)))


def dialect_of(path: str, request: Any) -> Dialect | None:
    """The API that a path belongs to, whatever its prefix; None if to none."""
    said = request if isinstance(request, dict) else {}
    path = path.partition("?")[0]
    if path.endswith("/chat/completions"):
        return OpenAI(said)
    if path.endswith("/messages"):
        return Anthropic(said)
    if path.endswith("/runs/stream"):
        return LangGraph(said)
    return None
