"""forkd as PID 1, or as any process that the kernel gives orphans to: prctl(2), PR_SET_CHILD_SUBREAPER."""

import os
import signal
import sys
from pathlib import Path

import psutil

from tests.harness import read_answer, running, wait_for
from tests.system.programs import shell

ADOPTS = (
    sys.executable,
    "-c",
    "import ctypes, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); from forkd.__main__ import main; sys.exit(main())",
)


def test_orphans_are_reaped_and_never_taken_for_workers(tmp_path: Path) -> None:
    for name in ("up", "end"):
        os.mkfifo(tmp_path / name)
    # It leaves the program's group, and so outlives it.
    orphan = f"echo $$ > {tmp_path}/up; read -r line < {tmp_path}/end"
    script = f"setsid sh -c '{orphan}' < /dev/null > /dev/null 2>&1 & read -r pid < {tmp_path}/up; echo $pid"
    backends = {"own": shell(script), "mock": {"provider": "mock", "token_delay_ms": 10}}
    with running(tmp_path, config={"backends": backends}, command=ADOPTS) as forkd:
        workers = forkd.workers()
        pid = int(read_answer(forkd.hand_over(b'{"prompt":"x","backend":"own"}')).body)
        wait_for(lambda: psutil.Process(pid).ppid() == forkd.pid, "the master has it")
        os.kill(workers[0], signal.SIGKILL)
        (tmp_path / "end").write_text("now\n")  # the two die at about the same time
        wait_for(lambda: len(forkd.workers()) == 2 and workers[0] not in forkd.workers(), "another worker")
        wait_for(lambda: not psutil.pid_exists(pid), "the orphan was waited for")
        assert workers[1] in forkd.workers()
        assert len(forkd.workers()) == 2
        forkd.wait_for_metric("forkd_worker_deaths_total", 1)
        assert forkd.ask(b'{"prompt":"x","backend":"mock"}').complete
        assert "a bug in the master" not in forkd.log()
