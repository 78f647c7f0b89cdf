"""The board: shared memory in which workers say what they are doing, and which outlives them.

One anonymous mapping, made by the master before the first fork. Every cell has one writer at a time: a worker's row is
that worker's; a slot's state is the master's until the slot is given and its worker's from then on. Nobody locks:
a cell is one aligned machine word or one byte, and each state is stored *before* the act it names, so that whoever
reads it after a SIGKILL never believes less than what happened. What it may believe is more: a state whose act did
not come to pass. Every ending below is therefore chosen to be harmless in that case.

    state      means                                              if the worker dies now
    FREE       no stream                                          -
    GIVEN      nothing has happened                               give it to another worker, whole
    COMMITTED  side effects begun, no byte to the client          end it: 502
    OPENING    the head is being written                          end it: a 502 head and `event: error`
    OPEN       head out, last event whole                         end it: `event: error`
    PARTIAL    a short write left half an event                   end it: LF, then `event: error`
    FOREIGN    the client belongs to a program, or is a bare body close; say nothing (a bare body: by a reset)
    ENDED      done, unreported                                   close

In OPENING a 200 head may be out already: then the 502's lines are SSE fields of unknown names, which a parser ignores
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation).

The master writes on it too, a few times a second, for the process that serves the metrics: of itself a row, and of each
worker another. So that process need not ask the master anything, and tells the truth of a master that hangs.

A third byte per slot says which `exec` backend's program its client has (`forkd.programs.marks`), 0 if none. The slot's
worker stores it before it counts how many there are, so that of two workers that look at once none starts one too many.

Layout, each part with one writer: WORKERS_MAX rows of 128 bytes by the workers (cache lines of their own, so that
workers do not slow each other; what changes all the time is in the first), as many by the master about them, one by the
master about itself, POOLS_MAX shorter ones by it about the pools, then a byte of state, one of client kind and one for
programs per slot, NOTE_BYTES of text per worker, and by the master POOL_NAME_BYTES per pool and per worker.
"""

import mmap
from enum import IntEnum
from typing import Final, NamedTuple

from forkd.settings import COMMON, POOLS_MAX

WORKERS_MAX: Final = 4096
"""Rows for three generations of the most workers that may be configured; a page nobody writes to costs nothing."""
_ROW_WORDS: Final = 16
_WORD_BYTES: Final = 8
_FIGURES: Final = 8
"""Where a worker's figures begin in its row: the second cache line."""
NOTE_BYTES: Final = 256
_POOL_WORDS: Final = 4
_POOLS_AT: Final = (2 * WORKERS_MAX + 1) * _ROW_WORDS
POOL_NAME_BYTES: Final = 33
"""A name as `forkd.convert` accepts it, and a NUL."""
_STAGES: Final = ("starting", "running", "draining", "stopping")
_LIVES: Final = ("", "starting", "ready", "draining", "dead", "standby")


class State(IntEnum):
    """What has happened to a client so far; see the table above."""

    FREE = 0
    GIVEN = 1
    COMMITTED = 2
    OPENING = 3
    OPEN = 4
    PARTIAL = 5
    FOREIGN = 6
    ENDED = 7


class Kind(IntEnum):
    """What may be written to a client by somebody who knows nothing else of it."""

    PLAIN = 0
    """HTTP/1.1 in the clear, nothing sent before the handoff."""
    TLS = 1
    BARE = 2
    """The response head is out already, the body is not ours to end with words (fdpass)."""


class Figures(NamedTuple):
    """What a worker says of itself once a second, for whoever looks after it.

    oldest_ms is when the oldest of its streams was handed over (monotonic time), 0 if it has none. CPU and rate are of
    the second before. stuck is how many handlers go on though nobody listens.
    """

    rss_bytes: int = 0
    cpu_ms: int = 0
    oldest_ms: int = 0
    cpu_percent: float = 0.0
    streams_per_sec: float = 0.0
    stuck: int = 0


