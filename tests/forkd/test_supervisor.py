"""The supervisor: births, deaths, hearts. Workers are real forks of this process that do what a test says."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkd import channel
from forkd.board import Board, State
from forkd.boot import Boot
from forkd.channel import Assignment, Down, Up
from forkd.dispatcher import Dispatcher
from forkd.generations import BACKOFF_MAX_SECS
from forkd.ledger import Ledger
from forkd.logs import Logs, Sink
from forkd.metrics import Metrics
from forkd.peer import Life, Peer
from forkd.selector import Ready, Selector
from forkd.settings import COMMON, Server, Settings, Workers
from forkd.supervisor import LATE_SECS, TICK_SECS, Supervisor
from tests.harness import fail, wait_for

Run = Callable[[Boot], None]


def ready(boot: Boot) -> None:
    """A worker that is ready, does nothing, and goes when it is told to."""
    boot.channel.setblocking(True)
    boot.channel.send(channel.pack_up(Up.READY))
    while True:
        message = boot.channel.recv(65536)
        if not message or channel.parse_down(message)[0].kind in (Down.DRAIN, Down.STOP):
            return


def deaf(boot: Boot) -> None:
    """A worker that is ready and then shows no sign of life."""
    boot.channel.send(channel.pack_up(Up.READY))
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    while True:
        signal.pause()


def stillborn(_boot: Boot) -> None:
    os._exit(7)


class House:
    """A supervisor with its surroundings, whose loop is turned by hand."""

    def __init__(self, directory: Path, run: Run) -> None:
        self.selector: Selector[Ready] = Selector(fail)
        self.log = directory / "log"
        self.sink = Sink(str(self.log))
        board = Board(1000)
        self.board = board
        settings = Settings(server=Server(), workers=Workers(timeout_secs=10))
        logs = Logs(self.sink, "debug", "pretty", access=True)
        metrics = Metrics(None, "master")
        self.supervisor = Supervisor(self.selector, board, settings, logs, metrics, None, run)
        self.ledger = Ledger(board, 1000, keep=True)
        self.dispatcher = Dispatcher(
            self.ledger, board, metrics, logs.logger, settings.server, self.supervisor.watch_full
        )
        self.dispatcher.peers = self.supervisor.peers
        self.supervisor.dispatcher = self.dispatcher

    @property
    def peers(self) -> list[Peer]:
        return self.supervisor.peers

    def turn_until(self, condition: Callable[[], object], what: str) -> None:
        """Serve events until `condition()` holds."""
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, f"never happened: {what}\n{self.log.read_text()}"
            self.selector.serve(self.selector.select(0.05))

    def receive(self, payload: bytes = b"{}", listener: int = 0) -> socket.socket:
        client, server = socket.socketpair()
        self.dispatcher.receive(server.detach(), -1, payload, 0, listener, 0.0)
        self.dispatcher.dispatch()
        return client

    def start(self, count: int, heavy: int = 0) -> None:
        """Have so many workers, ready, and so many in a pool for listener 1."""
        wanted = self.supervisor.generations.current.wanted
        wanted[COMMON] = count
        if heavy:
            wanted["heavy"] = heavy
            self.dispatcher.configure(Server(), (COMMON, "heavy"))
        self.supervisor.maintain(time.monotonic())
        self.turn_until(lambda: self.supervisor.complete, "all are ready")

    def close(self) -> None:
        self.supervisor.generations.current.wanted.clear()
        self.supervisor.kill()
        self.turn_until(lambda: not self.peers, "all are gone")
        self.dispatcher.give_up_all("shutdown")
        self.selector.close()
        os.close(self.sink.fd)


@contextlib.contextmanager
def house(directory: Path, run: Run) -> Iterator[House]:
    """A house that leaves no fd and no child behind."""
    before = len(os.listdir("/proc/self/fd"))
    made = House(directory, run)
    try:
        yield made
    finally:
        made.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_workers_are_born_become_ready_and_go_when_told(tmp_path: Path) -> None:
    with house(tmp_path, ready) as own:
        own.start(3)
        assert [peer.index for peer in own.peers] == [1, 2, 3]
        own.supervisor.drain()
        assert [peer.life for peer in own.peers] == [Life.DRAINING] * 3
        own.turn_until(lambda: not own.peers, "all are gone")
        assert "exited" not in own.log.read_text()  # they were asked to


def test_a_worker_owns_nothing_of_the_masters(tmp_path: Path) -> None:
    def tell_fds(boot: Boot) -> None:
        (tmp_path / "fds").write_text(" ".join(os.listdir("/proc/self/fd")))
        ready(boot)

    with house(tmp_path, tell_fds) as own:
        client, server = socket.socketpair()
        own.start(1)
        # Its channel, the log, the three of every process, and the one that lists them (and was of the file above).
        assert len((tmp_path / "fds").read_text().split()) == 6
        client.close()
        server.close()


def test_a_dead_worker_is_replaced_at_once_under_its_index(tmp_path: Path) -> None:
    with house(tmp_path, ready) as own:
        own.start(3)
        victim = own.peers[1]
        os.kill(victim.pid, signal.SIGKILL)
        own.turn_until(lambda: victim not in own.peers, "its death is seen")
        own.turn_until(lambda: own.supervisor.ready == 3, "another is ready")
        assert sorted(peer.index for peer in own.peers) == [1, 2, 3]
        assert "was killed by SIGKILL; streams: none in flight" in own.log.read_text()


def test_deaths_before_ready_back_off_and_a_wave_counts_once(tmp_path: Path) -> None:
    with house(tmp_path, stillborn) as own:
        own.supervisor.generations.current.wanted[COMMON] = 4
        delays = []
        now = time.monotonic()
        for _ in range(9):
            own.supervisor.maintain(now)
            assert len(own.peers) == 4
            own.turn_until(lambda: not own.peers, "all are dead")
            died = time.monotonic()
            # The clock is turned forward by hand to where the next is born.
            delay = next(delay for delay in (0.25 * 2**power for power in range(10)) if births(own, died + delay))
            delays.append(min(delay, BACKOFF_MAX_SECS))
            own.turn_until(lambda: not own.peers, "all are dead")
            own.supervisor.generations.current.next_birth = now = 0.0  # as if the time had passed
        assert delays == sorted(delays)
        assert delays[0] <= 0.5
        assert delays[-1] == BACKOFF_MAX_SECS


def births(own: House, now: float) -> bool:
    own.supervisor.maintain(now)
    return bool(own.peers)


def test_reports_of_a_worker_that_died_with_messages_unread_are_heard(tmp_path: Path) -> None:
    """The kernel says ECONNRESET before it gives out what the dead worker had said."""

    def report_and_die(boot: Boot) -> None:
        boot.channel.setblocking(True)
        boot.channel.send(channel.pack_up(Up.READY))
        boot.channel.recv(65536, socket.MSG_PEEK)
        boot.channel.send(channel.pack_up(Up.FINISHED, [(0, 1)]))
        os.kill(os.getpid(), signal.SIGKILL)

    with house(tmp_path, report_and_die) as own:
        own.start(1)
        victim = own.peers[0]
        own.supervisor.generations.current.wanted[COMMON] = 0
        client = own.receive()
        look = os.WEXITED | os.WNOWAIT | os.WNOHANG
        wait_for(lambda: os.waitid(os.P_PID, victim.pid, look), "it has reported and died")
        own.supervisor.on_death(victim)  # not a turn of the loop in between: the report is read after the death
        assert own.ledger.count == 0
        assert "streams: none in flight" in own.log.read_text()
        client.close()


def test_a_silent_heart_makes_late_then_aborted_then_killed(tmp_path: Path) -> None:
    with house(tmp_path, deaf) as own:
        own.start(1)
        (peer,) = own.peers
        for _ in range(int(LATE_SECS / TICK_SECS) - 1):
            own.supervisor.tick(time.monotonic())
        assert not peer.late
        own.supervisor.tick(time.monotonic())
        assert peer.late
        assert own.supervisor.ready == 0
        peer.row.store_beat(1)
        own.supervisor.tick(time.monotonic())
        assert not peer.late  # it lives after all
        for _ in range(int(10 / TICK_SECS)):
            own.supervisor.tick(time.monotonic())
        assert peer.killed_at_tick
        assert "silent for 10 s: ending it" in own.log.read_text()
        own.supervisor.generations.current.wanted[COMMON] = 0
        for _ in range(int(1 / TICK_SECS)):
            assert peer in own.peers
            own.supervisor.tick(time.monotonic())
        own.turn_until(lambda: not own.peers, "it is dead")
        assert "was killed by SIGKILL" in own.log.read_text()  # it had ignored SIGABRT


def test_one_more_and_one_fewer_but_never_none(tmp_path: Path) -> None:
    with house(tmp_path, ready) as own:
        own.start(2)
        own.peers[0].active = 3
        own.supervisor.resize(1, time.monotonic())
        own.turn_until(lambda: own.supervisor.ready == 3, "a third is ready")
        for _ in range(3):
            own.supervisor.resize(-1, time.monotonic())
        own.turn_until(lambda: len(own.peers) == 1, "one is left")
        assert own.peers[0].active == 3  # the busiest
        assert own.supervisor.wanted == 1


def test_a_worker_that_was_sent_sigterm_is_replaced(tmp_path: Path) -> None:
    def leave_when_asked(boot: Boot) -> None:
        signal.signal(signal.SIGTERM, lambda _number, _frame: boot.channel.send(channel.pack_up(Up.DRAINING)))
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        ready(boot)

    with house(tmp_path, leave_when_asked) as own:
        own.start(1)
        (first,) = own.peers
        os.kill(first.pid, signal.SIGTERM)
        own.turn_until(lambda: first not in own.peers and own.supervisor.ready == 1, "another is there")
        assert first.told == Down.DRAIN


def test_during_a_drain_a_worker_is_born_for_the_orphans_of_a_dead_one(tmp_path: Path) -> None:
    with house(tmp_path, ready) as own:
        own.start(2)
        clients = [own.receive() for _ in range(4)]
        victim, other = own.peers
        os.kill(victim.pid, signal.SIGSTOP)  # they would be gone at once: they have no streams that hold them
        os.kill(other.pid, signal.SIGSTOP)
        own.supervisor.drain()
        os.kill(victim.pid, signal.SIGKILL)
        own.turn_until(lambda: own.supervisor.ready == 1, "a third is born, though the second is still there")
        own.turn_until(lambda: not own.dispatcher.queued, "it has the orphans")
        assert sum(peer.active for peer in own.peers if peer.life is Life.READY) == 2
        os.kill(other.pid, signal.SIGCONT)
        for client in clients:
            client.close()


def test_nobody_is_born_once_the_rest_is_being_killed(tmp_path: Path) -> None:
    with house(tmp_path, ready) as own:
        own.start(2)
        client = own.receive()
        own.board.states[0] = State.PARTIAL
        own.supervisor.stop()
        own.supervisor.kill()
        own.turn_until(lambda: not own.peers, "all are dead")
        own.supervisor.maintain(time.monotonic())
        assert not own.peers
        own.dispatcher.give_up_all("shutdown")
        assert client.recv(1) == b""
        client.close()


def test_a_worker_that_cannot_be_watched_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pidfd(_pid: int) -> int:
        raise OSError(24, "Too many open files")

    with house(tmp_path, ready) as own:
        own.supervisor.generations.current.wanted[COMMON] = 1
        with monkeypatch.context() as patch:
            patch.setattr(os, "pidfd_open", no_pidfd)
            own.supervisor.maintain(time.monotonic())
        assert not own.peers
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        assert "cannot start a worker: Too many open files" in own.log.read_text()


def test_a_full_channel_is_watched_until_it_takes_messages(tmp_path: Path) -> None:
    def read_when_told(boot: Boot) -> None:
        boot.channel.setblocking(True)
        boot.channel.send(channel.pack_up(Up.READY))
        signal.sigwait([signal.SIGUSR1])
        while boot.channel.recv(65536):
            pass

    with house(tmp_path, read_when_told) as own:
        own.start(1)
        clients = []
        while not own.dispatcher.queued:
            clients.append(own.receive())
        (peer,) = own.peers
        assert peer.full
        os.kill(peer.pid, signal.SIGUSR1)
        own.turn_until(lambda: not own.dispatcher.queued and not peer.full, "it takes messages again")
        assert peer.active == len(clients)
        for client in clients:
            client.close()


def test_a_message_is_told_again_with_each_tick(tmp_path: Path) -> None:
    with house(tmp_path, ready) as own:
        own.start(1)
        (peer,) = own.peers
        os.kill(peer.pid, signal.SIGSTOP)
        with contextlib.suppress(BlockingIOError):
            while True:
                channel.send_down(peer.channel, Assignment(9, 1, Down.ASSIGN, 0, 0, 0.0), b"x", ())
        own.supervisor.generations.current.wanted[COMMON] = 0
        peer.tell(Down.DRAIN)
        assert peer.untold
        os.kill(peer.pid, signal.SIGCONT)

        def ticked() -> bool:
            own.supervisor.tick(time.monotonic())
            return not own.peers

        own.turn_until(ticked, "it was told and has gone")
        assert "is silent for" not in own.log.read_text()


def test_a_worker_that_does_not_get_ready_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    def hang(boot: Boot) -> None:
        boot.channel.setblocking(True)
        while True:
            signal.pause()

    with house(tmp_path, hang) as own:
        own.supervisor.maintain(time.monotonic())
        assert own.peers
        own.supervisor.drain()
        own.turn_until(lambda: not own.peers, "it is gone")
        assert "was killed" not in own.log.read_text()  # nothing to report: nobody lost anything


def test_pools_share_the_numbers_but_not_the_workers(tmp_path: Path) -> None:
    def tell_pool(boot: Boot) -> None:
        (tmp_path / f"pool {boot.index}").write_text(boot.pool)
        ready(boot)

    with house(tmp_path, tell_pool) as own:
        own.start(2, heavy=2)
        pools = {peer.index: peer.pool for peer in own.peers}
        assert pools == {1: COMMON, 2: COMMON, 3: "heavy", 4: "heavy"}
        assert {index: own.board.peer_row(index).pool for index in pools} == pools
        assert {index: (tmp_path / f"pool {index}").read_text() for index in pools} == pools
        for number, victim in enumerate([own.peers[2], own.peers[0]], 1):
            os.kill(victim.pid, signal.SIGKILL)
            own.turn_until(lambda victim=victim: victim not in own.peers, "its death is seen")  # type: ignore[misc]
            assert not own.supervisor.complete
            assert own.supervisor.ready_in(victim.pool) == 1
            own.turn_until(lambda: own.supervisor.complete, "another is ready")
            assert {peer.index: peer.pool for peer in own.peers} == pools
            assert own.log.read_text().count("was killed by SIGKILL") == number


def test_during_a_drain_a_worker_is_born_for_the_orphans_of_its_pool_alone(tmp_path: Path) -> None:
    with house(tmp_path, ready) as own:
        own.start(1, heavy=1)
        common, victim = own.peers
        client = own.receive(listener=1)
        for peer in own.peers:
            os.kill(peer.pid, signal.SIGSTOP)  # they would be gone at once
        own.supervisor.drain()
        os.kill(victim.pid, signal.SIGKILL)
        own.turn_until(lambda: own.supervisor.ready == 1, "another is born")
        own.turn_until(lambda: not own.dispatcher.queued, "it has the orphan")
        assert [(peer.pool, peer.active) for peer in own.peers] == [(COMMON, 0), ("heavy", 1)]
        os.kill(common.pid, signal.SIGCONT)
        client.close()
