"""Anthropic's Messages.

https://docs.anthropic.com/en/api/messages, and /en/docs/build-with-claude/streaming for the events. An answer is
`message_start` (with the input's tokens), blocks of content (`content_block_start`, `_delta` …, `_stop`),
`message_delta` (why it stopped, and the output's tokens so far) and `message_stop`; `ping` and kinds of a later day may
come anywhere, and `error` ends it. Every event names its kind twice, in the event's name and in the data: the data's
counts here, since some servers that speak this API leave out the other.

What went into or came out of a cache is not among `input_tokens`; here it is, as it is for other APIs.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from forkd.settings import AnthropicBackend as Settings
from workers import sse
from workers.attachments import Attachment
from workers.backends import asking, pieces
from workers.backends.base import BadRequest, Done, Finish, HttpBackend, Piece, Translation, Usage
from workers.backends.messages import Message, Part, in_base64, messages, text_part
from workers.request import HandoffData, Request
from workers.upstream.message import HttpRequest

_DONE: Final = Done()
_IMAGES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})


class _Delta(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Block(msgspec.Struct, gc=False):
    type: str | None = None
    text: str | None = None
    id: str | None = None
    name: str | None = None


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Message(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _Event(msgspec.Struct, gc=False):
    type: str | None = None
    delta: _Delta | None = None
    index: int = 0
    content_block: _Block | None = None
    message: _Message | None = None
    usage: _Usage | None = None
    error: Any = None


class AnthropicBackend(HttpBackend):
    """Any server that answers POST /v1/messages."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._own = settings
        super().__init__(name, settings)
        key = settings.api_key
        self._headers: asking.Headers = (
            *asking.STATIC,
            ("anthropic-version", settings.api_version),
            *((("x-api-key", key.reveal()),) if key is not None else ()),
        )
        versioned = urlsplit(settings.api_base).path.rstrip("/").endswith("/v1")
        self._path = "/messages" if versioned else "/v1/messages"
        self._events = frozenset() if self.raw else frozenset(settings.events)
        self._decode = msgspec.json.Decoder(_Event).decode

    def model(self, data: HandoffData) -> str:
        return data.model or self._own.default_model

    def request(self, handoff: Request, request_id: str, attachments: Mapping[str, Attachment]) -> HttpRequest:
        data = handoff.data
        conversation = messages(data, attachments, _medium)
        system = _system(data.system, conversation)
        conversation = [message for message in conversation if not _is_system(message)]
        if not conversation:
            raise BadRequest("no_prompt", "no messages but those of the system")
        body: dict[str, Any] = {
            **asking.passed_through(self._own.pass_through, handoff),
            "max_tokens": self._own.max_tokens,
            **asking.sampling(data),
            "model": self.model(data),
            "messages": conversation,
            "stream": True,
        }
        if system:
            body["system"] = system
        return HttpRequest(self._path, asking.headers(self._headers, data, request_id), asking.encoded(body))

    def translate(self, event: sse.Event) -> Translation:
        try:
            said = self._decode(event.data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if not event.data.strip():
                return None
            said = pieces.understood(_Event, event.data)
        delta = said.delta
        if delta is not None and delta.text:
            return delta.text
        return self._rare(said)

    def _rare(self, said: _Event) -> Translation:
        """Everything but a piece of text."""
        match said.type:
            case "content_block_delta":
                return self._delta(said.index, said.delta)
            case "content_block_start":
                return self._block(said.index, said.content_block)
            case "message_start":
                return self._counted(said.message.usage if said.message is not None else None)
            case "message_delta":
                return self._stopped(said.delta, said.usage)
            case "message_stop":
                return _DONE
        if said.type == "error" or said.error:
            return pieces.failure_of(said.error)
        return None

    def _delta(self, index: int, delta: _Delta | None) -> Translation:
        if delta is None:
            return None
        if delta.thinking and "reasoning" in self._events:
            return pieces.reasoning(delta.thinking)
        if delta.partial_json and "tool_calls" in self._events:
            return pieces.tool_call(index, delta.partial_json)
        return None

    def _block(self, index: int, block: _Block | None) -> Translation:
        if block is None:
            return None
        if block.type == "tool_use" and "tool_calls" in self._events:
            return pieces.tool_call(index, "", block.name or "", block.id or "")
        return (block.text or None) if block.type == "text" else None

    def _stopped(self, delta: _Delta | None, usage: _Usage | None) -> Translation:
        said: list[Piece] = []
        counted = self._counted(usage)
        if counted is not None:
            said += counted
        if delta is not None and delta.stop_reason:
            if "finish" in self._events:
                said.append(pieces.finish(delta.stop_reason))
            said.append(Finish(delta.stop_reason))
        return said or None

    def _counted(self, usage: _Usage | None) -> list[Piece] | None:
        if usage is None:
            return None
        read = pieces.tokens(usage.input_tokens)
        if read is not None:
            read += pieces.tokens(usage.cache_creation_input_tokens) or 0
            read += pieces.tokens(usage.cache_read_input_tokens) or 0
        counted = Usage(read, pieces.tokens(usage.output_tokens))
        return [pieces.usage(counted), counted] if "usage" in self._events else [counted]


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def _system(own: str | None, conversation: list[Message]) -> str | list[Part]:
    """What the data and its messages say on behalf of the system: this API has one place for it."""
    said: list[Any] = [own] if own else []
    said += [message.get("content") for message in conversation if _is_system(message)]
    if all(isinstance(content, str) for content in said):
        return "\n\n".join(said)
    parts: list[Part] = []
    for content in said:
        if isinstance(content, str):
            parts.append(text_part(content))
        elif isinstance(content, list):
            parts += content
    return parts


def _medium(attachment: Attachment) -> Part:
    """An image or a PDF as a block of content."""
    kind = "image" if attachment.media_type in _IMAGES else "document"
    if kind == "document" and attachment.media_type != "application/pdf":
        raise BadRequest("bad_attachment", f"attachment {attachment.name}: the API takes no {attachment.media_type}")
    source = {"type": "base64", "media_type": attachment.media_type, "data": in_base64(attachment)}
    return {"type": kind, "source": source}
