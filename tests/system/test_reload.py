"""SIGHUP to a real daemon: its clients notice nothing, its operator everything."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.harness import Forkd, connect, open_fds, read_answers, wait_for
from tests.system.crowd import begun, fate, fates, hand_over_many, prompt, ready_pids, settled
from tests.system.succession import Load, daemon, family, reconfigure, reload, settled_workers


def generations(forkd: Forkd) -> set[str]:
    """Which generations have workers, by their titles."""
    return {re.findall(r"\[gen (\d+)\]", psutil.Process(pid).cmdline()[0])[0] for pid in forkd.workers()}


def wait_for_log(forkd: Forkd, text: str) -> None:
    wait_for(lambda: text in forkd.log(), f"the log says: {text}")


def test_reloads_under_load_lose_nobody_and_leave_nothing(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        before = open_fds(forkd.pid)
        with Load(forkd) as load:
            for _ in range(6):
                reload(forkd)
            os.kill(forkd.pid, signal.SIGTTIN)
            wait_for(lambda: len(ready_pids(forkd)) == 15, "one more is ready")
            os.kill(forkd.pid, signal.SIGTTOU)
        assert load.verdicts() == load.complete
        settled_workers(forkd, 2)
        assert settled(forkd, before) == {}
        wait_for(lambda: generations(forkd) == {"7"}, "the last generation is alone")
        assert forkd.metric("daemon_handoffs_total") == len(load.clients)
        assert forkd.metric("daemon_connections_rejected_total") == 0


def test_the_metrics_files_do_not_grow_in_number_with_reloads(tmp_path: Path) -> None:
    with daemon(tmp_path, workers=1) as forkd:

        def files() -> set[str]:
            return {file.name for file in (tmp_path / "metrics").glob("master-*/*.db")}

        for _ in range(3):
            reload(forkd)
            settled_workers(forkd, 1)
        found = files()
        for _ in range(4):
            reload(forkd)
            settled_workers(forkd, 1)
        assert files() == found


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ("workers: {count: many}\nserver: {linger: 3}", "workers.count: expected"),
        ("workers: {count: many}\nserver: {linger: 3}", "server.linger"),
        ("workers: [", "forkd.yaml: "),
        ("\0\x01\x02", "forkd.yaml: "),
        ("- a list", "expected a mapping of settings, got a list"),
        (None, "forkd.yaml: "),  # a directory
    ],
)
def test_a_broken_file_changes_nothing_and_its_faults_are_told(tmp_path: Path, written: str | None, fault: str) -> None:
    with daemon(tmp_path) as forkd:
        workers, fds = forkd.workers(), open_fds(forkd.pid)
        file = tmp_path / "forkd.yaml"
        good = file.read_text()
        file.unlink()
        if written is None:
            file.mkdir()
        else:
            file.write_text(written)
        os.kill(forkd.pid, signal.SIGHUP)
        wait_for_log(forkd, "the configuration is not valid; nothing is changed:")
        wait_for(lambda: fault in forkd.log().partition("nothing is changed:")[2], "the fault is named")
        assert forkd.workers() == workers
        assert fate(forkd.ask()) == "complete"
        assert settled(forkd, fds) == {}
        if written is None:
            file.rmdir()
        file.write_text(good)
        reload(forkd)
        assert fate(forkd.ask()) == "complete"


def test_keys_that_need_a_restart_are_named_and_the_others_take_effect(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        assert forkd.ask(prompt(backend="quick")).json["code"] == "unknown_backend"
        reconfigure(
            forkd,
            server={"socket_path": str(tmp_path / "other.sock"), "max_connections": 7},
            metrics={"listen_addr": "127.0.0.1:1"},
            workers={"count": 3},
            backends={"quick": {"provider": "mock", "token_delay_ms": 0, "text": "quick as that"}},
            logging={"level": "debug"},
        )
        assert " DEBUG " not in forkd.log()
        reload(forkd)
        wait_for_log(
            forkd,
            "a reload leaves server.socket_path, server.max_connections, metrics.listen_addr as it was: restart forkd",
        )
        assert len(settled_workers(forkd, 3)) == 3
        assert forkd.ask(prompt(backend="quick")).text == "quick as that"
        assert not (tmp_path / "other.sock").exists()
        wait_for(lambda: re.search(r" DEBUG +worker \d: ready after", forkd.log()), "the workers' level")
        os.kill(forkd.workers()[0], signal.SIGKILL)
        wait_for(lambda: re.search(r" DEBUG +master: worker \d started", forkd.log()), "the master's level")


def test_a_new_pace_is_for_new_streams(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        with connect(forkd.path) as sender:
            slow = hand_over_many(sender, [prompt(backend="slow")] * 4)
        begun(slow)
        reconfigure(forkd, backends={"slow": {"provider": "mock", "token_delay_ms": 0}})
        reload(forkd)
        before = time.monotonic()
        assert fate(forkd.ask(prompt(backend="slow"))) == "complete"
        assert time.monotonic() - before < 1.5  # it took 3.6 s
        assert fates(read_answers(slow)) == {"complete": 4}
        assert time.monotonic() - before > 1.5


def test_workers_that_crash_at_start_leave_the_old_ones_in_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    monkeypatch.setenv("FORKD_TEST_BROKEN", str(broken))
    with daemon(tmp_path) as forkd:
        workers, fds = forkd.workers(), open_fds(forkd.pid)
        with Load(forkd) as load:
            for attempt in (1, 2):
                broken.touch()
                os.kill(forkd.pid, signal.SIGHUP)
                wait_for(
                    lambda attempt=attempt: forkd.log().count("the reload failed: 3 of its workers died") == attempt,
                    "it gives up",
                )
                broken.unlink()
        assert "generation 1 stays in charge" in forkd.log()
        assert load.verdicts() == load.complete
        wait_for(lambda: forkd.workers() == workers, "the old workers are alone")
        assert settled(forkd, fds, deaths=forkd.log().count("exited with status 7")) == {}
        reload(forkd)
        assert fate(forkd.ask()) == "complete"


def test_a_storm_of_a_thousand(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        fds = open_fds(forkd.pid)
        with Load(forkd) as load:
            for _ in range(1000):
                os.kill(forkd.pid, signal.SIGHUP)
            wait_for_log(forkd, " serves; generation ")
            assert fate(forkd.ask()) == "complete"
        assert load.verdicts() == load.complete
        settled_workers(forkd, 2)
        assert settled(forkd, fds) == {}
        assert len(family(tmp_path)) == 4  # master, metrics, two workers: no reading is left behind
        assert forkd.metric("forkd_master_errors_total") == 0


def still(forkd: Forkd, count: int) -> list[socket.socket]:
    """Clients of streams that last for as long as anyone wants."""
    with connect(forkd.path) as sender:
        clients = hand_over_many(sender, [prompt(backend="still")] * count)
    begun(clients)
    return clients


def test_reloads_while_others_still_drain(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        held = []
        for generation in ("1", "2"):
            held.append(still(forkd, 4))
            assert generation in generations(forkd)
            reload(forkd)
        wait_for(lambda: generations(forkd) == {"1", "2", "3"}, "two drain, one serves")
        os.kill(forkd.pid, signal.SIGHUP)
        wait_for_log(forkd, "the reload waits: 2 generations are still draining")
        assert fate(forkd.ask()) == "complete"
        for client in held[0]:
            client.close()
        wait_for_log(forkd, "generation 4 serves; generation 3 drains")
        wait_for(lambda: generations(forkd) == {"2", "4"}, "the idle ones go at once")
        for client in held[1]:
            client.close()
        settled_workers(forkd, 2)


def test_streams_that_outlast_the_drain_are_told(tmp_path: Path) -> None:
    with daemon(tmp_path, server={"drain_timeout_secs": 0.5}) as forkd:
        before = open_fds(forkd.pid)
        clients = still(forkd, 6)
        reload(forkd)
        assert fates(read_answers(clients)) == {"shutdown": 6}
        assert "streams did not finish in time: ending them" in forkd.log()
        settled_workers(forkd, 2)
        assert settled(forkd, before) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_stop_during_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    hung = tmp_path / "hung"
    monkeypatch.setenv("FORKD_TEST_HUNG", str(hung))
    with daemon(tmp_path) as forkd:
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 10)
        begun(clients)
        hung.touch()
        os.kill(forkd.pid, signal.SIGHUP)
        wait_for_log(forkd, "generation 2: starting 2 workers")
        wait_for(lambda: len(family(tmp_path)) > 4, "one of them is starting, and stays so")
        left = family(tmp_path)
        os.kill(forkd.pid, number)
        assert fates(read_answers(clients)) == {"complete" if number == signal.SIGTERM else "shutdown": 10}
        assert forkd.process is not None
        assert forkd.process.wait(5) == 0  # it does not wait for those who never had a client
        wait_for(lambda: not any(process.is_running() for process in left), "no process is left")
        assert not Path(forkd.path).exists()


def test_a_stop_while_the_configuration_is_read(tmp_path: Path) -> None:
    with daemon(tmp_path) as forkd:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        file = tmp_path / "forkd.yaml"
        file.rename(tmp_path / "forkd.yaml.good")
        file.symlink_to(fifo)  # whoever opens it may wait for ever
        os.kill(forkd.pid, signal.SIGHUP)
        wait_for_log(forkd, "HUP: ")
        assert fate(forkd.ask()) == "complete"
        left = family(tmp_path)
        assert forkd.stop() == 0
        wait_for(lambda: not any(process.is_running() for process in left), "no process is left")


def test_an_old_worker_is_killed_during_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = tmp_path / "hung"
    monkeypatch.setenv("FORKD_TEST_HUNG", str(hung))
    with daemon(tmp_path) as forkd:
        before = open_fds(forkd.pid)
        victim, other = ready_pids(forkd)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="slow")] * 20)
        begun(clients)
        hung.touch()
        os.kill(forkd.pid, signal.SIGHUP)
        wait_for_log(forkd, "generation 2: starting 2 workers")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: forkd.metric("forkd_streams_recovered_total", outcome="ended"), "its clients are judged")
        hung.unlink()
        wait_for_log(forkd, "generation 2 serves; generation 1 drains")
        answers = fates(read_answers(clients))
        assert set(answers) == {"complete", "worker_lost"}
        wait_for(lambda: other not in forkd.workers(), "the old one is gone")
        settled_workers(forkd, 2)
        assert settled(forkd, before, deaths=1) == {"ended": answers["worker_lost"]}


def test_a_new_worker_is_killed_during_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = tmp_path / "hung"
    monkeypatch.setenv("FORKD_TEST_HUNG", str(hung))
    with daemon(tmp_path) as forkd:
        before = {child.pid for child in psutil.Process(forkd.pid).children()}
        hung.touch()
        with Load(forkd) as load:
            os.kill(forkd.pid, signal.SIGHUP)
            wait_for_log(forkd, "generation 2: starting 2 workers")

            def newborn() -> list[int]:
                return [child.pid for child in psutil.Process(forkd.pid).children() if child.pid not in before]

            wait_for(newborn, "one of them is there")
            victim = newborn()[0]
            os.kill(victim, signal.SIGKILL)
            wait_for_log(forkd, f"(pid {victim}) was killed by SIGKILL; streams: none in flight")
            hung.unlink()
            wait_for_log(forkd, "generation 2 serves; generation 1 drains")
        assert load.verdicts() == load.complete
        settled_workers(forkd, 2)


def test_workers_are_recycled_one_at_a_time_under_load(tmp_path: Path) -> None:
    with daemon(tmp_path, workers_more={"max_streams": 40}) as forkd:
        before = open_fds(forkd.pid)
        most = 0
        with Load(forkd) as load:

            def recycled() -> bool:
                nonlocal most
                most = max(most, len(forkd.workers()))
                return forkd.log().count(" is replaced: it had ") >= 3

            wait_for(recycled, "three were replaced")
        assert load.verdicts() == load.complete
        assert most == 3
        settled_workers(forkd, 2)
        assert settled(forkd, before) == {}


def test_a_worker_above_its_memory_is_recycled(tmp_path: Path) -> None:
    with daemon(tmp_path, workers_more={"max_rss_mb": 1}) as forkd:
        with Load(forkd) as load:
            wait_for_log(forkd, " is replaced: it uses ")
            wait_for(lambda: len(ready_pids(forkd)) >= 4, "two were replaced")
        assert load.verdicts() == load.complete


def test_settings_reach_the_master_too(tmp_path: Path) -> None:
    """The queue's, for one: it belongs to the dispatcher, which is no part of a generation."""
    with daemon(tmp_path, workers=1, server={"queue_timeout_secs": 60}) as forkd:
        reconfigure(forkd, server={"queue_timeout_secs": 0.3, "queue_size": 3})
        reload(forkd)
        (worker,) = settled_workers(forkd, 1)
        os.kill(worker, signal.SIGSTOP)
        with connect(forkd.path) as sender:
            clients = hand_over_many(sender, [prompt(backend="fast")] * 500)
        forkd.wait_for_metric("forkd_handoff_errors_total", 3, code="queue_timeout")
        os.kill(worker, signal.SIGCONT)
        answers = fates(read_answers(clients))
        assert answers["queue_timeout"] == 3
        assert answers["complete"] + answers["no_capacity"] == 497


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another")
def test_a_master_that_dropped_its_privileges_reloads(open_directory: Path) -> None:
    with daemon(open_directory, server={"user": "nobody"}) as forkd:
        with Load(forkd) as load:
            reconfigure(forkd, workers={"count": 3})
            reload(forkd)
            assert {psutil.Process(pid).username() for pid in settled_workers(forkd, 3)} == {"nobody"}
        assert load.verdicts() == load.complete
        (open_directory / "forkd.yaml").chmod(0o600)
        os.kill(forkd.pid, signal.SIGHUP)
        wait_for_log(forkd, "forkd.yaml: Permission denied")
        assert fate(forkd.ask()) == "complete"