class Board:
    """The mapping and its views. `states`, `kinds` and `programs` are indexed by slot."""

    def __init__(self, slots: int) -> None:
        rows = (_POOLS_AT + POOLS_MAX * _POOL_WORDS) * _WORD_BYTES
        notes = rows + 3 * slots
        names = notes + WORKERS_MAX * NOTE_BYTES
        self.slots = slots
        self.memory = mmap.mmap(-1, names + (POOLS_MAX + WORKERS_MAX) * POOL_NAME_BYTES)
        whole = memoryview(self.memory)
        self.words = whole[:rows].cast("Q")
        self.states = whole[rows : rows + slots]
        self.kinds = whole[rows + slots : rows + 2 * slots]
        self.programs = whole[rows + 2 * slots : rows + 3 * slots]
        self.notes = whole[notes:names]
        self.pool_names = whole[names:]
        """Of the pools, and then of each worker's."""

    def row(self, index: int) -> "Row":
        """The row of the worker with this index."""
        return Row(self, index)

    def peer_row(self, index: int) -> "PeerRow":
        """The master's row about the worker with this index."""
        return PeerRow(self, index)

    def master_row(self) -> "MasterRow":
        """The master's row about itself."""
        return MasterRow(self)

    def pool_row(self, number: int) -> "PoolRow":
        """The master's row about a pool; below `MasterRow.pools`."""
        return PoolRow(self, number)


class Row:
    """One worker's cells. The worker writes them; the master reads them, and clears them before a fork.

    beat: a counter, one more each loop turn and at least once a second.
    current: the slot it is handling this instant plus one, or 0. A worker that dies with it set dies of that slot.
    streams: how many streams are live.
    totals: started, completed, failed, bytes sent, over its whole life; a second old at most.
    figures: memory, CPU and the like; a second old at most.
    note: what the operator should know of it in words, as a rule nothing. Who reads while it is written may find parts
    of two.
    """

    __slots__ = ("_at", "_note", "_words")

    def __init__(self, board: Board, index: int) -> None:
        self._words = board.words
        self._at = index * _ROW_WORDS
        self._note = board.notes[index * NOTE_BYTES : (index + 1) * NOTE_BYTES]

    def clear(self) -> None:
        """Forget the previous worker of this index."""
        for word in range(_ROW_WORDS):
            self._words[self._at + word] = 0
        self._note[0] = 0

    @property
    def beat(self) -> int:
        return self._words[self._at]

    def store_beat(self, count: int) -> None:
        self._words[self._at] = count

    @property
    def current(self) -> int:
        return self._words[self._at + 1]

    def store_current(self, slot_plus_one: int) -> None:
        self._words[self._at + 1] = slot_plus_one

    @property
    def streams(self) -> int:
        return self._words[self._at + 2]

    def store_streams(self, count: int) -> None:
        self._words[self._at + 2] = count

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(self._words[self._at + 3 : self._at + 7])

    def store_totals(self, started: int, completed: int, failed: int, sent_bytes: int) -> None:
        for word, total in enumerate((started, completed, failed, sent_bytes), 3):
            self._words[self._at + word] = total

    @property
    def rss_bytes(self) -> int:
        return self._words[self._at + _FIGURES]

    @property
    def figures(self) -> Figures:
        first = self._at + _FIGURES
        rss_bytes, cpu_ms, oldest_ms, cpu, rate, stuck = self._words[first : first + 6]
        return Figures(rss_bytes, cpu_ms, oldest_ms, cpu / 1000, rate / 1000, stuck)

    def store_figures(self, figures: Figures) -> None:
        rss_bytes, cpu_ms, oldest_ms, cpu, rate, stuck = figures
        values = (rss_bytes, cpu_ms, oldest_ms, round(cpu * 1000), round(rate * 1000), stuck)  # a cell has no fractions
        for word, value in enumerate(values, self._at + _FIGURES):
            self._words[word] = value

    @property
    def note(self) -> str:
        return bytes(self._note).partition(b"\0")[0].decode(errors="replace")

    def store_note(self, note: str) -> None:
        data = note.encode(errors="replace")[: NOTE_BYTES - 1] + b"\0"
        self._note[: len(data)] = data

    def cell_of_current(self) -> tuple[memoryview, int]:
        """The view and the index of `current`, for the worker's hot path (a call costs more than the store)."""
        return self._words, self._at + 1


