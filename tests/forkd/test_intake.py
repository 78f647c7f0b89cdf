"""The intake: from backlog to whole handoffs. Senders are real sockets; time and the fds left are the test's."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from forkd import channel, handoff, intake
from forkd.board import Kind
from forkd.intake import ACCEPTS_PER_TURN, Intake
from forkd.listener import Listener
from forkd.metrics import Metrics
from forkd.selector import Ready, Selector
from forkd.settings import ListenerSettings, Server
from tests.harness import connect, fail, own_fds, send


@dataclass
class Delivered:
    """One whole handoff, as the dispatcher would get it."""

    fd: int
    data_fd: int
    payload: bytes
    flags: int
    listener: int
    now: float
    code: str
    kind: Kind


@dataclass
class Desk:
    """An intake with its surroundings."""

    directory: Path
    fds_left: int = 1000
    now: float = 0.0
    delivered: list[Delivered] = field(default_factory=list)
    selector: Selector[Ready] = field(default_factory=lambda: Selector(fail))
    metrics: Metrics = field(default_factory=lambda: Metrics(None, "test"))

    def open(self, *, begun: bool = True, **server: Any) -> "Desk":
        kinds: list[dict[str, Any]] = [{"type": "seqpacket"}, {"type": "stream"}, {"protocol": "fdpass"}]
        self.listeners = [
            Listener(index, ListenerSettings(path=str(self.directory / next(iter(kind.values()))), **kind))
            for index, kind in enumerate(kinds)
        ]
        self.intake = Intake(
            self.selector,
            self.listeners,
            Server(socket_path="unused", **{"max_pending_handoffs": 3, "handoff_timeout_secs": 5.0, **server}),
            self.deliver,
            lambda: self.fds_left,
            self.metrics,
            logging.getLogger("test"),
            lambda: self.now,
            begun=begun,
        )
        return self

    def deliver(
        self, fd: int, data_fd: int, payload: bytes, flags: int, listener: int, now: float, code: str, kind: Kind
    ) -> None:
        self.delivered.append(Delivered(fd, data_fd, payload, flags, listener, now, code, kind))

    def turn(self) -> int:
        """One turn of the master's loop; returns how many callbacks were due."""
        events = self.selector.select(0)
        self.selector.serve(events)
        return len(events)

    def settle(self) -> None:
        while self.turn():
            pass

    def failed(self, code: str) -> float:
        return self.metrics._counts["forkd_handoff_errors_total", code]

    def connect(self, kind: str = "seqpacket") -> socket.socket:
        return connect(self.directory / kind, socket.SOCK_SEQPACKET if kind == "seqpacket" else socket.SOCK_STREAM)

    def payloads(self) -> list[bytes]:
        return [each.payload for each in self.delivered]

    def close(self) -> None:
        self.intake.stop()
        for each in self.delivered:
            for fd in (each.fd, each.data_fd):
                if fd >= 0:
                    os.close(fd)
        self.now += 1000
        self.intake.expire(self.now)
        self.fds_left = 1000
        self.intake.empty_backlogs()
        assert self.intake.stopped
        assert self.intake.senders == 0
        self.selector.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    before = own_fds()
    desk = Desk(tmp_path).open()
    yield desk
    desk.close()
    assert own_fds() == before


@pytest.fixture
def null() -> Iterator[int]:
    with open("/dev/null", "rb") as file:
        yield file.fileno()


def test_one_message_one_handoff(desk: Desk, null: int) -> None:
    desk.now = 7.5
    with desk.connect() as sender:
        send(sender, b"data", null)
    desk.settle()
    (one,) = desk.delivered
    assert (one.payload, one.data_fd, one.flags, one.listener, one.now, one.code) == (b"data", -1, 0, 0, 7.5, "")
    assert os.fstat(one.fd).st_rdev == os.fstat(null).st_rdev
    assert desk.intake.senders == 0


