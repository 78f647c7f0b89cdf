"""Chat Completions, of OpenAI and of every server that speaks them (Ollama, vLLM, Groq, OpenRouter …).

https://platform.openai.com/docs/api-reference/chat says what OpenAI sends. What others make of it:

* the last event is `[DONE]`; some end the body behind a `finish_reason` instead, and some have neither in raw form;
* the usage comes in a chunk of its own with empty `choices` (OpenAI, vLLM), with the last choice (OpenRouter), with
  every chunk (xAI, vLLM's `continuous_usage_stats`), or under `x_groq` (Groq);
* reasoning is `reasoning_content` (DeepSeek, vLLM) or `reasoning` (OpenRouter, Groq, Ollama);
* the content is a string, null, absent, or a list of parts (Mistral), and under `text` where the server only knows the
  older completions;
* an error in the middle of a 200 is `{"error": {…}}`, `{"error": "…"}` or `{"object": "error", …}`, or nothing but a
  `finish_reason` of "error" (OpenRouter).

Nearly every event is a chunk with one piece of text and nothing else. It is decoded by its type, which passes over
whatever is not asked for, and costs about a microsecond; what does not fit the type is looked at more patiently.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from forkd.settings import OpenAiBackend as Settings
from workers import sse
from workers.attachments import Attachment
from workers.backends import asking, pieces
from workers.backends.base import Done, Finish, HttpBackend, Piece, Translation, Usage
from workers.backends.chunks import Chunk, Delta, Trouble
from workers.backends.messages import medium_part, messages, text_of
from workers.request import HandoffData, Request
from workers.upstream.message import HttpRequest

_END: Final = b"[DONE]"
_DONE: Final = Done()


class OpenAiBackend(HttpBackend):
    """Any server that answers POST /chat/completions."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._own = settings
        super().__init__(name, settings)
        key = settings.api_key
        self._headers = asking.STATIC if key is None else (*asking.STATIC, ("authorization", f"Bearer {key.reveal()}"))
        self._events = frozenset() if self.raw else frozenset(settings.events)
        self._decode = msgspec.json.Decoder(Chunk).decode

    def model(self, data: HandoffData) -> str:
        return data.model or self._own.default_model

    def request(self, handoff: Request, request_id: str, attachments: Mapping[str, Attachment]) -> HttpRequest:
        data, own = handoff.data, self._own
        conversation = messages(data, attachments, medium_part)
        if data.system:
            conversation.insert(0, {"role": "system", "content": data.system})
        body: dict[str, Any] = {
            **asking.passed_through(own.pass_through, handoff),
            **asking.sampling(data),
            "model": self.model(data),
            "messages": conversation,
            "stream": True,
        }
        if own.usage:
            body["stream_options"] = {"include_usage": True}
        return HttpRequest("/chat/completions", asking.headers(self._headers, data, request_id), asking.encoded(body))

    def translate(self, event: sse.Event) -> Translation:
        data = event.data
        if data == _END:  # which costs more as an exception
            return _DONE
        try:
            chunk = self._decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._odd(event)
        choices = chunk.choices
        if choices:
            choice = choices[0]
            delta = choice.delta
            if (
                delta is not None
                and type(delta.content) is str
                and delta.content
                and choice.finish_reason is None
                and chunk.usage is None
                and chunk.error is None
                and choice.index == 0
                and (not self._events or (delta.reasoning_content is delta.reasoning is delta.tool_calls is None))
            ):
                return delta.content
        return self._rare(chunk, event)

    def _odd(self, event: sse.Event) -> Translation:
        """What is no chunk by its type."""
        data = event.data.strip()
        if data == _END:
            return _DONE
        if not data:
            return None
        return self._rare(pieces.understood(Chunk, data), event)

    def _rare(self, chunk: Chunk, event: sse.Event) -> Translation:
        """Everything but a piece of text."""
        if chunk.error or chunk.choices is None:
            trouble = pieces.understood(Trouble, event.data)
            if trouble.error:
                return pieces.failure_of(trouble.error)
            if event.name == "error" or trouble.object == "error" or trouble.type == "error":
                return pieces.failure(trouble.type, trouble.code)
        return self._pieces(chunk)

    def _pieces(self, chunk: Chunk) -> Translation:
        """Everything that a chunk says, the text first."""
        said: list[Piece] = []
        wanted = self._events
        choice = chunk.choices[0] if chunk.choices else None
        if choice is not None and choice.index == 0:
            delta = choice.delta or Delta()
            reasoning = delta.reasoning_content or delta.reasoning
            if reasoning and "reasoning" in wanted:
                said.append(pieces.reasoning(reasoning))
            text = text_of(delta.content) or delta.refusal or choice.text
            if text:
                said.append(text)
            if delta.tool_calls is not None and "tool_calls" in wanted:
                said.append(pieces.extra("tool_calls", delta.tool_calls))
            if choice.finish_reason == "error":
                said.append(pieces.failure("finish_reason error"))
            elif choice.finish_reason:
                if "finish" in wanted:
                    said.append(pieces.finish(choice.finish_reason))
                said.append(Finish(choice.finish_reason))
        usage = chunk.usage or (chunk.x_groq.usage if chunk.x_groq is not None else None)
        if usage is not None:
            counted = Usage(pieces.tokens(usage.prompt_tokens), pieces.tokens(usage.completion_tokens))
            if "usage" in wanted:
                said.append(pieces.usage(counted))
            said.append(counted)
        return said[0] if len(said) == 1 else said or None
