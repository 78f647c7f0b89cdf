"""SIGUSR2 to a real daemon: one master takes over from another, and nobody who hands over or is streamed to notices."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from tests.harness import Forkd, connect, open_fds, read_answer, read_answers, send, wait_for
from tests.system import crowd
from tests.system.crowd import begun, fate, fates, hand_over_many, prompt, ready_pids, settled
from tests.system.succession import (
    Load,
    adopt,
    begin_upgrade,
    daemon,
    family,
    hand_down,
    masters,
    reconfigure,
    reload,
    settled_workers,
    successors,
    upgrade,
)
from tests.system.test_exposition import address, scrape


def wait_for_log(forkd: Forkd, text: str, count: int = 1) -> None:
    wait_for(lambda: forkd.log().count(text) >= count, f"the log says {count} times: {text}")


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file exists, workers do not get ready."""
    file = tmp_path / "hung"
    monkeypatch.setenv("FORKD_TEST_HUNG", str(file))
    return file


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file exists, workers die before they are ready."""
    file = tmp_path / "broken"
    monkeypatch.setenv("FORKD_TEST_BROKEN", str(file))
    return file


def still(forkd: Forkd, count: int) -> list[socket.socket]:
    """Clients of streams that last for as long as anyone wants."""
    with connect(forkd.path) as sender:
        clients = hand_over_many(sender, [prompt(backend="still")] * count)
    begun(clients)
    return clients


class Scrapes:
    """Prometheus, in a hurry: scrapes again and again, and sees whether a counter falls or /readyz says no."""

    def __init__(self, forkd: Forkd) -> None:
        self._base = "http://{}:{}".format(*address(forkd))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count = 0
        self.cut = 0
        self.faults: list[str] = []

    def __enter__(self) -> "Scrapes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(20)

    def _run(self) -> None:
        last: dict[str, float] = {}
        while not self._over.is_set():
            try:
                ready = requests.get(f"{self._base}/readyz", timeout=5)
                text = requests.get(f"{self._base}/metrics", timeout=5).text
            except requests.ConnectionError as error:
                # A process that answers and is replaced at that instant cuts one scrape; nobody there is another thing.
                if "refused" in str(error).lower():
                    self.faults.append(str(error))
                self.cut += 1
                continue
            except requests.RequestException as error:
                self.faults.append(repr(error))
                continue
            if ready.status_code != 200:
                self.faults.append(f"/readyz: {ready.text}")
            samples = dict(re.findall(r"^(\w+(?:_total|_count|_bucket)(?:{.*?})?) (\S+)$", text, re.MULTILINE))
            now = {name: float(value) for name, value in samples.items()}
            self.faults += [
                f"{name} fell from {last[name]} to {now.get(name)}" for name in last if last[name] > now.get(name, -1)
            ]
            last = now
            self.count += 1


def test_upgrades_under_load_lose_nobody_and_leave_nothing(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        wait_for(lambda: len(family(tmp_path)) == 4, "all are there")
        fds, first, inode = open_fds(forkd.pid), forkd.pid, os.stat(forkd.path).st_ino
        lock = Path(f"{forkd.path}.lock")
        with Load(forkd) as load, Scrapes(forkd) as scrapes:
            for _ in range(3):
                upgrade(forkd)
                assert lock.read_text() == f"{forkd.pid}\n"
        print(
            f"{len(load.clients)} streams, {load.again} handed over again, {scrapes.count} scrapes, {scrapes.cut} cut"
        )
        assert load.verdicts() == load.complete
        assert scrapes.faults == []
        assert scrapes.count > 5
        assert scrapes.cut <= 3
        assert forkd.pid != first
        assert masters(tmp_path) == [forkd.pid]
        assert os.stat(forkd.path).st_ino == inode
        assert settled(forkd, fds) == {}
        forkd.wait_for_metric("daemon_handoffs_total", len(load.clients))
        assert forkd.metric("daemon_connections_rejected_total") == 0
        assert len(family(tmp_path)) == 4
        assert forkd.stop() == 0
        assert not Path(forkd.path).exists()
        assert not list((tmp_path / "metrics").iterdir())
        assert family(tmp_path) == []


def test_the_new_master_is_a_whole_one(tmp_path: Path) -> None:
    """Everything that the first one did: reload, recover, count, drain."""
    with daemon(tmp_path) as forkd:
        upgrade(forkd)
        before = open_fds(forkd.pid)
        reload(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 10)
        begun(clients)
        os.kill(settled_workers(forkd, 2)[0], signal.SIGKILL)
        answers = fates(read_answers(clients))
        assert set(answers) == {"complete", "worker_lost"}
        assert settled(forkd, before, deaths=1) == {"ended": answers["worker_lost"]}
        os.kill(forkd.pid, signal.SIGTTIN)
        settled_workers(forkd, 3)


def test_new_code_and_a_new_configuration(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        reconfigure(
            forkd,
            workers={"count": 3},
            backends={"quick": {"provider": "mock", "token_delay_ms": 0, "text": "quick as that"}},
        )
        upgrade(forkd)
        assert len(settled_workers(forkd, 3)) == 3
        assert forkd.ask(prompt(backend="quick")).text == "quick as that"


def test_active_streams_are_right_while_both_have_some(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        old_clients = still(forkd, 5)
        old = hand_down(forkd)
        new_clients = still(forkd, 3)
        wait_for(lambda: scrape(forkd)["daemon_active_streams"] == 8, "both masters' streams count")
        for client in old_clients:
            client.close()
        assert old.wait(20) == 0
        wait_for(lambda: scrape(forkd)["daemon_active_streams"] == 3, "the old one's are gone")
        for client in new_clients:
            client.close()
        wait_for(lambda: scrape(forkd)["daemon_active_streams"] == 0, "all are gone")


def test_a_file_that_is_broken_meanwhile_leaves_the_old_master_in_charge(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        fds, pid, workers = open_fds(forkd.pid), forkd.pid, forkd.workers()
        file = tmp_path / "forkd.yaml"
        good = file.read_text()
        with Load(forkd) as load:
            file.write_text("workers: {count: many}")
            for attempt in (1, 2):
                begin_upgrade(forkd)
                wait_for_log(forkd, "exited with status 2; going on as before", attempt)
            file.write_text(good)
        assert load.verdicts() == load.complete
        assert "workers.count: expected" in forkd.output()
        assert (forkd.pid, forkd.workers()) == (pid, workers)
        assert settled(forkd, fds) == {}
        upgrade(forkd)
        assert fate(forkd.ask()) == "complete"
        forkd.wait_for_metric("daemon_handoffs_total", len(load.clients) + 1)


def test_workers_that_crash_at_start_leave_the_old_master_in_charge(tmp_path: Path, broken: Path) -> None:
    with daemon(tmp_path) as forkd:
        fds, workers = open_fds(forkd.pid), forkd.workers()
        with Load(forkd) as load, Scrapes(forkd) as scrapes:
            broken.touch()
            new = begin_upgrade(forkd)
            wait_for_log(forkd, "workers of the new master die before they are ready: giving up")
            wait_for_log(
                forkd, f"the upgrade failed: the new master (pid {new}) exited with status 1; going on as before"
            )
            broken.unlink()
        assert load.verdicts() == load.complete
        assert scrapes.faults == []
        assert forkd.workers() == workers
        assert masters(tmp_path) == [forkd.pid]
        wait_for(lambda: open_fds(forkd.pid) == fds, "no fd is left")
        forkd.wait_for_metric("daemon_handoffs_total", len(load.clients))  # the files are still there
        upgrade(forkd)
        assert fate(forkd.ask()) == "complete"


def test_a_new_master_that_is_killed(tmp_path: Path, hung: Path) -> None:
    with daemon(tmp_path) as forkd:
        fds = open_fds(forkd.pid)
        hung.touch()
        with Load(forkd) as load:
            new = begin_upgrade(forkd)
            wait_for(lambda: len(family(tmp_path)) == 7, "its workers are starting")
            os.kill(new, signal.SIGKILL)
            wait_for_log(forkd, f"(pid {new}) was killed by SIGKILL; going on as before")
        hung.unlink()
        assert load.verdicts() == load.complete
        wait_for(lambda: len(family(tmp_path)) == 4, "its workers are gone, too")
        assert settled(forkd, fds) == {}
        upgrade(forkd)
        assert fate(forkd.ask()) == "complete"


def test_a_new_master_that_is_told_to_stop_before_it_is_ready(tmp_path: Path, hung: Path) -> None:
    """It must not end what is still the old one's: the socket, its file, the lock, the metrics."""
    with daemon(tmp_path) as forkd:
        hung.touch()
        with Load(forkd) as load, Scrapes(forkd) as scrapes:
            new = begin_upgrade(forkd)
            wait_for(lambda: len(family(tmp_path)) == 7, "its workers are starting")
            os.kill(new, signal.SIGTERM)
            wait_for_log(forkd, f"(pid {new}) exited with status 1; going on as before")
        assert load.verdicts() == load.complete
        assert scrapes.faults == []
        assert Path(forkd.path).exists()
        forkd.wait_for_metric("daemon_handoffs_total", len(load.clients))


