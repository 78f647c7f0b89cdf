"""SocketHandoffPersistent: one connection for many handoffs, and none of them lost or doubled when the daemon goes."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from handoff_site import generated, make_docroot
from harness import Apache, public_dir, wait_until
from receiver import PatientReceiver, Receiver

CONF = """
SocketHandoffPersistent On
<Location /once>
    SocketHandoffPersistent Off
</Location>
<Location /stubborn>
    SocketHandoffMaxRetries 10
</Location>
AliasMatch "^/(?:once|stubborn)/(.+)$" "{docroot}/$1"
"""
TIMEOUT = 30


class Kept:
    """An Apache of one child whose connections are kept."""

    def __init__(self, apache: Apache, prefix: Path) -> None:
        self.apache = apache
        self.sock = prefix / "s"

    def ask(self, data: object = "d", where: str = "/handoff.php", **query: object) -> None:
        """One handoff, answered by the daemon."""
        parameters = {"path": self.sock, "source": "body", "data": data, **query}
        response = requests.get(self.apache.url + where, params=parameters, timeout=TIMEOUT)
        assert (response.status_code, response.text) == (200, "from the daemon"), response.text

    def connections(self) -> int:
        """How many the child holds to sockets of the daemon's directory. Names of peers are not to be had by fd."""
        (child,) = self.apache.children()
        return sum(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{child}/fd").iterdir())


@pytest.fixture(scope="module", params=["prefork", "worker", "event"])
def running(request: pytest.FixtureRequest) -> Iterator[Kept]:
    """prefork with one child: the next request finds the connection of the last one."""
    with public_dir() as docroot, public_dir() as prefix:
        make_docroot(docroot)
        workers = 1 if request.param == "prefork" else 8
        with Apache(request.param, docroot, prefix, CONF.format(docroot=docroot), workers=workers) as apache:
            yield Kept(apache, prefix)


def test_one_connection_carries_them_all(running: Kept) -> None:
    with PatientReceiver(running.sock) as daemon:
        for number in range(10):
            running.ask(number)
            assert daemon.get().data == b"%d" % number
        running.ask(size=200_000)
        assert daemon.get().data == generated(200_000)
        assert len(daemon.senders) == 1


def test_switched_off_each_handoff_has_its_own(running: Kept) -> None:
    with PatientReceiver(running.sock) as daemon:
        running.ask()
        for _ in range(3):
            running.ask(where="/once/handoff.php")
        running.ask()
        assert len(daemon.senders) == 4


def test_a_daemon_that_closed_the_idle_connection(running: Kept) -> None:
    """By SHUT_RD first, as forkd does, and at once: the next handoff comes by a new connection, once."""
    with PatientReceiver(running.sock) as daemon:
        for number in range(5):
            running.ask(number)
            assert daemon.get().data == b"%d" % number
            daemon.refuse()
        assert len(daemon.senders) == 5
        assert daemon.nothing_came()


def test_a_daemon_that_closes_after_each_handoff(running: Kept) -> None:
    """One that knows nothing of persistent connections and hangs up when it has its message."""
    with Receiver(running.sock) as daemon:
        for number in range(5):
            running.ask(number)
            assert daemon.get().data == b"%d" % number


def test_a_daemon_that_starts_anew(running: Kept) -> None:
    for number in range(3):
        with PatientReceiver(running.sock) as daemon:
            running.ask(number)
            assert daemon.get().data == b"%d" % number
            assert daemon.nothing_came()


def test_another_socket_at_the_same_path_gets_what_comes(running: Kept) -> None:
    """The old daemon still reads the old connection; its path is somebody else's now."""
    with PatientReceiver(running.sock) as old:
        running.ask("old")
        assert old.get().data == b"old"
        os.rename(running.sock, f"{running.sock}.old")
        with PatientReceiver(running.sock) as new:
            running.ask("new")
            assert new.get().data == b"new"
        assert old.nothing_came()


def test_each_socket_has_connections_of_its_own(running: Kept) -> None:
    """More of them than are kept: those unused for longest are closed."""
    running.connections()
    with contextlib.ExitStack() as stack:
        paths = [running.sock.with_name(f"many{number}") for number in range(40)]
        daemons = [stack.enter_context(PatientReceiver(path)) for path in paths]
        before = running.connections()
        for _ in range(2):
            for path, daemon in zip(paths, daemons, strict=True):
                running.ask(path.name, path=path)
                assert daemon.get().data == path.name.encode()
        assert running.connections() - before <= 32
        last = len(daemons[-1].senders)
        running.ask(path=paths[-1])
        assert len(daemons[-1].senders) == last


def test_a_stream_daemon_gets_one_connection_each(running: Kept) -> None:
    with Receiver(running.sock, socket.SOCK_STREAM) as daemon:
        for number in range(3):
            running.ask(number)
            assert daemon.get().data == b"%d" % number


def test_no_daemon_is_the_usual_error(running: Kept) -> None:
    with PatientReceiver(running.sock):
        running.ask()
    response = requests.get(running.apache.url + "/handoff.php", params={"path": running.sock}, timeout=TIMEOUT)
    assert (response.status_code, response.json()["code"]) == (503, "daemon_unavailable")


def test_many_at_once_while_the_daemon_closes_what_it_can(running: Kept) -> None:
    """Each arrives once, whatever is being closed under it; and the connections are as many as were needed at once."""
    with PatientReceiver(running.sock, backlog=512) as daemon, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(running.ask, number, "/stubborn/handoff.php") for number in range(300)]
        while not all(each.done() for each in asked):
            daemon.refuse()
            wait_until(
                lambda: asked[-1].done() or any(one.fileno() >= 0 for one in daemon.senders[-9:]), "a connection"
            )
        for each in asked:
            each.result()
        came = sorted(int(daemon.get().data) for _ in asked)
        assert came == list(range(300))
        assert daemon.nothing_came()
        assert running.connections() < 60


def test_threads_share_connections(running: Kept) -> None:
    with PatientReceiver(running.sock, backlog=512) as daemon, ThreadPoolExecutor(8) as pool:
        list(pool.map(running.ask, range(200)))
        assert sorted(int(daemon.get().data) for _ in range(200)) == list(range(200))
        assert len(daemon.senders) <= 8


def test_a_child_that_ends_lets_go(running: Kept) -> None:
    """Nobody else has its connection: the daemon sees the end of file."""
    with PatientReceiver(running.sock) as daemon:
        running.ask()
        (child,) = running.apache.children()
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: daemon.senders[0].fileno() == -1, "the end of the connection")
        wait_until(lambda: set(running.apache.children()) - {child}, "another child")
        running.ask()
        assert len(daemon.senders) == 2


def test_a_daemon_that_took_the_message_and_died(small_site: tuple[Path, Path]) -> None:
    """It is final: the client's connection ends with the daemon, and nobody else gets the handoff."""
    docroot, prefix = small_site
    path = prefix / "s"
    with Apache("prefork", docroot, prefix, "SocketHandoffPersistent On", workers=1) as apache:
        kept = Kept(apache, prefix)
        first = Receiver(path)
        first.listen()
        with socket.create_connection(("127.0.0.1", apache.port), TIMEOUT) as client:
            client.sendall(f"GET /handoff.php?path={path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            wait_until(lambda: any("handed-off" in line for line in apache.access_log()), "the handoff")
            first.close()  # with the connection in its backlog
            assert client.recv(100) == b""
        with PatientReceiver(path) as second:
            kept.ask("next")
            assert second.get().data == b"next"
            assert second.nothing_came()