def test_a_connection_may_carry_many_and_idle_between(desk: Desk, null: int) -> None:
    with desk.connect() as sender:
        for number in range(3):
            send(sender, b"%d" % number, null)
            desk.settle()
            desk.now += 100
            desk.intake.expire(desk.now)
    desk.settle()
    assert desk.payloads() == [b"0", b"1", b"2"]


def test_many_idle_senders_are_no_pending_ones_and_cost_nothing(desk: Desk, null: int) -> None:
    """Apache keeps its connections for hours. Only senders that have not sent anything yet have to hurry."""
    senders = [desk.connect() for _ in range(200)]
    for sender in senders:
        send(sender, b"x", null)
    desk.settle()
    desk.now += 86400
    desk.intake.expire(desk.now)
    assert (len(desk.delivered), desk.intake.senders) == (200, 200)
    assert desk.turn() == 0
    send(senders[77], b"y", null)
    assert desk.turn() == 1
    assert desk.payloads()[200:] == [b"y"]
    silent = [desk.connect() for _ in range(4)]  # one more than may be pending
    desk.settle()
    assert desk.failed("sender_evicted") == 1
    assert desk.intake.senders == 203
    for sender in (*senders, *silent):
        sender.close()


def test_a_stream_connection_carries_one_up_to_its_end(desk: Desk, null: int) -> None:
    with desk.connect("stream") as sender:
        for piece in (b"in ", b"three ", b"pieces"):
            send(sender, piece, *([null] if piece == b"three " else []))
            desk.settle()
            assert not desk.delivered
    desk.settle()
    assert desk.payloads() == [b"in three pieces"]
    assert desk.delivered[0].listener == 1


def test_mod_proxy_fdpass_sends_one_byte_and_need_not_end_it(desk: Desk, null: int) -> None:
    with desk.connect("fdpass") as sender:
        send(sender, b"\0", null)
        desk.settle()
        (one,) = desk.delivered
        assert (one.payload, one.data_fd, one.flags, one.code, one.kind) == (b"", -1, 0, "", Kind.BARE)
        assert desk.intake.senders == 0
        assert sender.recv(1) == b""


@pytest.mark.parametrize("payload", [b'{"prompt":"x"}', b"\x01\x01{}\n", b"x" * 70_000])
def test_a_fdpass_sender_with_data_is_somebody_else(desk: Desk, null: int, payload: bytes) -> None:
    """An application behind mod_socket_handoff that names the wrong socket."""
    with desk.connect("fdpass") as sender:
        sender.setblocking(False)
        send(sender, payload, null)
        desk.settle()
    (one,) = desk.delivered
    assert (one.payload, one.data_fd, one.flags, one.code, one.kind) == (b"", -1, 0, "bad_handoff", Kind.BARE)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_fdpass_sender_with_more_fds(desk: Desk, null: int, count: int) -> None:
    with desk.connect("fdpass") as sender:
        send(sender, b"\0", *[null] * count)
        desk.settle()
    assert [each.code for each in desk.delivered] == ["bad_handoff"]


def test_a_fdpass_sender_without_an_fd(desk: Desk, null: int) -> None:
    with desk.connect("fdpass") as sender:
        send(sender, b"\0")
        desk.settle()
        assert not desk.delivered
        assert desk.failed("no_fd") == 1
        assert desk.intake.senders == 0


def test_a_silent_fdpass_sender_is_heard_until_it_is_dropped(desk: Desk, null: int) -> None:
    with desk.connect("fdpass") as silent, desk.connect("fdpass") as late:
        desk.settle()
        send(late, b"\0", null)  # and nobody has looked
        desk.now = 5.0
        desk.intake.expire(desk.now)
        assert desk.failed("sender_timeout") == 1
        assert len(desk.delivered) == 1
        with pytest.raises(BrokenPipeError):
            send(silent, b"\0", null)