def test_only_one_at_a_time(tmp_path: Path, hung: Path) -> None:
    with daemon(tmp_path) as forkd:
        hung.touch()
        new = begin_upgrade(forkd)
        os.kill(forkd.pid, signal.SIGUSR2)
        wait_for_log(forkd, "USR2: no upgrade now: one is under way")
        clients = still(forkd, 3)
        hung.unlink()
        wait_for(lambda: new in successors(forkd), "the new master is ready")
        old = adopt(forkd, new)
        os.kill(old.pid, signal.SIGUSR2)
        wait_for_log(forkd, "USR2: no upgrade now: this master is about to go")
        os.kill(forkd.pid, signal.SIGUSR2)
        wait_for_log(forkd, "USR2: no upgrade now: the master of the last one still drains")
        for client in clients:
            client.close()
        assert old.wait(20) == 0
        wait_for_log(forkd, "upgrade: the old master is gone")
        upgrade(forkd)
        assert forkd.log().count("upgrade: started a new master") == 2


def test_an_old_master_that_is_killed_before_the_new_one_is_ready(tmp_path: Path, hung: Path) -> None:
    with daemon(tmp_path) as forkd:
        hung.touch()
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 10)
        begun(clients)
        new = begin_upgrade(forkd)
        wait_for(lambda: len(family(tmp_path)) == 7, "its workers are starting")
        assert forkd.process is not None
        forkd.process.kill()
        forkd.process.wait()
        with connect(forkd.path) as sender:  # nobody accepts, and yet nobody is refused
            clients += hand_over_many(sender, [prompt()] * 10)
        hung.unlink()
        adopt(forkd, new)
        assert fates(read_answers(clients)) == {"complete": 20}
        wait_for_log(forkd, "upgrade: the old master is gone")
        assert Path(f"{forkd.path}.lock").read_text() == f"{new}\n"
        upgrade(forkd)
        assert forkd.stop() == 0
        wait_for(lambda: not family(tmp_path), "no process is left")
        assert not Path(forkd.path).exists()


