"""What is read of an event of Chat Completions. All else in it is passed over."""

from typing import Any

import msgspec


class Delta(msgspec.Struct, gc=False):
    """What one choice has grown by."""

    content: str | list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: Any = None


class Choice(msgspec.Struct, gc=False):
    """One of the answers that were asked for: forkd asks for one."""

    delta: Delta | None = None
    finish_reason: str | None = None
    index: int = 0
    text: str | None = None


class Counted(msgspec.Struct, gc=False):
    """The tokens so far."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Groq(msgspec.Struct, gc=False):
    """Where Groq puts its count."""

    usage: Counted | None = None


class Chunk(msgspec.Struct, gc=False):
    """One event."""

    choices: list[Choice] | None = None
    usage: Counted | None = None
    error: Any = None
    x_groq: Groq | None = None


class Trouble(msgspec.Struct):
    """What else an event may be."""

    error: Any = None
    object: str | None = None
    type: str | None = None
    code: str | int | None = None
