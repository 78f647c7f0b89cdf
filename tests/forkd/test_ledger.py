"""The ledger: who owns the fds, how long a payload is kept, and what becomes of an orphan."""

import os
import socket
from collections.abc import Iterator

import pytest

from forkd import ledger as ledger_module
from forkd.board import Board, Kind, State
from forkd.ledger import TELLINGS_MAX, InFlight, Ledger, Verdict
from forkd.peer import Peer

BEGUN = (State.OPENING, State.OPEN, State.PARTIAL)


@pytest.fixture
def board() -> Board:
    return Board(8)


@pytest.fixture
def ledger(board: Board) -> Ledger:
    return Ledger(board, 4, keep=True)


@pytest.fixture
def peer(board: Board) -> Iterator[Peer]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield Peer(1, 1, 0, -1, ours, board.row(1))


def new_fd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def admit(ledger: Ledger, payload: bytes = b"{}", data_fd: int = -1) -> InFlight:
    entry = ledger.admit(new_fd(), data_fd, payload, 0, 0, 1.0)
    assert entry is not None
    return entry


def test_release_is_the_way_out_for_every_fd_and_frees_the_slot(ledger: Ledger, board: Board) -> None:
    before = len(os.listdir("/proc/self/fd"))
    entries = [admit(ledger, data_fd=new_fd()) for _ in range(4)]
    assert [entry.slot for entry in entries] == [0, 1, 2, 3]
    assert list(board.states[:4]) == [State.GIVEN] * 4
    assert (ledger.count, ledger.peak) == (4, 4)
    assert ledger.fds == len(os.listdir("/proc/self/fd")) - before == 8
    for entry in entries:
        ledger.release(entry)
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(board.states[:4]) == [State.FREE] * 4
    assert (ledger.count, ledger.peak, ledger.fds) == (0, 4, 0)
    assert ledger.get(2) is None
    ledger.release(admit(ledger))


def test_a_full_ledger_leaves_the_fds_with_the_caller(ledger: Ledger) -> None:
    entries = [admit(ledger) for _ in range(4)]
    fd = new_fd()
    assert ledger.admit(fd, -1, b"", 0, 0, 1.0) is None
    assert is_open(fd)
    os.close(fd)
    ledger.release(entries[1])
    again = admit(ledger)
    assert again.slot == 1
    for entry in (entries[0], again, entries[2], entries[3]):
        ledger.release(entry)


def test_without_keep_the_fds_go_as_soon_as_a_worker_has_its_own(board: Board, peer: Peer) -> None:
    ledger = Ledger(board, 4, keep=False)
    entry = admit(ledger, data_fd=new_fd())
    fds = (entry.fd, entry.data_fd)
    ledger.given(entry)
    assert not any(map(is_open, fds))
    assert (ledger.count, ledger.fds) == (1, 0)
    assert ledger.judge(entry, killer=False) == "closed"
    ledger.release(entry)
    assert (ledger.count, ledger.fds) == (0, 0)


def test_the_payload_is_kept_until_the_stream_has_begun(ledger: Ledger, board: Board, peer: Peer) -> None:
    waiting, given, begun = (admit(ledger, data_fd=new_fd()) for _ in range(3))
    for entry in (given, begun):
        entry.peer = peer
    board.states[begun.slot] = State.COMMITTED
    assert ledger.sweep() == 0
    assert waiting.payload == given.payload == b"{}"
    assert begun.payload is None
    assert begun.data_fd == -1
    assert is_open(begun.fd)
    assert ledger.fds == 5
    for entry in (waiting, given, begun):
        ledger.release(entry)


def test_too_many_bytes_of_payloads(ledger: Ledger, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "PAYLOADS_MAX_BYTES", 100)
    entries = [admit(ledger, b"x" * 60) for _ in range(3)]
    for entry in entries:
        entry.peer = peer
    assert ledger.sweep() == 2  # the oldest go first: they are the likeliest to have begun by now
    assert [entry.payload is None for entry in entries] == [True, True, False]
    assert ledger.judge(entries[0], killer=False) == "ended"
    assert entries[0].verdict == (State.GIVEN, "worker_lost")
    for entry in entries:
        ledger.release(entry)