def test_no_turn_belongs_to_one_sender_or_one_backlog(desk: Desk, null: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MESSAGES_PER_TURN", 4)  # a sender can have about ten unread
    with desk.connect() as busy:
        desk.settle()
        for busy_master, read in ((False, (1, 2, 3)), (True, (7, 9, 9))):
            desk.intake.busy = busy_master
            for _ in range(3 if not busy_master else 6):
                send(busy, b"x", null)
            for delivered in read:
                desk.turn()
                assert len(desk.delivered) == delivered
    for _ in range(ACCEPTS_PER_TURN + 10):
        with desk.connect() as sender:
            send(sender, b"y", null)
    desk.turn()
    assert desk.payloads().count(b"y") == ACCEPTS_PER_TURN
    desk.settle()
    assert desk.payloads().count(b"y") == ACCEPTS_PER_TURN + 10


def test_one_that_is_dropped_in_the_turn_in_which_it_sent_is_no_failure(desk: Desk, null: int) -> None:
    with desk.connect() as sender:
        desk.settle()
        send(sender, b"x", null)
        found = desk.selector.select(0)
        desk.intake.stop()  # which reads what there is
        assert len(desk.delivered) == 1
        desk.selector.serve(found)
    assert len(desk.delivered) == 1
    assert desk.failed("sender_failed") == 0


# Who keeps us waiting.


def test_silent_senders_are_dropped_in_time_and_the_oldest_when_they_are_many(desk: Desk, null: int) -> None:
    with desk.connect() as first, desk.connect() as second, desk.connect() as third, desk.connect() as fourth:
        for _ in range(4):
            desk.turn()
        assert desk.intake.senders == 3
        assert desk.failed("sender_evicted") == 1
        with pytest.raises(BrokenPipeError):
            send(first, b"x", null)
        desk.now = 4.9
        desk.intake.expire(desk.now)
        assert desk.intake.senders == 3
        send(third, b"in time", null)
        desk.settle()
        desk.now = 5.0
        desk.intake.expire(desk.now)
        assert desk.failed("sender_timeout") == 2
        for sender in (second, fourth):
            with pytest.raises(BrokenPipeError):
                send(sender, b"x", null)
        send(third, b"again", null)
        desk.settle()
    assert desk.payloads() == [b"in time", b"again"]


def test_what_a_sender_said_just_before_its_time_was_up_is_heard(desk: Desk, null: int) -> None:
    with desk.connect() as sender:
        desk.settle()
        for number in range(3):
            send(sender, b"%d" % number, null)
        desk.now = 5.0
        desk.intake.expire(desk.now)
        assert desk.payloads() == [b"0", b"1", b"2"]
        assert desk.failed("sender_timeout") == 0
        assert desk.intake.senders == 0


def test_half_a_stream_is_the_senders_still(desk: Desk, null: int) -> None:
    with desk.connect("stream") as sender:
        send(sender, b"half", null)
        desk.settle()
        desk.now = 5.0
        desk.intake.expire(desk.now)
        assert sender.recv(1) == b""
    assert not desk.delivered
    assert desk.failed("sender_timeout") == 1


# Out of fds.


def test_without_room_all_waits_where_it_is(desk: Desk, null: int) -> None:
    with desk.connect() as idle, desk.connect() as silent, desk.connect("stream") as stream:
        send(idle, b"first", null)
        desk.settle()
        assert desk.intake.senders == 3
        desk.fds_left = 0
        send(idle, b"second", null)
        send(silent, b"third", null)
        send(stream, b"fourth", null)
        stream.close()
        with desk.connect() as late:
            send(late, b"fifth", null)
        desk.settle()  # it ends: nothing is watched that would wake the loop in vain
        assert desk.payloads() == [b"first"]
        assert desk.failed("out_of_fds") == 1
        desk.fds_left = 5
        desk.intake.resume()
        desk.settle()
        assert sorted(desk.payloads()) == [b"fifth", b"first", b"fourth", b"second", b"third"]


def test_idle_connections_make_room(desk: Desk, null: int) -> None:
    """Those with a message last, and one by one, because to close them is to take their clients in."""
    with desk.connect() as idle, desk.connect() as speaking, desk.connect() as silent:
        for sender in (idle, speaking):
            send(sender, b"first", null)
        desk.settle()
        desk.fds_left = 0
        send(speaking, b"second", null)
        desk.settle()
        desk.intake.resume()
        with pytest.raises(BrokenPipeError):
            send(idle, b"x", null)
        assert desk.intake.senders == 2
        assert len(desk.delivered) == 2
        desk.intake.resume()
        assert desk.payloads()[2:] == [b"second"]
        with pytest.raises(BrokenPipeError):
            send(speaking, b"x", null)
        send(silent, b"not yet", null)
        desk.settle()
        assert len(desk.delivered) == 3
        desk.fds_left = 5
        desk.intake.resume()
        desk.settle()
    assert desk.payloads()[3:] == [b"not yet"]


def test_an_accept_that_finds_no_fd(desk: Desk, null: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def fileno(self) -> int:
            return self.sock.fileno()

        def _accept(self) -> tuple[int, Any]:
            raise OSError(errno.EMFILE, "Too many open files")

    listener = desk.listeners[0]
    with desk.connect() as sender:
        send(sender, b"data", null)
    with monkeypatch.context() as patch:
        patch.setattr(listener, "sock", Full(listener.sock))
        desk.turn()
        assert desk.turn() == 0
    assert not desk.delivered
    desk.intake.resume()
    desk.settle()
    assert desk.payloads() == [b"data"]


def test_a_message_that_lost_its_fds_on_the_way(desk: Desk, null: int) -> None:
    """MSG_CTRUNC: we were out of fds after all."""
    listener = desk.listeners[0]
    desk.intake.accept_message(listener, handoff.Message(b"data", (), False, True))
    assert desk.failed("out_of_fds") == 1
    assert not desk.delivered
    payload = handoff.encode_envelope({}, b"", data_in_memfd=True)
    desk.intake.accept_message(listener, handoff.Message(payload, (os.dup(null),), False, True))
    assert desk.delivered[0].code == "out_of_fds"


# What is in a message. `tests/system/test_bad_input.py` has what clients are told.


@pytest.mark.parametrize(
    ("payload", "count", "code"),
    [
        (b"data", 2, "bad_handoff"),
        (b"data", 3, "bad_handoff"),
        (b"", 1, "bad_handoff"),
        (handoff.encode_envelope({}, b"", data_in_memfd=True), 1, "bad_handoff"),
        (handoff.encode_envelope({}, b"", data_in_memfd=True), 3, "bad_handoff"),
        (handoff.encode_envelope({}, b"data"), 2, "bad_handoff"),
        (handoff.encode_envelope({"x": "y" * 70_000}, b"", data_in_memfd=True), 2, "bad_handoff"),
    ],
    ids=lambda value: value[:10].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_the_wrong_number_of_fds_leaves_one_client_to_be_told(
    desk: Desk, null: int, payload: bytes, count: int, code: str
) -> None:
    with desk.connect() as sender:
        send(sender, payload, *[null] * count)
    desk.settle()
    (one,) = desk.delivered
    assert (one.data_fd, one.flags, one.code) == (-1, 0, code)
    assert one.fd >= 0
    assert one.payload == (payload if len(payload) <= handoff.MAX_INLINE_BYTES else b"")


def test_no_fd_at_all(desk: Desk) -> None:
    with desk.connect() as sender:
        sender.send(b"data")
    with desk.connect("stream") as sender:
        sender.send(b"data")
    desk.settle()
    assert desk.failed("no_fd") == 2
    assert not desk.delivered


def test_large_payloads_go_on_in_a_memfd(desk: Desk, null: int) -> None:
    with desk.connect() as sender:
        send(sender, b"x" * handoff.MAX_INLINE_BYTES, null)
        desk.settle()
        send(sender, b"y" * (handoff.MAX_INLINE_BYTES + 1), null)
    desk.settle()
    small, large = desk.delivered
    assert (len(small.payload), small.data_fd, small.flags) == (handoff.MAX_INLINE_BYTES, -1, 0)
    assert (large.payload, large.flags) == (b"", channel.PAYLOAD_IN_MEMFD)
    assert handoff.read_sealed_memfd(large.data_fd, 1 << 20) == b"y" * (handoff.MAX_INLINE_BYTES + 1)


def test_the_senders_own_memfd_goes_on_as_it_is(desk: Desk, null: int) -> None:
    payload = handoff.encode_envelope({}, b"", data_in_memfd=True)
    data = handoff.sealed_memfd(b"data")
    with desk.connect() as sender:
        send(sender, payload, null, data)
    os.close(data)
    desk.settle()
    (one,) = desk.delivered
    assert (one.payload, one.flags, one.code) == (payload, channel.DATA_FD, "")
    assert handoff.read_sealed_memfd(one.data_fd, 100) == b"data"


# The end.


def test_a_stop_loses_nobody(desk: Desk, null: int) -> None:
    with desk.connect() as idle, desk.connect() as silent, desk.connect("stream") as stream:
        send(idle, b"idle before", null)
        desk.settle()
        send(idle, b"idle", null)
        send(silent, b"silent", null)
        send(stream, b"str", null)
        with desk.connect() as unaccepted:
            send(unaccepted, b"unaccepted", null)
            desk.intake.stop()
            for sender in (idle, silent, unaccepted):
                with pytest.raises(BrokenPipeError):
                    send(sender, b"x", null)
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            desk.connect()
        assert not desk.intake.stopped  # the stream sender has its time
        send(stream, b"eam")
        stream.close()
        desk.settle()
        assert desk.intake.stopped
    assert sorted(desk.payloads()) == [b"idle", b"idle before", b"silent", b"stream", b"unaccepted"]


def test_a_stop_without_room_waits_for_some(desk: Desk, null: int) -> None:
    with desk.connect("stream") as stream:
        desk.settle()
        desk.fds_left = 0
        with desk.connect() as unaccepted:
            send(unaccepted, b"unaccepted", null)
        desk.settle()
        desk.intake.stop()
        desk.intake.empty_backlogs()
        assert not desk.delivered
        assert not desk.intake.stopped
        desk.fds_left = 5
        desk.intake.resume()
        desk.intake.empty_backlogs()
        assert desk.payloads() == [b"unaccepted"]
        send(stream, b"stream", null)
        stream.close()
        desk.settle()
    assert desk.payloads() == [b"unaccepted", b"stream"]
    assert desk.intake.stopped


def test_before_it_begins_all_that_comes_waits(tmp_path: Path, null: int) -> None:
    desk = Desk(tmp_path).open(begun=False)
    for kind in ("seqpacket", "stream"):
        with desk.connect(kind) as sender:
            send(sender, b"early", null)
    for _ in range(3):
        desk.settle()
        desk.intake.resume()
        desk.intake.expire(1000)
    assert desk.delivered == []
    desk.intake.begin()
    desk.settle()
    assert desk.payloads() == [b"early"] * 2
    desk.close()


def test_one_that_never_began_leaves_what_waits_to_whoever_shares_it(tmp_path: Path, null: int) -> None:
    desk = Desk(tmp_path).open(begun=False)
    others = [listener.sock.dup() for listener in desk.listeners]
    for listener in desk.listeners:
        listener.shared = True
    with desk.connect() as sender:
        send(sender, b"early", null)
    desk.close()
    assert desk.delivered == []
    accepted, _ = others[0].accept()
    assert accepted.recv(100) == b"early"
    desk.connect("stream").close()
    for sock in (accepted, *others):
        sock.close()
