"""LangGraph servers (LangSmith's, `langgraph dev`, the JavaScript one): runs of a graph, with or without a thread.

https://docs.langchain.com/langsmith/streaming says what a run sends, and the source of langchain-ai/langgraphjs
(libs/langgraph-api) and of langgraph's own client (pregel/remote.py) what is not written there:

* `metadata` comes first, with the run's id;
* under `messages-tuple` each chunk of a model's answer is an event `messages`: the chunk and what is known of it. A
  message that was not streamed comes whole, once; so do the tools' messages, whose type tells them apart. Under
  `messages` the same comes as `messages/partial`, each time all that has been said so far;
* `updates` has what each node changed, by the node's name, and `values` the whole state after each step. Both hold
  whole messages, and `values` the same ones again and again;
* with `stream_subgraphs` the name is followed by the subgraph's: `messages|tools:1f…`;
* `error` ends a run that failed: `{"error": "RateLimitError", "message": …}`;
* nothing ends one that succeeded. Older servers send `end`; the others just end the body, behind whatever came last: a
  run that waits for a human has not even a finish reason.

`translate` remembers nothing, so outside of `format: raw` only those modes are asked for that say things once.

A run on a thread changes the thread, and any run may have done what its tools do, so none is ever begun twice. A run is
asked to end when its client goes, which is not what the server would do by itself.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, get_args

import msgspec

from forkd.settings import LangGraphBackend as Settings
from forkd.settings import StreamMode
from workers import sse
from workers.attachments import Attachment
from workers.backends import asking, pieces
from workers.backends.base import BadRequest, Done, Extra, Finish, HttpBackend, Piece, Translation, Usage
from workers.backends.messages import medium_part, messages, text_of
from workers.request import HandoffData, Request
from workers.upstream.message import HttpRequest

_DONE: Final = Done()
_MODES: Final = frozenset(get_args(StreamMode))
_THREAD: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NAME: Final = re.compile(r"[A-Za-z_][\w.]{0,63}", re.ASCII)
_OF_A_MODEL: Final = frozenset({"AIMessageChunk", "ai"})
_NONE: Final = (b"", b"null")
_NOT_THE_END: Final = frozenset({"tool_calls", "tool_use", "function_call"})
"""Reasons to stop that make the graph go on."""


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Metadata(msgspec.Struct, gc=False):
    finish_reason: str | None = None
    stop_reason: str | None = None
    done_reason: str | None = None


class _Kwargs(msgspec.Struct, gc=False):
    reasoning_content: str | None = None


class _Call(msgspec.Struct, gc=False):
    name: str | None = None
    args: Any = None
    id: str | None = None
    index: int | str | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | list[Any] | None = None
    type: str | None = None
    id: str | None = None
    additional_kwargs: _Kwargs | None = None
    response_metadata: _Metadata | None = None
    usage_metadata: _Usage | None = None
    tool_call_chunks: list[_Call] | None = None
    tool_calls: list[_Call] | None = None


class _Chunk(msgspec.Struct, array_like=True, gc=False):
    """The first of a pair; what is known of it is passed over."""

    message: _Message


class _Error(msgspec.Struct):
    error: str | None = None


class LangGraphBackend(HttpBackend):
    """Any server that answers POST /runs/stream and /threads/…/runs/stream. Its model is the assistant."""

    repeatable: ClassVar[bool] = False
    ends_with_body: ClassVar[bool] = True

    def __init__(self, name: str, settings: Settings) -> None:
        self._own = settings
        super().__init__(name, settings)
        key = settings.api_key
        self._headers = asking.STATIC if key is None else (*asking.STATIC, ("x-api-key", key.reveal()))
        self._events = frozenset() if self.raw else frozenset(settings.events)
        self._decode = msgspec.json.Decoder(_Chunk).decode

    def model(self, data: HandoffData) -> str:
        return data.assistant_id or self._own.assistant_id

    def has_question(self, data: HandoffData) -> bool:
        """An input of the application's own is one, and so may be a `command`: `request` will see."""
        own = bytes(data.langgraph_input) not in _NONE or "command" in self._own.pass_through
        return own or super().has_question(data)

    def request(self, handoff: Request, request_id: str, attachments: Mapping[str, Attachment]) -> HttpRequest:
        data = handoff.data
        body: dict[str, Any] = {
            "on_disconnect": "cancel",
            **asking.passed_through(self._own.pass_through, handoff),
            "assistant_id": self.model(data),
            "stream_mode": self._modes(data.stream_mode),
        }
        if "command" not in body:  # which goes on with a run that waits, and takes the place of an input
            body["input"] = _input(data, attachments)
        path = "/runs/stream"
        if data.thread_id is not None:
            if not _THREAD.fullmatch(data.thread_id):
                raise BadRequest("bad_handoff", "thread_id: expected letters, digits, hyphens and underscores")
            path = f"/threads/{data.thread_id}/runs/stream"
        return HttpRequest(path, asking.headers(self._headers, data, request_id), asking.encoded(body))

    def _modes(self, wanted: str | list[str] | None) -> list[str]:
        """What to ask for: outside of raw format the one mode that has the text of what is wanted, once."""
        modes = [wanted] if isinstance(wanted, str) else wanted or [self._own.stream_mode]
        if not _MODES.issuperset(modes):
            raise BadRequest("bad_handoff", f"stream_mode: expected some of {', '.join(sorted(_MODES))}")
        if self.raw:
            return modes
        if not {"messages-tuple", "messages"}.isdisjoint(modes):
            return ["messages-tuple"]
        if not {"updates", "values"}.isdisjoint(modes):
            return ["updates"]
        raise BadRequest("bad_handoff", f"stream_mode: {', '.join(modes)} can only be had by format: raw")

    def translate(self, event: sse.Event) -> Translation:
        if event.name != "messages":
            return self._rare(event)
        try:
            message = self._decode(event.data).message
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._odd(event.data)
        content = message.content
        if (
            type(content) is str
            and content
            and message.type in _OF_A_MODEL
            and message.usage_metadata is None
            and not self._events
            and not _reason(message)
        ):
            return content
        return self._pieces(message)

    def _odd(self, data: bytes) -> Translation:
        """A chunk that is none by its type."""
        found = pieces.leniently(data)
        if not isinstance(found, list):
            raise ValueError("no pair")
        return self._said(found[:1])

    def _rare(self, event: sse.Event) -> Translation:
        """Every other event."""
        name = event.name.partition("|")[0]
        match name:
            case "end":
                return _DONE
            case "error":
                error = pieces.understood(_Error, event.data).error or ""
                return pieces.failure(error if _NAME.fullmatch(error) else "")
            case "messages":
                return self._odd(event.data)
            case "messages/partial" | "messages/complete":
                return self._said(pieces.leniently(event.data))
            case "values":
                return self._state(pieces.leniently(event.data))
            case "updates":
                nodes = pieces.leniently(event.data)
                return self._updates(list(nodes.values())) if isinstance(nodes, dict) else None
        return None

    def _updates(self, states: list[Any]) -> Translation:
        """What each of the nodes of a step ends with."""
        said: list[Piece] = []
        for state in states:
            found = self._state(state)
            if isinstance(found, list):
                said += found
            elif found is not None:
                said.append(found)
        return said or None

    def _state(self, state: Any) -> Translation:
        """What a state, or a change of it, ends with: nodes may repeat what was before."""
        said = state.get("messages") if isinstance(state, dict) else None
        return self._said(said if isinstance(said, list) else [said])

    def _said(self, said: Any) -> Translation:
        """The last of some messages."""
        last = said[-1] if isinstance(said, list) and said else None
        return self._pieces(pieces.fitting(_Message, last)) if isinstance(last, dict) else None

    def _pieces(self, message: _Message) -> Translation:
        """Everything that a message says, if it is the model's; the text first."""
        if message.type not in _OF_A_MODEL:
            return None
        said: list[Piece] = []
        wanted = self._events
        if "reasoning" in wanted and (thought := _thought(message)):
            said.append(pieces.reasoning(thought))
        if text := text_of(message.content):
            said.append(text)
        if "tool_calls" in wanted:
            said += _calls(message)
        if reason := _reason(message):
            if "finish" in wanted:
                said.append(pieces.finish(reason))
            if reason not in _NOT_THE_END:
                said.append(Finish(reason))
        if (usage := message.usage_metadata) is not None:
            # A run may call models many times, each for a message of its own; `values` repeats the messages.
            part = (message.id or "")[:128]
            counted = Usage(pieces.tokens(usage.input_tokens), pieces.tokens(usage.output_tokens), part)
            if "usage" in wanted:
                said.append(pieces.usage(counted))
            said.append(counted)
        return said[0] if len(said) == 1 else said or None