class PeerRow:
    """What the master says of one worker. The master writes; `restarts` outlives the workers of this index.

    life: what `forkd.peer.Life` calls it, or "" when there is none. streams: how many it was given and are not done.
    late: its heartbeat is missing, so it gets no handoffs just now. pool: the name of the one that it serves.
    """

    __slots__ = ("_at", "_name", "_words")

    def __init__(self, board: Board, index: int) -> None:
        self._words = board.words
        self._at = (WORKERS_MAX + index) * _ROW_WORDS
        self._name = _name_cell(board, POOLS_MAX + index)

    def store_born(self, pid: int, generation: int, pool: str = COMMON) -> None:
        """A new worker has this index. Its life comes last, so that whoever sees one sees whose it is."""
        _store_name(self._name, pool)
        self._words[self._at + 1] = pid
        self._words[self._at + 2] = generation
        self.store("starting", 0, late=False)

    def store(self, life: str, streams: int, *, late: bool) -> None:
        self._words[self._at + 3] = streams
        self._words[self._at + 4] = late
        self._words[self._at] = _LIVES.index(life)

    def store_gone(self, *, asked: bool) -> None:
        """Nobody has this index now. Unless the worker was `asked` to go, whoever comes next is a restart."""
        self._words[self._at] = 0
        self._words[self._at + 5] += not asked

    @property
    def life(self) -> str:
        return _LIVES[self._words[self._at]]

    @property
    def pid(self) -> int:
        return self._words[self._at + 1]

    @property
    def generation(self) -> int:
        return self._words[self._at + 2]

    @property
    def streams(self) -> int:
        return self._words[self._at + 3]

    @property
    def late(self) -> bool:
        return bool(self._words[self._at + 4])

    @property
    def restarts(self) -> int:
        return self._words[self._at + 5]

    @property
    def pool(self) -> str:
        return _name_in(self._name)


class PoolRow:
    """What the master says of one pool of the current generation, as often as of itself.

    ready: its workers that take handoffs, of `wanted` ones. queued: clients that wait for one of them. While a reload
    changes the pools, who reads may find parts of two.
    """

    __slots__ = ("_at", "_name", "_words")

    def __init__(self, board: Board, number: int) -> None:
        self._words = board.words
        self._at = _POOLS_AT + number * _POOL_WORDS
        self._name = _name_cell(board, number)

    def store(self, name: str, *, ready: int, wanted: int, queued: int) -> None:
        _store_name(self._name, name)
        for word, value in enumerate((ready, wanted, queued), self._at):
            self._words[word] = value

    @property
    def name(self) -> str:
        return _name_in(self._name)

    @property
    def ready(self) -> int:
        return self._words[self._at]

    @property
    def wanted(self) -> int:
        return self._words[self._at + 1]

    @property
    def queued(self) -> int:
        return self._words[self._at + 2]


def _name_cell(board: Board, number: int) -> memoryview:
    return board.pool_names[number * POOL_NAME_BYTES : (number + 1) * POOL_NAME_BYTES]


def _store_name(cell: memoryview, name: str) -> None:
    data = name.encode()[: POOL_NAME_BYTES - 1] + b"\0"
    cell[: len(data)] = data


def _name_in(cell: memoryview) -> str:
    return bytes(cell).partition(b"\0")[0].decode()


class MasterRow:
    """What the master says of itself, several times a second.

    beat_ms: monotonic time. stage: "starting" until the first beat, then what `forkd.master.Stage` calls it. ready:
    workers that take handoffs, of `wanted` ones (0: not told). streams, of which `queued` wait for a worker; at most
    `capacity`. room: how many more handoffs would be taken this instant. pools: how many there are.
    """

    __slots__ = ("_at", "_words")

    def __init__(self, board: Board) -> None:
        self._words = board.words
        self._at = 2 * WORKERS_MAX * _ROW_WORDS

    def store(
        self,
        *,
        beat_ms: int,
        stage: str,
        generation: int,
        ready: int,
        streams: int,
        queued: int,
        peak: int,
        capacity: int,
        room: int,
        wanted: int = 0,
        pools: int = 0,
    ) -> None:
        stage_number = _STAGES.index(stage)
        values = (beat_ms, stage_number, generation, ready, streams, queued, peak, capacity, room, wanted, pools)
        for word, value in enumerate(values, self._at):
            self._words[word] = value

    @property
    def beat_ms(self) -> int:
        return self._words[self._at]

    @property
    def stage(self) -> str:
        return _STAGES[self._words[self._at + 1]]

    @property
    def generation(self) -> int:
        return self._words[self._at + 2]

    @property
    def ready(self) -> int:
        return self._words[self._at + 3]

    @property
    def streams(self) -> int:
        return self._words[self._at + 4]

    @property
    def queued(self) -> int:
        return self._words[self._at + 5]

    @property
    def peak(self) -> int:
        return self._words[self._at + 6]

    @property
    def capacity(self) -> int:
        return self._words[self._at + 7]

    @property
    def room(self) -> int:
        return self._words[self._at + 8]

    @property
    def wanted(self) -> int:
        return self._words[self._at + 9]

    @property
    def pools(self) -> int:
        return self._words[self._at + 10]
