"""Pools: workers for some listeners and nobody else, while everything happens to them that happens to workers."""

import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.harness import Answer, Forkd, read_answer, read_answers, wait_for
from tests.system.crowd import begun, prompt, settled
from tests.system.succession import daemon, hand_down, reconfigure, reload
from tests.system.test_handlers import zoo


def config(directory: Path, heavy: int) -> dict[str, Any]:
    """A pool whose workers have one thread each for a handler that computes."""
    return {
        "server": {"headers_after_secs": 0, "heartbeat_secs": 0},
        "listeners": [{"path": str(directory / "heavy.sock"), "backend": "computes", "pool": "heavy"}],
        "pools": {"heavy": {"count": heavy}},
        "backends": {
            "mock": {"provider": "mock", "token_delay_ms": 10},
            "slow": {"provider": "mock", "token_delay_ms": 100},
            "computes": zoo("computes", threads=1, queue_timeout_secs=60),
        },
        "logging": {"level": "info", "access": True},
    }


def compute(forkd: Forkd, until: Path, backend: str = "computes") -> socket.socket:
    payload = prompt(until=str(until), backend=backend)
    return forkd.hand_over(payload, path=str(forkd.directory / "heavy.sock"))


def get(forkd: Forkd, path: str) -> requests.Response:
    return requests.get(re.findall(r"metrics on (http://\S+)/metrics", forkd.log())[-1] + path, timeout=10)


def status(forkd: Forkd) -> dict[str, Any]:
    parsed = json.loads(get(forkd, "/status").text)
    assert isinstance(parsed, dict)
    return parsed


def streams(forkd: Forkd) -> dict[str, int]:
    """How many streams the workers of each pool have."""
    found: dict[str, int] = {}
    for worker in status(forkd)["workers"]:
        found[worker["pool"]] = found.get(worker["pool"], 0) + worker["streams"]
    return found


def pools(forkd: Forkd) -> dict[str, int]:
    """How many workers each pool is to have."""
    return {pool["name"]: pool["wanted_workers"] for pool in status(forkd)["pools"]}


def titles(forkd: Forkd) -> list[str]:
    return sorted(psutil.Process(pid).cmdline()[0].partition(" streams=")[0] for pid in forkd.workers())


def heavy_pid(forkd: Forkd) -> int:
    (worker,) = [worker for worker in status(forkd)["workers"] if worker["pool"] == "heavy"]
    pid = worker["pid"]
    assert isinstance(pid, int)
    return pid


def has_nothing(client: socket.socket) -> bool:
    try:
        client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    return False


def many(forkd: Forkd) -> list[Answer]:
    """Streams of the common pool."""
    return read_answers([forkd.hand_over() for _ in range(50)])


def test_a_pool_that_computes_for_ever_is_nobody_elses_trouble(tmp_path: Path) -> None:
    until = tmp_path / "until"
    with daemon(tmp_path, workers=2, **config(tmp_path, heavy=1)) as forkd:
        before = forkd.idle_fds()
        assert "worker 3 ready (pid" in forkd.log()
        assert ", generation 1, pool heavy)" in forkd.log()
        first = compute(forkd, until)
        begun([first])
        second = compute(forkd, until)
        wait_for(lambda: streams(forkd) == {"common": 0, "heavy": 2}, "the pool's one worker has both")
        assert all(answer.complete for answer in many(forkd))
        assert has_nothing(second)  # all those came and went, and it still waits for the first to end
        expected = ["forkd: worker 1 [gen 1]", "forkd: worker 2 [gen 1]", "forkd: worker 3 (heavy) [gen 1]"]
        assert titles(forkd) == expected
        until.touch()
        assert [answer.text for answer in read_answers([first, second])] == ["word of wisdom"] * 2
        lines = wait_for(lambda: len(forkd.access_lines()) == 52 and forkd.access_lines(), "every stream is logged")
        assert {(line["worker"], line["backend"]) for line in lines} == {
            ("1", "mock"),
            ("2", "mock"),
            ("3", "computes"),
        }
        shown = get(forkd, "/metrics").text
        assert 'forkd_pool_workers_ready{pool="heavy"} 1.0' in shown
        assert 'forkd_pool_workers_wanted{pool="common"} 2.0' in shown
        forkd.wait_for_fds(before)