def test_orphans_are_those_of_the_dead_worker_and_nobodys_from_then_on(ledger: Ledger, peer: Peer) -> None:
    mine, other, waiting = (admit(ledger) for _ in range(3))
    mine.peer = peer
    other.peer = Peer(2, 1, 0, -1, peer.channel, peer.row)
    assert list(ledger.orphans(peer)) == [mine]
    assert mine.peer is None
    assert other.peer is not None
    for entry in (mine, other, waiting):
        ledger.release(entry)


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (State.GIVEN, "redispatched"),
        (State.COMMITTED, "ended"),
        (State.OPENING, "ended"),
        (State.OPEN, "ended"),
        (State.PARTIAL, "ended"),
        (State.FOREIGN, "closed"),
        (State.ENDED, "closed"),
    ],
)
def test_what_becomes_of_an_orphan(ledger: Ledger, board: Board, state: State, outcome: str) -> None:
    entry = admit(ledger)
    board.states[entry.slot] = state
    assert ledger.judge(entry, killer=False) == outcome
    assert entry.verdict == ((state, "worker_lost") if outcome == "ended" else None)
    ledger.release(entry)


@pytest.mark.parametrize("kind", [Kind.TLS, Kind.BARE])
def test_a_client_that_nobody_knows_how_to_speak_to_is_closed(ledger: Ledger, board: Board, kind: Kind) -> None:
    entry = admit(ledger)
    board.kinds[entry.slot] = kind
    for state in (State.COMMITTED, State.OPENING, State.OPEN, State.PARTIAL, State.FOREIGN, State.ENDED):
        board.states[entry.slot] = state
        assert ledger.judge(entry, killer=False) == "closed"
    ledger.release(entry)
    assert board.kinds[admit(ledger).slot] == Kind.PLAIN  # whoever has the slot next


def test_a_bare_body_that_has_not_begun_is_given_on_whole(ledger: Ledger, board: Board) -> None:
    entry = ledger.admit(new_fd(), -1, b"", 0, 0, 1.0, Kind.BARE)
    assert entry is not None
    assert board.kinds[entry.slot] == Kind.BARE
    assert [ledger.judge(entry, killer=True) for _ in range(2)] == ["redispatched", "closed"]  # poison cannot be told
    ledger.release(entry)


def test_a_bare_body_that_was_only_to_be_told_is_closed(ledger: Ledger) -> None:
    entry = ledger.admit(new_fd(), -1, b"", 0, 0, 1.0, Kind.BARE)
    assert entry is not None
    entry.verdict = Verdict(State.GIVEN, "bad_handoff")
    assert ledger.judge(entry, killer=False) == "closed"
    ledger.release(entry)


def test_the_second_worker_that_a_handoff_kills_makes_it_poison(ledger: Ledger) -> None:
    entry = admit(ledger)
    assert ledger.judge(entry, killer=True) == "redispatched"
    assert ledger.judge(entry, killer=False) == "redispatched"  # this time it was innocent
    assert ledger.judge(entry, killer=True) == "poison"
    assert entry.verdict == (State.GIVEN, "poison")
    ledger.release(entry)


def test_innocents_are_given_on_however_many_workers_die(ledger: Ledger) -> None:
    entry = admit(ledger)
    assert {ledger.judge(entry, killer=False) for _ in range(10)} == {"redispatched"}
    ledger.release(entry)


@pytest.mark.parametrize("state", BEGUN)
def test_a_killer_that_had_begun_is_told_and_given_up_only_when_the_telling_kills_again_and_again(
    ledger: Ledger, board: Board, state: State
) -> None:
    entry = admit(ledger)
    board.states[entry.slot] = state
    assert ledger.judge(entry, killer=True) == "ended"
    assert {ledger.judge(entry, killer=True) for _ in range(TELLINGS_MAX - 1)} == {"ended"}
    assert ledger.judge(entry, killer=False) == "ended"
    assert ledger.judge(entry, killer=True) == "closed"
    ledger.release(entry)


def test_a_verdict_follows_the_state_it_is_told_in(ledger: Ledger, board: Board) -> None:
    """The one who was to tell died amid the telling."""
    entry = admit(ledger)
    assert [ledger.judge(entry, killer=True) for _ in range(2)] == ["redispatched", "poison"]
    board.states[entry.slot] = State.OPENING
    assert ledger.judge(entry, killer=False) == "ended"
    assert entry.verdict == (State.OPENING, "poison")
    board.states[entry.slot] = State.ENDED
    assert ledger.judge(entry, killer=False) == "closed"
    ledger.release(entry)
