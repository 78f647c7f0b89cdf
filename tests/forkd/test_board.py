"""The board: shared memory that outlives who wrote on it."""

import os
import signal

from forkd.board import WORKERS_MAX, Board, Figures, Kind, State
from forkd.settings import COMMON, POOLS_MAX


def test_it_starts_empty() -> None:
    board = Board(10)
    assert board.slots == len(board.states) == len(board.kinds) == 10
    assert set(board.states) == {State.FREE}
    assert set(board.kinds) == {Kind.PLAIN}
    row = board.row(1)
    assert (row.beat, row.current, row.streams, row.totals) == (0, 0, 0, (0, 0, 0, 0))


def test_no_two_cells_overlap() -> None:
    board = Board(3)
    for index in (0, 1, WORKERS_MAX - 1):
        row = board.row(index)
        row.store_beat(1000 + index)
        row.store_current(2000 + index)
        row.store_streams(3000 + index)
        row.store_totals(1, 2, 3, 2**63 + index)
        row.store_figures(Figures(2**40 + index, 8, 9, 99.875, 1234.5, 7))
        row.store_note(f"note {index}")
        peer = board.peer_row(index)
        peer.store_born(4000 + index, 5, f"pool-{index}")
        peer.store("ready", 6, late=True)
    board.master_row().store(
        beat_ms=1,
        stage="draining",
        generation=2,
        ready=3,
        streams=4,
        queued=5,
        peak=6,
        capacity=7,
        room=8,
        wanted=9,
        pools=10,
    )
    for number in (0, POOLS_MAX - 1):
        board.pool_row(number).store(f"{number:x>32}", ready=100 + number, wanted=200 + number, queued=300 + number)
    for slot in range(3):
        board.states[slot] = State.PARTIAL
        board.kinds[slot] = Kind.BARE
    for index in (0, 1, WORKERS_MAX - 1):
        row = board.row(index)
        assert (row.beat, row.current, row.streams) == (1000 + index, 2000 + index, 3000 + index)
        assert row.totals == (1, 2, 3, 2**63 + index)
        assert row.figures == (2**40 + index, 8, 9, 99.875, 1234.5, 7)
        assert row.note == f"note {index}"
        assert row.rss_bytes == 2**40 + index
        peer = board.peer_row(index)
        assert (peer.life, peer.pid, peer.generation, peer.streams, peer.late) == ("ready", 4000 + index, 5, 6, True)
        assert peer.pool == f"pool-{index}"
    for number in (0, POOLS_MAX - 1):
        pool = board.pool_row(number)
        assert (pool.name, pool.ready, pool.wanted) == (f"{number:x>32}", 100 + number, 200 + number)
        assert pool.queued == 300 + number
    master = board.master_row()
    assert (master.beat_ms, master.stage, master.generation, master.ready) == (1, "draining", 2, 3)
    assert (master.streams, master.queued, master.peak, master.capacity, master.room) == (4, 5, 6, 7, 8)
    assert (master.wanted, master.pools) == (9, 10)
    assert bytes(board.states) == bytes([State.PARTIAL] * 3)
    assert bytes(board.kinds) == bytes([Kind.BARE] * 3)
    assert board.row(2).beat == board.row(2).current == 0


def test_a_row_can_be_cleared_for_the_next_worker_of_its_index() -> None:
    board = Board(1)
    board.row(4).store_beat(9)
    board.row(5).store_beat(10)
    board.row(4).store_totals(1, 1, 1, 1)
    board.row(4).store_figures(Figures(1, 1, 1, 1.0, 1.0))
    board.row(4).store_note("stuck")
    board.row(4).clear()
    assert board.row(4).note == ""
    assert board.row(4).beat == 0
    assert board.row(4).figures == Figures()
    assert board.row(4).totals == (0, 0, 0, 0)
    assert board.row(5).beat == 10


def test_restarts_outlive_the_workers_they_count() -> None:
    peer = Board(1).peer_row(3)
    for asked in (False, True, False):
        peer.store_born(1, 1)
        assert peer.life == "starting"
        peer.store_gone(asked=asked)
        assert peer.life == ""
    assert peer.restarts == 2


def test_a_note_has_an_end_however_long_it_is() -> None:
    board = Board(1)
    board.row(1).store_note("second")
    board.row(0).store_note("☃" * 1000)
    assert board.row(0).note == "☃" * 85  # of three bytes each
    board.row(0).store_note("short")
    assert (board.row(0).note, board.row(1).note) == ("short", "second")


def test_a_pools_name_is_that_of_the_last_one() -> None:
    board = Board(1)
    for name in ("a-long-name", "short"):
        board.pool_row(1).store(name, ready=1, wanted=2, queued=3)
        board.peer_row(1).store_born(1, 1, name)
        assert board.pool_row(1).name == board.peer_row(1).pool == name
    board.peer_row(1).store_born(1, 1)
    assert board.peer_row(1).pool == COMMON


def test_figures_have_three_decimals() -> None:
    row = Board(1).row(1)
    assert row.figures == Figures() == (0, 0, 0, 0.0, 0.0, 0)
    row.store_figures(Figures(cpu_percent=12.34567, streams_per_sec=0.0004))
    assert (row.figures.cpu_percent, row.figures.streams_per_sec) == (12.346, 0.0)


def test_the_hot_cell_is_the_slot_in_hand() -> None:
    row = Board(1).row(6)
    words, at = row.cell_of_current()
    words[at] = 42
    assert row.current == 42
    assert row.beat == row.streams == 0


def test_what_a_killed_process_wrote_is_there_for_the_others() -> None:
    board = Board(100)
    pid = os.fork()
    if pid == 0:
        board.row(1).store_current(78)
        board.states[77] = State.OPENING
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert board.row(1).current == 78
    assert board.states[77] == State.OPENING


def test_states_are_in_the_order_of_what_has_happened() -> None:
    """The ledger compares them."""
    assert State.GIVEN < State.COMMITTED < State.OPENING < State.OPEN < State.ENDED
    assert State.FREE == 0
