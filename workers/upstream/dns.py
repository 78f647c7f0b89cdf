"""Names to addresses, beside the loop: getaddrinfo(3) blocks, for seconds when a name server is gone.

An answer is kept for CACHE_SECS (getaddrinfo does not tell a record's own time to live). After that the next question
is put to the resolver again; should it fail, the old answer is used, since an address that worked a minute ago is worth
more than an error. Whoever asks while the same question is already out waits for that answer.

An address that a connection succeeded on goes to the front (`prefer`), so a family that leads nowhere costs its timeout
once and not for every connection.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from workers.loop import Loop
from workers.offload import Offload

CACHE_SECS: Final = 30.0
RETRY_SECS: Final = 1.0
"""How soon a name that failed is looked up again when an old answer stands in."""


class Address(NamedTuple):
    """What `socket` and `connect` need."""

    family: int
    sockaddr: Any


Answer: TypeAlias = Callable[[Sequence[Address], str], None]
"""Called with the addresses, or with none and what went wrong."""


def look_up(host: str, port: int) -> list[Address]:
    """Every address of a name, as the system orders them (RFC 6724). Blocks. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [Address(family, sockaddr) for family, _, _, _, sockaddr in found]


class _Entry:
    __slots__ = ("addresses", "fresh_until", "waiting")

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self.fresh_until = 0.0
        self.waiting: list[Answer] = []


class Resolver:
    """One worker's DNS. `offload` must be for this alone: a stuck lookup holds one of its threads."""

    def __init__(self, loop: Loop, offload: Offload, look_up: Callable[[str, int], list[Address]] = look_up) -> None:
        self._loop = loop
        self._offload = offload
        self._look_up = look_up
        self._entries: dict[tuple[str, int], _Entry] = {}

    def resolve(self, host: str, port: int, answer: Answer) -> None:
        """Call `answer`: at once from the cache or for a numeric address, else later."""
        entry = self._entries.get((host, port))
        if entry is None:
            entry = self._entries[host, port] = _Entry()
            numeric = _numeric(host, port)
            if numeric is not None:
                entry.addresses = [numeric]
                entry.fresh_until = float("inf")
        if entry.addresses and self._loop.now < entry.fresh_until:
            answer(entry.addresses, "")
            return
        entry.waiting.append(answer)
        if len(entry.waiting) == 1:
            self._offload.run(lambda: self._look_up(host, port), lambda found: self._resolved(entry, found))

    def prefer(self, host: str, port: int, address: Address) -> None:
        """A connection to this address succeeded: try it first."""
        entry = self._entries.get((host, port))
        if entry is not None and address in entry.addresses and entry.addresses[0] != address:
            entry.addresses = [address, *(other for other in entry.addresses if other != address)]

    def _resolved(self, entry: _Entry, found: list[Address] | Exception) -> None:
        fault = ""
        if isinstance(found, Exception):
            fault = (found.strerror if isinstance(found, OSError) else None) or str(found) or type(found).__name__
            entry.fresh_until = self._loop.now + RETRY_SECS
        elif not found:
            fault = "the name has no address"
        else:
            known = entry.addresses[:1]
            entry.addresses = [a for a in known if a in found] + [a for a in found if a not in known]
            entry.fresh_until = self._loop.now + CACHE_SECS
        waiting, entry.waiting = entry.waiting, []
        for answer in waiting:
            answer(entry.addresses, "" if entry.addresses else fault)


def _numeric(host: str, port: int) -> Address | None:
    """The address if `host` is one already."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return Address(found[0][0], found[0][4])