def _input(data: HandoffData, attachments: Mapping[str, Attachment]) -> msgspec.Raw | dict[str, Any]:
    """The graph's input: the application's own, or messages."""
    if bytes(data.langgraph_input) not in _NONE:
        if attachments:
            raise BadRequest("bad_attachment", "langgraph_input is handed on as it is, without attachments")
        return data.langgraph_input
    conversation = messages(data, attachments, medium_part)
    if data.system:
        conversation.insert(0, {"role": "system", "content": data.system})
    return {"messages": conversation}


def _reason(message: _Message) -> str | None:
    """Why the model stopped, under the names that models have for it."""
    told = message.response_metadata
    return None if told is None else told.finish_reason or told.stop_reason or told.done_reason


def _thought(message: _Message) -> str:
    """The model's reasoning, wherever LangChain keeps it for the model's maker."""
    kwargs = message.additional_kwargs
    if kwargs is not None and kwargs.reasoning_content:
        return kwargs.reasoning_content
    blocks = message.content if isinstance(message.content, list) else []
    kinds = [(block, block.get("type")) for block in blocks if isinstance(block, dict)]
    thoughts = (block.get(kind) for block, kind in kinds if kind in ("thinking", "reasoning"))
    return "".join(thought for thought in thoughts if isinstance(thought, str))


def _calls(message: _Message) -> list[Extra]:
    """The tool calls, or pieces of them, that a message holds."""
    # What is in a chunk's `tool_calls` was made of its `tool_call_chunks`, as far as that went.
    calls = message.tool_call_chunks or (message.tool_calls if message.type == "ai" else None) or []
    return [
        pieces.tool_call(
            call.index if isinstance(call.index, int) else number,
            call.args if isinstance(call.args, str) else "" if call.args is None else pieces.json_of(call.args),
            call.name,
            call.id,
        )
        for number, call in enumerate(calls)
    ]