def test_an_old_master_that_is_killed_while_it_drains(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 10)
        begun(clients)
        old = hand_down(forkd)
        forkd.wait_for_metric("daemon_active_streams", 10)
        old.kill()
        wait_for_log(forkd, "upgrade: the old master is gone")
        forkd.wait_for_metric("daemon_active_streams", 0)  # it is not counted any more, and not for ever
        assert fates(read_answers(clients)) == {"complete": 10}
        assert fate(forkd.ask()) == "complete"
        old.wait()
        wait_for(lambda: len(family(tmp_path)) == 4, "its workers are gone, too")


def test_handoffs_in_the_backlog_find_the_new_master(tmp_path: Path, hung: Path) -> None:
    with daemon(tmp_path) as forkd:
        hung.touch()
        new = begin_upgrade(forkd)
        wait_for(lambda: len(family(tmp_path)) == 7, "its workers are starting")
        os.kill(forkd.pid, signal.SIGSTOP)
        clients = []
        for _ in range(100):
            client, server = socket.socketpair()
            with server, connect(forkd.path) as sender:
                send(sender, prompt(backend="fast"), server.fileno())
            clients.append(client)
        hung.unlink()
        assert fates(read_answers(clients)) == {"complete": 100}  # the old one is still stopped
        os.kill(forkd.pid, signal.SIGCONT)
        wait_for(lambda: new in successors(forkd), "the old one hears of it")
        assert adopt(forkd, new).wait(20) == 0
        assert fate(forkd.ask()) == "complete"


