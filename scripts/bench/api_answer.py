"""What the fake API says: the events of one Chat Completions answer, as OpenAI sends them.

Every answer of a run is the same, so each event is encoded once, when the server starts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

TRIAL_MODEL: Final = "trial"
"""Asked for by this name, the whole answer comes without delays, and is not counted."""

_ENVELOPE: Final[dict[str, Any]] = {
    "id": "chatcmpl-CQw8mZ1nV0sXkT5rJ2yE7bLhU4aGd",
    "object": "chat.completion.chunk",
    "created": 1760000000,
    "model": "gpt-4o-2024-08-06",
    "service_tier": "default",
    "system_fingerprint": "fp_cbf1785567",
}
_USAGE: Final[dict[str, Any]] = {
    "completion_tokens_details": {
        "accepted_prediction_tokens": 0,
        "audio_tokens": 0,
        "reasoning_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
    "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 0},
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The events of one answer, each with its blank line."""

    chunks: tuple[bytes, ...]  # one per word, a delay apart, the first at once
    ending: tuple[bytes, ...]  # one delay after the last chunk: the finish reason, the usage if asked for, [DONE]


def answer(words: Sequence[str], *, usage: bool) -> Answer:
    """The answer that says `words`; `usage` as with stream_options.include_usage."""
    extra: dict[str, Any] = {"usage": None} if usage else {}

    def event(delta: dict[str, str | None], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(_ENVELOPE | {"choices": [choice]} | extra)

    chunks = [event({"content": f"{word} "}, None) for word in words]
    chunks[0] = event({"role": "assistant", "content": f"{words[0]} ", "refusal": None}, None)
    counts = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
    totals = [_event(_ENVELOPE | {"choices": [], "usage": counts | _USAGE})] if usage else []
    return Answer(tuple(chunks), (event({}, "stop"), *totals, b"data: [DONE]\n\n"))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
