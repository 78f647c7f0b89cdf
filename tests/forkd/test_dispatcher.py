"""The dispatcher: choice, queue, refusal. Workers are the far ends of real channels, clients real sockets."""

import gc
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from forkd import channel, handoff
from forkd.board import Board, Kind, State
from forkd.channel import Assignment, Down
from forkd.dispatcher import TELLING_PATIENCE_SECS, Dispatcher
from forkd.ledger import Ledger, Verdict
from forkd.metrics import Metrics
from forkd.peer import Life, Peer
from forkd.settings import COMMON, Server
from tests.harness import Answer, read_answer, tcp_pair


class Counts(Metrics):
    """Metrics that nobody writes, to be looked at."""

    def __init__(self) -> None:
        super().__init__(None, "test")

    def __getitem__(self, key: str | tuple[str, str]) -> float:
        return self._counts[key if isinstance(key, tuple) else (key,)]


@dataclass
class Office:
    """A dispatcher with its surroundings."""

    server: Server
    keep: bool = True
    capacity: int = 10_000
    pools: tuple[str, ...] = (COMMON,)
    full: list[Peer] = field(default_factory=list)
    clients: list[socket.socket] = field(default_factory=list)
    ends: dict[int, socket.socket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.board = Board(self.capacity)
        self.ledger = Ledger(self.board, self.capacity, keep=self.keep)
        self.counts = Counts()
        self.dispatcher = Dispatcher(
            self.ledger, self.board, self.counts, logging.getLogger("test"), self.server, self.full.append, self.pools
        )

    def hire(self, life: Life = Life.READY, pool: str = COMMON) -> Peer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        index = len(self.ends) + 1
        peer = Peer(index, 1, 0, -1, ours, self.board.row(index), pool)
        peer.life = life
        self.ends[index] = theirs
        self.dispatcher.peers.append(peer)
        return peer

    def receive(
        self, payload: bytes = b"{}", now: float = 0.0, code: str = "", data_fd: int = -1, listener: int = 0
    ) -> socket.socket:
        client, server = socket.socketpair()
        self.clients.append(client)
        self.dispatcher.receive(server.detach(), data_fd, payload, 0, listener, now, code)
        self.dispatcher.dispatch()
        return client

    def heard(self, peer: Peer) -> list[tuple[Assignment, bytes]]:
        """What waits for a worker. The fds that came with it are closed."""
        room = bytearray(100_000)
        messages = []
        while True:
            try:
                message = handoff.receive(self.ends[peer.index], room)
            except BlockingIOError:
                return messages
            assert message is not None
            for fd in message.fds:
                os.close(fd)
            messages.append(channel.parse_down(message.payload))

    def close(self) -> None:
        for peer in self.dispatcher.peers:
            peer.channel.close()
        for sock in (*self.ends.values(), *self.clients):
            sock.close()
        for slot in range(self.capacity):
            entry = self.ledger.get(slot)
            if entry is not None:
                self.ledger.release(entry)


@pytest.fixture
def office() -> Iterator[Office]:
    gc.collect()  # what earlier tests left to the collector
    before = len(os.listdir("/proc/self/fd"))
    made = Office(Server(queue_size=3, queue_timeout_secs=5))
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


def read(client: socket.socket) -> Answer:
    client.setblocking(False)
    pieces = b""
    while piece := client.recv(65536):  # BlockingIOError: it was not ended
        pieces += piece
    return Answer(pieces)


def is_open(client: socket.socket) -> bool:
    """Nothing was said to this client, and it is not at its end."""
    client.setblocking(False)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    return False


def test_the_least_loaded_ready_worker_is_chosen_and_ties_rotate(office: Office) -> None:
    busy, idle, starting, draining = (office.hire() for _ in range(4))
    busy.active, starting.life, draining.life = 5, Life.STARTING, Life.DRAINING
    for _ in range(5):
        office.receive()
    assert [len(office.heard(peer)) for peer in (busy, idle, starting, draining)] == [0, 5, 0, 0]
    for _ in range(10):
        office.receive()
    assert [len(office.heard(peer)) for peer in (busy, idle)] == [5, 5]


def test_a_worker_that_is_late_or_full_is_passed_over(office: Office) -> None:
    late, full, well = (office.hire() for _ in range(3))
    late.late, full.full, well.active = True, True, 100
    office.receive()
    assert [len(office.heard(peer)) for peer in (late, full, well)] == [0, 0, 1]


def test_an_assignment_carries_everything(office: Office) -> None:
    peer = office.hire()
    office.receive(b'{"prompt":"x"}', now=12.5)
    ((head, body),) = office.heard(peer)
    assert head == Assignment(0, 1, Down.ASSIGN, 0, 0, 12.5)
    assert body == b'{"prompt":"x"}'


def test_a_refused_handoff_is_told_by_a_worker(office: Office) -> None:
    peer = office.hire()
    office.receive(b'{"request_id":"1"}', code="bad_handoff")
    ((head, body),) = office.heard(peer)
    assert head.kind == Down.END
    assert channel.parse_end_body(body) == (State.GIVEN, "bad_handoff", b'{"request_id":"1"}')
    assert office.counts["forkd_handoff_errors_total", "bad_handoff"] == 1


def test_every_handoff_is_counted_once(office: Office) -> None:
    office.hire()
    office.receive()
    office.receive(code="bad_handoff")
    assert office.dispatcher.received == 2
    for _ in range(2):
        office.dispatcher.count()
        assert office.counts["daemon_handoffs_total"] == office.counts["daemon_connections_total"] == 2
    office.receive()
    office.dispatcher.count()
    assert office.counts["daemon_handoffs_total"] == office.counts["daemon_connections_total"] == 3


def test_what_finds_no_worker_waits_in_order_up_to_the_queues_size(office: Office) -> None:
    clients = [office.receive(b"%d" % number) for number in range(4)]
    assert office.dispatcher.queued == 3
    refused = read(clients[3])
    assert refused.status == 503
    assert refused.header("retry-after") == "1"
    assert refused.header("content-length") == str(len(refused.body))
    assert json.loads(refused.body) == {
        "error": "The server is out of capacity",
        "code": "no_capacity",
        "request_id": "",
    }
    assert office.counts["daemon_connections_rejected_total"] == 1
    peer = office.hire()
    office.dispatcher.pump()
    assert [body for _, body in office.heard(peer)] == [b"0", b"1", b"2"]
    assert office.dispatcher.queued == 0


def test_a_newcomer_does_not_overtake_the_queue(office: Office) -> None:
    office.receive(b"first")
    peer = office.hire()
    office.receive(b"second")
    office.dispatcher.pump()
    assert [body for _, body in office.heard(peer)] == [b"first", b"second"]


def test_what_waits_too_long_is_refused(office: Office) -> None:
    old, young = office.receive(now=0.0), office.receive(now=3.0)
    office.dispatcher.expire(4.9)
    assert office.dispatcher.queued == 2
    office.dispatcher.expire(5.1)
    assert read(old).json["code"] == "queue_timeout"
    assert is_open(young)
    assert office.ledger.count == 1


def test_no_slot_left(office: Office) -> None:
    crowded = Office(Server(), capacity=1)
    peer = crowded.hire()
    crowded.receive()
    data_fd = os.open("/dev/null", os.O_RDONLY)
    refused = crowded.receive(data_fd=data_fd)
    assert read(refused).json["code"] == "no_capacity"
    with pytest.raises(OSError):
        os.fstat(data_fd)
    assert len(crowded.heard(peer)) == 1
    crowded.close()


def test_a_refusal_is_not_turned_into_a_reset_by_unread_input(office: Office) -> None:
    client, server = socket.socketpair()
    office.clients.append(client)
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    office.dispatcher.receive(server.detach(), -1, b"{}", 0, 0, 0.0)
    office.dispatcher.give_up_all("shutdown")
    assert read(client).json["code"] == "shutdown"


def test_a_full_channel_makes_it_wait_and_writable_sends_it(office: Office) -> None:
    peer = office.hire()
    count = 0
    while not office.dispatcher.queued:
        office.receive()
        count += 1
    assert peer.full
    assert office.full == [peer]
    assert len(office.heard(peer)) == count - 1
    office.dispatcher.writable(peer)
    assert len(office.heard(peer)) == 1
    assert not peer.full


def test_a_worker_whose_channel_broke_is_passed_over(office: Office) -> None:
    dying, well = office.hire(), office.hire()
    office.ends[dying.index].close()
    well.active = 5
    office.receive()
    assert len(office.heard(well)) == 1
    assert dying.active == 0


def test_finished_frees_the_slot_and_late_or_foreign_reports_do_not(office: Office) -> None:
    peer, other = office.hire(), office.hire()
    other.active = 1
    client = office.receive()
    office.heard(peer)
    office.dispatcher.finished(other, 0, 1)
    office.dispatcher.finished(peer, 0, 2)
    office.dispatcher.finished(peer, 77, 1)
    assert office.ledger.count == 1
    office.dispatcher.finished(peer, 0, 1)
    assert office.ledger.count == 0
    assert peer.active == 0
    assert not is_open(client)
    office.dispatcher.finished(peer, 0, 1)
    assert peer.active == 0


def test_a_returned_client_goes_to_another_worker(office: Office) -> None:
    peer, other = office.hire(), office.hire()
    other.active = 1
    office.receive(b"x")
    office.heard(peer)
    office.dispatcher.returned(peer, 0, 1)
    ((head, body),) = office.heard(other)
    assert (head.slot, head.attempt, body) == (0, 2, b"x")
    assert peer.full
    assert (peer.active, other.active) == (0, 2)


def test_recovery_gives_on_what_had_not_begun_and_has_the_rest_told(office: Office) -> None:
    dead, heir = office.hire(), office.hire()
    heir.life = Life.STARTING
    clients = [office.receive(b"%d" % number) for number in range(4)]
    for slot, state in enumerate((State.GIVEN, State.OPEN, State.ENDED, State.OPENING)):
        office.board.states[slot] = state
    dead.life, heir.life = Life.DEAD, Life.READY
    assert office.dispatcher.recover(dead, 1.0) == {"redispatched": 1, "ended": 2, "closed": 1}
    given, *told = office.heard(heir)
    assert (given[0].slot, given[0].kind, given[0].attempt, given[1]) == (0, Down.ASSIGN, 2, b"0")
    assert [head.slot for head, _ in told] == [1, 3]
    assert [channel.parse_end_body(body)[:2] for _, body in told] == [
        (State.OPEN, "worker_lost"),
        (State.OPENING, "worker_lost"),
    ]
    assert read(clients[2]).raw == b""
    assert heir.active == 3
    assert office.counts["forkd_streams_recovered_total", "ended"] == 2


def test_a_dead_workers_program_keeps_its_client(office: Office) -> None:
    dead = office.hire()
    client, server = socket.socketpair()
    with server.dup() as program:
        office.clients.append(client)
        office.dispatcher.receive(server.detach(), -1, b"{}", 0, 0, 0.0)
        office.dispatcher.dispatch()
        office.heard(dead)
        office.board.programs[0] = 7
        office.board.states[0] = State.FOREIGN
        client.sendall(b"for the program")
        dead.life = Life.DEAD
        assert office.dispatcher.recover(dead, 1.0) == {"closed": 1}
        assert office.ledger.count == 0
        assert office.board.programs[0] == 0
        assert is_open(client)
        assert program.recv(100) == b"for the program"
        program.sendall(b"still here")
        assert client.recv(100) == b"still here"


def test_only_the_slot_that_was_being_handled_is_suspected(office: Office) -> None:
    for _ in range(2):
        peer = office.hire()
        if not office.ledger.count:
            office.receive(b"innocent")
            office.receive(b"killer")
        else:
            office.dispatcher.pump()
        peer.life = Life.DEAD
        peer.row.store_current(2)  # slot 1
        outcomes = office.dispatcher.recover(peer, 1.0)
    assert outcomes == {"redispatched": 1, "poison": 1}
    entry = office.ledger.get(1)
    assert entry is not None
    assert entry.verdict == Verdict(State.GIVEN, "poison")


def test_orphans_come_before_newcomers_and_the_suspect_first(office: Office) -> None:
    dead = office.hire()
    for name in (b"a", b"b", b"suspect"):
        office.receive(name)
    dead.life = Life.DEAD
    office.receive(b"newcomer")
    dead.row.store_current(3)
    office.dispatcher.recover(dead, 1.0)
    heir = office.hire()
    office.dispatcher.pump()
    assert [body for _, body in office.heard(heir)] == [b"suspect", b"a", b"b", b"newcomer"]


def test_orphans_whose_answer_has_begun_wait_longer_than_the_queue_timeout(office: Office) -> None:
    dead = office.hire()
    clients = [office.receive() for _ in range(2)]
    office.board.states[1] = State.OPEN
    dead.life = Life.DEAD
    office.dispatcher.recover(dead, 100.0)
    office.dispatcher.expire(106.0)
    assert read(clients[0]).json["code"] == "queue_timeout"
    assert is_open(clients[1])  # a worker could still tell it
    assert office.dispatcher.queued == 1
    office.dispatcher.expire(100.0 + TELLING_PATIENCE_SECS)
    assert read(clients[1]).raw == b""
    assert office.counts["forkd_stream_errors_total", "worker_lost"] == 1
    assert office.ledger.count == 0


def test_orphans_may_exceed_the_queues_size(office: Office) -> None:
    dead = office.hire()
    for _ in range(10):
        office.receive()
    dead.life = Life.DEAD
    office.dispatcher.recover(dead, 0.0)
    assert office.dispatcher.queued == 10


def test_without_the_ledger_a_returned_client_is_lost_and_counted() -> None:
    office = Office(Server(ledger=False), keep=False)
    peer = office.hire()
    client = office.receive()
    office.heard(peer)
    assert not is_open(client)  # the worker's copy was the last one
    office.dispatcher.returned(peer, 0, 1)
    assert office.ledger.count == 0
    assert office.counts["forkd_handoff_errors_total", "out_of_fds"] == 1
    office.close()


# Pools: listener 0 is served by the common one, listener 1 by another.


@pytest.fixture
def pooled() -> Iterator[Office]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    made = Office(Server(queue_size=3, queue_timeout_secs=5), pools=(COMMON, "heavy"))
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_handoff_goes_to_its_listeners_pool_however_busy_that_is(pooled: Office) -> None:
    common, heavy = pooled.hire(), pooled.hire(pool="heavy")
    heavy.active = 100
    for listener in (1, 0, 1):
        pooled.receive(b"%d" % listener, listener=listener)
    assert [body for _, body in pooled.heard(heavy)] == [b"1", b"1"]
    assert [body for _, body in pooled.heard(common)] == [b"0"]


def test_those_that_arrive_in_the_same_turn_part_by_their_pools_and_evenly_in_them(pooled: Office) -> None:
    peers = [pooled.hire(pool=pool) for pool in (COMMON, "heavy", COMMON, "heavy")]
    for listener in (0, 1, 0, 1, 1, 0):
        client, server = socket.socketpair()
        pooled.clients.append(client)
        pooled.dispatcher.receive(server.detach(), -1, b"%d" % listener, 0, listener, 0.0)
    pooled.dispatcher.dispatch()
    heard = [[body for _, body in pooled.heard(peer)] for peer in peers]
    assert sorted(heard[0] + heard[2]) == [b"0"] * 3
    assert sorted([len(heard[1]), len(heard[3])]) == [1, 2]  # evenly, though one worker would be cheaper to wake
    assert set(heard[1] + heard[3]) == {b"1"}


def test_one_pools_queue_keeps_nobody_else_waiting_and_has_its_own_limit(pooled: Office) -> None:
    common = pooled.hire()
    clients = [pooled.receive(b"%d" % number, listener=1) for number in range(4)]
    assert read(clients[3]).json["code"] == "no_capacity"
    assert (pooled.dispatcher.queued_in("heavy"), pooled.dispatcher.queued_in(COMMON)) == (3, 0)
    assert pooled.dispatcher.full
    assert pooled.dispatcher.pools_waited_for() == ["heavy"]
    pooled.receive(b"light")
    assert [body for _, body in pooled.heard(common)] == [b"light"]
    common.full = True
    pooled.receive(b"light too")
    assert pooled.dispatcher.queued == 4
    heavy = pooled.hire(pool="heavy")
    pooled.dispatcher.pump()
    assert [body for _, body in pooled.heard(heavy)] == [b"0", b"1", b"2"]
    assert (pooled.dispatcher.queued, pooled.dispatcher.full) == (1, False)


def test_every_queue_expires_and_is_given_up(pooled: Office) -> None:
    clients = [pooled.receive(now=now, listener=listener) for now in (0.0, 3.0) for listener in (0, 1)]
    pooled.dispatcher.expire(5.1)
    assert [read(client).json["code"] for client in clients[:2]] == ["queue_timeout"] * 2
    pooled.dispatcher.give_up_all("shutdown")
    assert [read(client).json["code"] for client in clients[2:]] == ["shutdown"] * 2
    assert pooled.ledger.count == 0


def test_orphans_stay_in_their_pool(pooled: Office) -> None:
    dead, idle, busy = pooled.hire(pool="heavy"), pooled.hire(), pooled.hire(pool="heavy")
    busy.life = Life.STARTING
    for name in (b"given", b"open"):
        pooled.receive(name, listener=1)
    pooled.board.states[1] = State.OPEN
    dead.life = Life.DEAD
    assert pooled.dispatcher.recover(dead, 1.0) == {"redispatched": 1, "ended": 1}
    assert pooled.dispatcher.queued_in("heavy") == 2  # though a worker of another pool is idle
    busy.life = Life.READY
    pooled.dispatcher.pump()
    assert [head.kind for head, _ in pooled.heard(busy)] == [Down.ASSIGN, Down.END]
    assert pooled.heard(idle) == []


def test_a_returned_client_waits_for_its_own_pool(pooled: Office) -> None:
    heavy, idle = pooled.hire(pool="heavy"), pooled.hire()
    pooled.receive(listener=1)
    pooled.heard(heavy)
    pooled.dispatcher.returned(heavy, 0, 1)
    assert pooled.dispatcher.queued_in("heavy") == 1
    pooled.dispatcher.writable(heavy)
    assert len(pooled.heard(heavy)) == 1
    assert pooled.heard(idle) == []


def test_who_waits_follows_the_listener_to_another_pool(pooled: Office) -> None:
    """A reload gave it one, or took the old one away."""
    for listener, name in ((1, b"a"), (0, b"b"), (1, b"c")):
        pooled.receive(name, listener=listener)
    pooled.dispatcher.configure(pooled.server, (COMMON, COMMON))
    assert pooled.dispatcher.queued_in(COMMON) == 3
    common = pooled.hire()
    pooled.dispatcher.pump()
    assert sorted(body for _, body in pooled.heard(common)) == [b"a", b"b", b"c"]
    pooled.dispatcher.configure(pooled.server, (COMMON, "other"))
    pooled.receive(b"d", listener=1)
    assert pooled.heard(common) == []
    other = pooled.hire(pool="other")
    pooled.dispatcher.pump()
    assert [body for _, body in pooled.heard(other)] == [b"d"]


# A client that has its head from Apache.


def receive_bare(office: Office) -> socket.socket:
    client, server = tcp_pair()
    office.clients.append(client)
    office.dispatcher.receive(server.detach(), -1, b"", 0, 0, 0.0, "", Kind.BARE)
    office.dispatcher.dispatch()
    return client


def test_a_bare_body_without_room_is_reset_and_nothing_written_into_it() -> None:
    office = Office(Server(), capacity=1)
    waiting, without_slot = receive_bare(office), receive_bare(office)
    assert office.dispatcher.take_refused() == {"no_capacity": 1}
    office.dispatcher.give_up_all("shutdown")
    assert office.dispatcher.take_refused() == {"shutdown": 1}
    for client in (without_slot, waiting):
        answer = read_answer(client)
        assert (answer.raw, answer.reset) == (b"", True)
    assert office.counts["daemon_connections_rejected_total"] == 2
    office.close()


@pytest.mark.parametrize(
    ("state", "outcome", "reset"),
    [
        (State.GIVEN, "redispatched", None),
        (State.COMMITTED, "closed", True),
        (State.FOREIGN, "closed", True),
        (State.ENDED, "closed", False),
    ],
)
def test_what_becomes_of_a_dead_workers_bare_body(
    office: Office, state: State, outcome: str, reset: bool | None
) -> None:
    dead = office.hire()
    client = receive_bare(office)
    office.heard(dead)
    office.board.states[0] = state
    dead.life = Life.DEAD
    assert office.dispatcher.recover(dead, 1.0) == {outcome: 1}
    if reset is None:
        assert is_open(client)
    else:
        answer = read_answer(client)
        assert (answer.raw, answer.reset) == (b"", reset)
        assert office.counts["forkd_stream_errors_total", "worker_lost"] == reset