def test_stream_senders(tmp_path: Path) -> None:
    with daemon(tmp_path, server={"socket_type": "stream"}) as forkd:
        half = connect(forkd.path, socket.SOCK_STREAM)
        client, server = socket.socketpair()
        with server:
            send(half, prompt(backend="fast")[:7], server.fileno())
        with Load(forkd, kind=socket.SOCK_STREAM) as load:
            wait_for(lambda: forkd.metric("daemon_handoffs_total") >= 20, "the load flows")  # and `half` is accepted
            new = begin_upgrade(forkd)
            wait_for(lambda: new in successors(forkd), "the new master is ready")
            old = adopt(forkd, new)
            half.sendall(prompt(backend="fast")[7:])
            half.close()
            assert fate(read_answer(client)) == "complete"
            assert old.wait(20) == 0
            wait_for_log(forkd, "upgrade: the old master is gone")
            upgrade(forkd)
        assert load.verdicts() == load.complete
        forkd.wait_for_metric("daemon_handoffs_total", len(load.clients) + 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_stop_during_an_upgrade_stops_both(tmp_path: Path, hung: Path, number: signal.Signals) -> None:
    with daemon(tmp_path) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 10)
        begun(clients)
        hung.touch()
        begin_upgrade(forkd)
        wait_for(lambda: len(family(tmp_path)) == 7, "its workers are starting")
        left = family(tmp_path)
        os.kill(forkd.pid, number)
        assert fates(read_answers(clients)) == {"complete" if number == signal.SIGTERM else "shutdown": 10}
        assert forkd.process is not None
        assert forkd.process.wait(20) == 0
        assert "the upgrade was called off" in forkd.log()
        wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in left), "all gone")
        assert not Path(forkd.path).exists()
        (tmp_path / "forkd.log").unlink()
        hung.unlink()
        forkd.start()  # the lock is free
        assert fate(forkd.ask()) == "complete"


def test_an_old_master_that_is_told_to_stop_while_it_drains(tmp_path: Path) -> None:
    """As by Ctrl-C, which the terminal says to both: streams have the time that a stop gives them."""
    with daemon(tmp_path) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="steady")] * 10)
            begun(clients)
            old = hand_down(forkd)
        for pid in (old.pid, forkd.pid):
            os.kill(pid, signal.SIGINT)
        assert fates(read_answers(clients)) == {"complete": 10}
        assert old.wait(20) == 0
        forkd.stop()
        wait_for(lambda: not family(tmp_path), "no process is left")


