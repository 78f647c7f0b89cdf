"""The short form of scripts/chaos.py: every promise under a light load, in under half a minute."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.system.succession import masters

SCRIPT = Path(__file__).parents[2] / "scripts" / "chaos.py"


def test_every_promise_is_kept_in_the_short_form() -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--short"], capture_output=True, text=True, timeout=120, check=False
    )
    print(run.stderr, run.stdout)
    assert run.returncode == 0
    assert "BROKEN" not in run.stdout
    assert run.stdout.count("\nkept ") == 13  # none was left out


def test_a_broken_promise_is_told(tmp_path: Path) -> None:
    """A forkd that dies under it: what cannot be served is seen by the clients, and the exit status says so."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--short", "--keep", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        while process.stderr.readline() != "baseline …\n":
            pass
        (master,) = masters(tmp_path)
        os.kill(master, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "BROKEN" in output
