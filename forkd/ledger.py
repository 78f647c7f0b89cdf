"""The ledger: every client that was handed to us and is not done, and what becomes of those whose worker died.

An entry owns its fds: a duplicate of the client's, so that the client outlives a worker, and perhaps a memfd with data.
They are closed by `release`, which is the only way out of the ledger. The payload is kept until the board says that the
stream has begun (it is needed to give the handoff to another worker, whole), 256 MB in all.

Without `keep` (configuration: `ledger: false`) the fds are closed as soon as a worker has its own, and a dead worker's
clients are lost; the entry itself stays, because load is counted by it.
"""

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from forkd.board import Board, Kind, State
from forkd.peer import Peer

PAYLOADS_MAX_BYTES: Final = 256 << 20
_FREE: Final = int(State.FREE)
_GIVEN: Final = int(State.GIVEN)
ATTEMPTS_MAX: Final = 2
"""A handoff that was being handled when its worker died gets one more chance."""
TELLINGS_MAX: Final = 5
"""So many workers may die while they tell a client that its stream is over. What tells it is our own code, so that
their deaths are most likely not its doing, and a client that is told nothing is what must not be.
"""


class Verdict(NamedTuple):
    """This client is not to be served but to be told: the state it was left in, and the code."""

    state: State
    code: str


class InFlight:
    """One client in flight. `peer` is the worker that has it, None while it waits; `killed` counts those it killed."""

    __slots__ = (
        "attempt",
        "data_fd",
        "fd",
        "flags",
        "killed",
        "listener",
        "payload",
        "peer",
        "received_at",
        "slot",
        "verdict",
        "waits_since",
    )

    def __init__(
        self, slot: int, fd: int, data_fd: int, payload: bytes | None, flags: int, listener: int, received_at: float
    ) -> None:
        self.slot = slot
        self.fd = fd
        self.data_fd = data_fd
        self.payload = payload
        self.flags = flags
        self.listener = listener
        self.received_at = received_at
        self.attempt = 0
        self.killed = 0
        self.peer: Peer | None = None
        self.verdict: Verdict | None = None
        self.waits_since = received_at


class Ledger:
    """All clients in flight, by slot. A slot is a number below `capacity`, used again after its release."""

    def __init__(self, board: Board, capacity: int, *, keep: bool) -> None:
        self._board = board
        self._entries: list[InFlight | None] = []
        self._free: list[int] = []
        self._with_payload: list[InFlight] = []
        self._payload_bytes = 0
        self._keep = keep
        self.capacity = capacity
        self.count = 0
        self.peak = 0
        self.fds = 0
        """How many it holds: clients, and memfds with their data."""

    def admit(
        self,
        fd: int,
        data_fd: int,
        payload: bytes,
        flags: int,
        listener: int,
        received_at: float,
        kind: Kind = Kind.PLAIN,
    ) -> InFlight | None:
        """Enter a client, taking over `fd` and `data_fd` (-1: none); None, with the fds still the caller's, when
        full.
        """
        if self._free:
            slot = self._free.pop()
        elif len(self._entries) < self.capacity:
            slot = len(self._entries)
            self._entries.append(None)
        else:
            return None
        entry = InFlight(slot, fd, data_fd, payload, flags, listener, received_at)
        self._entries[slot] = entry
        self._board.kinds[slot] = kind
        self._board.states[slot] = _GIVEN
        self._with_payload.append(entry)
        self._payload_bytes += len(payload)
        self.fds += 2 if data_fd >= 0 else 1
        self.count += 1
        self.peak = max(self.peak, self.count)
        return entry

    def get(self, slot: int) -> InFlight | None:
        """The client in a slot."""
        return self._entries[slot] if slot < len(self._entries) else None

    def given(self, entry: InFlight) -> None:
        """A worker has its own fds now."""
        if not self._keep:
            self._close(entry)
            self._forget_payload(entry)

    def release(self, entry: InFlight) -> None:
        """Cross a client out: close its fds and free its slot."""
        self._close(entry)
        self._forget_payload(entry)
        self._board.states[entry.slot] = _FREE
        self._entries[entry.slot] = None
        self._free.append(entry.slot)
        self.count -= 1

    def sweep(self) -> int:
        """Forget payloads that nobody needs any more; called once a second.

        Returns how many were forgotten that would still be needed, because there are too many bytes of them: should
        their worker die, those clients are told so instead of being given to another.
        """
        states = self._board.states
        kept: list[InFlight] = []
        dropped = 0
        for entry in self._with_payload:
            if entry.payload is None:
                continue
            if entry.peer is not None and states[entry.slot] >= State.COMMITTED:
                self._forget_payload(entry)
                self._close_data(entry)
            elif entry.peer is not None and self._payload_bytes > PAYLOADS_MAX_BYTES:
                self._forget_payload(entry)
                dropped += 1
            else:
                kept.append(entry)
        self._with_payload = kept
        return dropped

    def orphans(self, peer: Peer) -> Iterator[InFlight]:
        """The clients of a dead worker, after its last reports were read; each is nobody's from now on."""
        for entry in self._entries:
            if entry is not None and entry.peer is peer:
                entry.peer = None
                yield entry

    def judge(self, entry: InFlight, killer: bool) -> str:
        """What becomes of an orphan: sets its verdict and returns "redispatched", "ended", "poison" or "closed".

        `killer`: the dead worker was handling just this slot. Only such a handoff is suspected of killing workers.
        """
        if entry.fd < 0:
            return "closed"
        state = State(self._board.states[entry.slot])
        if state in (State.FOREIGN, State.ENDED, State.FREE):
            return "closed"
        if killer:
            entry.killed += 1
        untold = state == State.GIVEN and entry.verdict is None and entry.killed < ATTEMPTS_MAX
        if self._board.kinds[entry.slot] != Kind.PLAIN and not (untold and entry.payload is not None):
            return "closed"  # it could only be told something, and nothing can be
        if entry.killed >= (ATTEMPTS_MAX if entry.verdict is None else TELLINGS_MAX):
            if entry.verdict is not None:  # even the telling kills
                return "closed"
            entry.verdict = Verdict(state, "poison" if state == State.GIVEN else "worker_lost")
            entry.killed = 0
            return "poison" if state == State.GIVEN else "ended"
        if entry.verdict is not None:
            entry.verdict = Verdict(state, entry.verdict.code)
            return "ended"
        if state == State.GIVEN and entry.payload is not None:
            return "redispatched"
        entry.verdict = Verdict(state, "worker_lost")
        entry.killed = 0
        return "ended"

    def _close(self, entry: InFlight) -> None:
        if entry.fd >= 0:
            os.close(entry.fd)
            entry.fd = -1
            self.fds -= 1
        self._close_data(entry)

    def _close_data(self, entry: InFlight) -> None:
        if entry.data_fd >= 0:
            os.close(entry.data_fd)
            entry.data_fd = -1
            self.fds -= 1

    def _forget_payload(self, entry: InFlight) -> None:
        if entry.payload is not None:
            self._payload_bytes -= len(entry.payload)
            entry.payload = None
