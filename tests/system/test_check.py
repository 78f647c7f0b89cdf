"""`forkd check` beside a running daemon."""

import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import PATIENCE_SECS, Forkd, read_answer, running, wait_for


def check(forkd: Forkd, *arguments: str, **how: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "forkd", "check", "-c", str(forkd.directory / "forkd.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECS, check=False, **how)


def test_a_running_daemon_is_recognised_and_left_alone(tmp_path: Path) -> None:
    with running(tmp_path) as forkd, forkd.counting():
        client = forkd.hand_over()
        said = check(forkd)
        assert (said.returncode, said.stderr) == (0, "")
        assert f"forkd.sock: forkd (pid {forkd.pid}) listens on it now" in said.stdout
        assert read_answer(client).complete
        assert "ERROR" not in forkd.log()


@pytest.mark.parametrize("limit", [400, 5000])
def test_it_reckons_as_the_master_does(tmp_path: Path, limit: int) -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    # Root may raise a limit again, up to what is wanted: the capacity is then the same with any.
    config = {"server": {"max_connections": 3000}}
    with running(tmp_path, config=config, popen={"preexec_fn": lower}) as forkd:
        room = wait_for(lambda: re.search(r"room for (\d+) streams", forkd.log()), "the daemon's own word")[1]
        said = check(forkd, preexec_fn=lower)
        assert f"{int(room):,} streams at once" in said.stdout


def test_the_configuration_is_good_for_the_daemon_if_it_is_for_the_check(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        file = tmp_path / "forkd.yaml"
        file.write_text(file.read_text() + "nonsense: true\n")
        said = check(forkd)
        assert (said.returncode, said.stderr) == (2, "")
        assert said.stdout.startswith("fault   configuration    nonsense: unknown key")