def test_a_second_stop_ends_what_an_upgrade_left(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        clients = still(forkd, 5)
        old = hand_down(forkd)
        os.kill(old.pid, signal.SIGTERM)
        wait_for_log(forkd, "SIGTERM: finishing 5 streams")
        os.kill(old.pid, signal.SIGTERM)
        assert fates(read_answers(clients)) == {"shutdown": 5}
        assert old.wait(20) == 0
        assert fate(forkd.ask()) == "complete"


def test_a_drain_that_takes_too_long(tmp_path: Path) -> None:
    with daemon(tmp_path, server={"drain_timeout_secs": 0.5}) as forkd:
        clients = still(forkd, 5)
        old = hand_down(forkd)
        assert fates(read_answers(clients)) == {"shutdown": 5}
        assert old.wait(20) == 0


def test_a_worker_that_dies_under_the_old_master(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        victim = ready_pids(forkd)[0]
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 10)
        begun(clients)
        old = hand_down(forkd)
        os.kill(victim, signal.SIGKILL)
        answers = fates(read_answers(clients))
        assert set(answers) == {"complete", "worker_lost"}
        assert old.wait(20) == 0
        forkd.wait_for_metric("forkd_streams_recovered_total", answers["worker_lost"], outcome="ended")


def test_a_reload_during_an_upgrade(tmp_path: Path, hung: Path) -> None:
    with daemon(tmp_path) as forkd:
        with Load(forkd) as load:
            hung.touch()
            new = begin_upgrade(forkd)
            os.kill(forkd.pid, signal.SIGHUP)
            wait_for_log(forkd, "generation 2: starting 2 workers")
            hung.unlink()
            wait_for(lambda: new in successors(forkd), "the new master is ready")
            assert adopt(forkd, new).wait(20) == 0
        assert load.verdicts() == load.complete
        wait_for(lambda: len(family(tmp_path)) == 4, "only the new ones are left")


def test_a_listener_that_is_not_configured_any_more(tmp_path: Path) -> None:
    extra = str(tmp_path / "extra.sock")
    with daemon(tmp_path, listeners=[{"path": extra}]) as forkd:
        assert fate(forkd.ask(path=extra)) == "complete"
        reconfigure(forkd, listeners=[])
        upgrade(forkd)
        assert not Path(extra).exists()
        assert f"the socket {extra} was passed to forkd" in forkd.log()
        assert fate(forkd.ask()) == "complete"


def test_a_listener_that_is_new(tmp_path: Path) -> None:
    extra = str(tmp_path / "extra.sock")
    with daemon(tmp_path) as forkd:
        reconfigure(forkd, listeners=[{"path": extra}])
        upgrade(forkd)
        assert fate(forkd.ask(path=extra)) == "complete"
        upgrade(forkd)
        assert fate(forkd.ask(path=extra)) == "complete"


def test_a_socket_does_not_change_its_type_by_an_upgrade(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        reconfigure(forkd, server={"socket_type": "stream"})
        begin_upgrade(forkd)
        wait_for_log(forkd, "exited with status 1; going on as before")
        assert "is no stream socket, and only a restart makes it one" in forkd.output()
        assert fate(forkd.ask()) == "complete"


def test_metrics_may_be_given_up_by_an_upgrade(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        where = address(forkd)
        reconfigure(forkd, metrics={"enabled": False})
        upgrade(forkd)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(where).close()
        wait_for(lambda: not list((tmp_path / "metrics").iterdir()), "the files are gone")
        reconfigure(forkd, metrics={"enabled": True})
        upgrade(forkd)
        assert fate(forkd.ask()) == "complete"
        assert len(list((tmp_path / "metrics").iterdir())) == 1


def test_metrics_do_not_move_by_an_upgrade(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        host, port = address(forkd)
        upgrade(forkd)
        assert "metrics stay on" not in forkd.log()
        reconfigure(forkd, metrics={"listen_addr": "127.0.0.1:1"})
        upgrade(forkd)
        said = f"metrics stay on http://{host}:{port}/metrics: only a restart moves them to 127.0.0.1:1"
        assert said in forkd.log()
        assert requests.get(f"http://{host}:{port}/healthz", timeout=5).ok


def test_a_variable_that_somebody_else_set(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "forkd", "-s", str(tmp_path / "a.sock")],
        env={**os.environ, "FORKD_UPGRADE": "{}"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert run.returncode == 1
    assert "FORKD_UPGRADE is not set by forkd" in run.stderr


@pytest.fixture
def python_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the daemon run by a Python that `nobody` may run: an upgrade starts it as such. This one may be in a home."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *(entry for entry in sys.path if "site-packages" in entry)])
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            environ = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
            check = "import forkd.cli, workers.main, prometheus_client"
            subprocess.run(
                [python, "-P", "-c", check], check=True, user="nobody", group="nogroup", env=environ, cwd="/"
            )
            monkeypatch.setenv("PYTHONPATH", path)
            monkeypatch.setattr(crowd, "CRASHING", (python, *crowd.CRASHING[1:]))
            return
    pytest.skip("there is no Python that nobody may run")


@pytest.mark.usefixtures("python_for_all")
def test_a_master_that_dropped_its_privileges_upgrades(open_directory: Path) -> None:
    with daemon(open_directory, server={"user": "nobody"}) as forkd:
        with Load(forkd) as load:
            for _ in range(2):
                upgrade(forkd)
                assert {process.username() for process in family(open_directory)} == {"nobody"}
        assert load.verdicts() == load.complete
        assert forkd.stop() == 0
        assert not Path(forkd.path).exists()


def test_a_program_that_the_master_may_not_run_any_more(tmp_path: Path) -> None:
    """A Python that is gone, or that the user forkd became may not run."""
    link = tmp_path / "venv" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    for name in ("lib", "pyvenv.cfg"):
        (tmp_path / "venv" / name).symlink_to(Path(sys.prefix) / name)
    with daemon(tmp_path) as forkd:
        assert forkd.process is not None
        forkd.stop()
        (tmp_path / "forkd.log").unlink()
        forkd.command = (str(link), *forkd.command[1:])
        forkd.start()
        link.unlink()
        os.kill(forkd.pid, signal.SIGUSR2)
        wait_for_log(forkd, "the upgrade failed: cannot start a new master: No such file or directory; going on")
        assert fate(forkd.ask()) == "complete"


@pytest.mark.parametrize("numbers", [(signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM)])
def test_a_stop_at_once_reaches_the_master_that_still_drains(
    tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    with daemon(tmp_path) as forkd:
        clients = still(forkd, 5)
        old = hand_down(forkd)
        for number in numbers:
            os.kill(forkd.pid, number)
            wait_for(lambda: re.search("(finishing|ending) 0 streams", forkd.log()), "the signal was taken")
        assert fates(read_answers(clients)) == {"shutdown": 5}
        assert old.wait(20) == 0
        forkd.stop()
        wait_for(lambda: not family(tmp_path), "no process is left")