def test_death_and_silence_in_a_pool_stay_there(tmp_path: Path) -> None:
    until = tmp_path / "until"
    with daemon(tmp_path, workers=2, **config(tmp_path, heavy=1)) as forkd:
        fds = forkd.idle_fds()
        first = compute(forkd, until)
        begun([first])
        second = compute(forkd, until)
        wait_for(lambda: streams(forkd)["heavy"] == 2, "both were given")
        neighbours = [forkd.hand_over(prompt(backend="slow")) for _ in range(20)]
        victim = heavy_pid(forkd)
        os.kill(victim, signal.SIGKILL)
        lost = read_answer(first)
        assert lost.error is not None
        assert lost.error["code"] == "worker_lost"
        begun([second])  # it had not begun, so another worker of its pool has it now
        wait_for(lambda: streams(forkd) == {"common": 20, "heavy": 1}, "the neighbours are where they were")
        assert heavy_pid(forkd) != victim
        assert all(answer.complete for answer in read_answers(neighbours))

        os.kill(heavy_pid(forkd), signal.SIGSTOP)
        refusal = wait_for(lambda: (answer := get(forkd, "/readyz")).status_code == 503 and answer.text, "not ready")
        assert refusal == "no worker of the pool heavy is ready\n"
        third = compute(forkd, until)
        wait_for(lambda: status(forkd)["queued"] == 1, "it waits, though workers of the common pool are idle")
        assert all(answer.complete for answer in many(forkd))
        assert streams(forkd) == {"common": 0, "heavy": 1}
        os.kill(heavy_pid(forkd), signal.SIGCONT)
        wait_for(lambda: get(forkd, "/readyz").status_code == 200, "ready again")
        until.touch()
        assert [answer.text for answer in read_answers([second, third])] == ["word of wisdom"] * 2
        assert settled(forkd, fds[0], deaths=1) == {"ended": 1, "redispatched": 1}
        files = {file.name for file in (tmp_path / "metrics").glob("master-*/counter_*")}
        assert files == {"counter_master.db", *(f"counter_worker-{index}.db" for index in (1, 2, 3))}


def test_reloads_and_an_upgrade_change_the_pools_and_cut_no_stream(tmp_path: Path) -> None:
    until = tmp_path / "until"
    with daemon(tmp_path, workers=1, **config(tmp_path, heavy=1)) as forkd:
        old = compute(forkd, until)
        begun([old])
        waiting = compute(forkd, until)
        wait_for(lambda: streams(forkd)["heavy"] == 2, "both were given")
        reconfigure(forkd, pools={"heavy": {"count": 2}})
        reload(forkd)
        pair = [compute(forkd, until) for _ in range(2)]
        begun(pair)  # which one worker alone could not do
        wait_for(lambda: len(forkd.workers()) == 4, "the old one drains, the old common one is gone")
        wait_for(lambda: "forkd: worker 2 (heavy) [gen 1] draining" in titles(forkd), "its title says so")
        assert sum("(heavy) [gen 2]" in title for title in titles(forkd)) == 2

        for number in (signal.SIGTTIN, signal.SIGTTOU):
            os.kill(forkd.pid, number)
        wait_for(lambda: re.findall(r"(\d) workers wanted", forkd.log()) == ["2", "1"], "the common pool's alone")

        hand_down(forkd)
        newest = [compute(forkd, until) for _ in range(2)]
        begun(newest)
        wait_for(lambda: pools(forkd) == {"common": 1, "heavy": 2}, "the new master has as many")

        listener = {"path": str(tmp_path / "heavy.sock"), "backend": "computes"}
        file = tmp_path / "forkd.yaml"
        reconfigure(forkd, listeners=[listener])
        file.write_text(file.read_text().replace("pools:\n  heavy:\n    count: 2\n", ""))
        reload(forkd)
        common = compute(forkd, until, backend="mock")
        assert read_answer(common).complete
        wait_for(lambda: pools(forkd) == {"common": 1}, "there is no other pool any more")
        until.touch()
        answers = read_answers([old, waiting, *pair, *newest])
        assert [answer.text for answer in answers] == ["word of wisdom"] * 6
        wait_for(lambda: len(forkd.workers()) == 1, "one worker is left")


@pytest.mark.parametrize("written", ["hevy", None])
def test_a_reload_that_names_no_pool_or_a_wrong_one_changes_nothing(tmp_path: Path, written: str | None) -> None:
    with daemon(tmp_path, workers=1, **config(tmp_path, heavy=1)) as forkd:
        workers = forkd.workers()
        listener = {"path": str(tmp_path / "heavy.sock"), "backend": "computes", "pool": written}
        reconfigure(forkd, listeners=[listener])
        os.kill(forkd.pid, signal.SIGHUP)
        fault = "did you mean heavy?" if written else "no listener names it"
        wait_for(lambda: fault in forkd.log().partition("nothing is changed:")[2], "the fault is named")
        assert forkd.workers() == workers
