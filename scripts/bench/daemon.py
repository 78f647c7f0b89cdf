"""A daemon that is being measured: its processes, how it is reached, how it is stopped."""

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from api_host import Api
from proc import Tree
from trial import TrialError

ROOT = Path(__file__).resolve().parents[2]

DATA = '{"prompt":"Hello","user_id":"u1","request_id":"bench-######"}'
STOP_SECS = 15


@dataclass(slots=True)
class Daemon:
    """A daemon that is up and ready. A fake API that it needs runs beside it: its cost is not the daemon's."""

    process: subprocess.Popen[bytes]
    socket_path: Path
    log: Path
    body: bytes = b""  # what each stream says after its head
    data: str = DATA  # of each handoff; over HTTP the whole request
    over_http: bool = False  # reached by HTTP on a Unix stream socket, not by handoffs
    api: Api | None = None
    metrics_url: str | None = None  # asked every second during the measurement

    @property
    def tree(self) -> Tree:
        """Its processes: all whose CPU and memory count."""
        return Tree(self.process.pid)

    def stop(self) -> int:
        """SIGTERM, then after `STOP_SECS` SIGKILL to all of it. Returns its exit status, negative for a signal."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)  # its own session: see spawn
            self.process.wait()
        if self.api is not None:
            self.api.stop()
        return self.process.returncode

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


def spawn(command: list[str], log: Path, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a daemon with its output in `log`, and `more` in its environment."""
    # A session of its own: a Ctrl-C in the terminal is ours to handle, and the whole group can be ended by its id.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("DAEMON_", "OPENAI_"))}
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ | dict(more or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def ready(daemon: Daemon, check: Callable[[], None]) -> Daemon:
    """The daemon, once `check` has passed; it is stopped when that raises."""
    try:
        check()
    except TrialError as error:
        status = daemon.process.poll()
        daemon.stop()
        ended = "" if status is None else f" (it ended with status {status})"
        raise TrialError(f"{error}{ended}\n{daemon.last_words()}".rstrip()) from error
    except BaseException:
        daemon.stop()
        raise
    return daemon
