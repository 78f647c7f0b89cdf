"""What a handler is given and may yield: the public interface of ``provider: python``.

A handler is a function of yours that answers one stream. It takes a `Handoff` and yields text (`str`, or `bytes` in
UTF-8, cut anywhere) or what `event` makes. With ``def`` it is a plain generator and runs in a thread of its own; with
``async def`` it is an async generator and shares one asyncio loop with all others of its worker.

    from forkd.handler import Handoff, event

    def answer(handoff: Handoff):
        yield event("status", {"step": "searching"})
        yield f"You asked: {handoff.prompt}"

docs/handlers.md says the rest. Nothing but the names in `__all__` is meant to last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

__all__ = ["ClientRequest", "Event", "Handoff", "event"]

RESERVED_NAMES: Final = frozenset({"done", "error"})
_NAME_MAX_CHARS: Final = 128


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """The client's request as Apache saw it. Empty without an envelope (`SocketHandoffFormat envelope`)."""

    method: str = "GET"
    uri: str = ""
    host: str = ""
    remote_addr: str = ""
    """The client's address; behind a balancer the one that Apache found out."""
    protocol: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Those that `SocketHandoffRequestHeaders` names."""


@dataclass(slots=True)
class Handoff:
    """One handoff: what the application said, and who asks.

    data is the application's data as it was sent, with every key of its own; `{}` if it was no JSON object, and then
    `raw` is all there is. prompt, messages, model, system and user_id are the data's keys of these names, None where
    they are missing. request_id is the one that forkd's log, the client's response head and you share. backend is the
    name that the configuration gives to this backend.
    """

    request_id: str
    backend: str
    data: dict[str, Any] = field(default_factory=dict)
    raw: bytes = b""
    prompt: str | None = None
    messages: list[Any] | None = None
    model: str | None = None
    system: str | None = None
    user_id: str | int | None = None
    request: ClientRequest = field(default_factory=ClientRequest)
    gone: bool = False
    """True as soon as nobody listens any more. A plain generator that works for long between two yields looks here."""


@dataclass(frozen=True, slots=True)
class Event:
    """A named Server-Sent Event. Made by `event`."""

    name: str
    encoded: bytes


def event(name: str, data: object = None) -> Event:
    """An event for the client to tell apart from the text: `event: NAME` and `data:` with `data` as JSON.

    data is whatever JSON can hold; dataclasses, dates and UUIDs too. Raises TypeError if it is anything else, and
    ValueError for a name that is empty, has a control character in it, or is forkd's own (`error`, `done`).
    """
    if not isinstance(name, str):
        raise TypeError(f"an event's name is a string, not {type(name).__name__}")
    if not (name.isprintable() and 0 < len(name) <= _NAME_MAX_CHARS):
        raise ValueError(f"an event's name has 1 to {_NAME_MAX_CHARS} printable characters")
    if name in RESERVED_NAMES:
        raise ValueError(f"the event {name!r} is forkd's own: raise an exception, or return, and forkd sends it")
    return Event(name, b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data)))
