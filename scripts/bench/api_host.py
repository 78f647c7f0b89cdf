"""Starts and stops the fake API, in a process of its own, and reads what it has to report."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from proc import Tree
from shape import Shape
from trial import TrialError

Upstream: TypeAlias = Literal["http1", "h2", "h2-tls"]
UPSTREAMS: tuple[Upstream, ...] = ("http1", "h2", "h2-tls")

_PROGRAM = Path(__file__).with_name("api.py")
_STOP_SECS = 10


@dataclass(frozen=True, slots=True)
class ApiTotals:
    """What the API reports at its end. Percentiles are None when there was nothing to count."""

    streams: int  # requests answered, trials not counted
    whole: int  # of them, answered to the end
    chunks: int
    connections: int  # that carried at least one of them
    connections_peak: int  # of those, open at once
    late_p50_ms: float | None  # from when a chunk was due to when it had been written
    late_p99_ms: float | None
    first_p50_ms: float | None  # from waking up for a request to its first chunk having been written
    first_p99_ms: float | None


class Api:
    """A running fake API."""

    def __init__(self, upstream: Upstream, shape: Shape, directory: Path) -> None:
        """Start it; it listens when this returns. `directory` receives its certificate and its log."""
        self.upstream = upstream
        self.ca_file = directory / "api.pem" if upstream == "h2-tls" else None
        self.totals: ApiTotals | None = None
        self._log = directory / "api.log"
        command = [sys.executable, str(_PROGRAM), "--protocol", upstream]
        command += ["--events", str(shape.events), "--delay-ms", f"{shape.delay_ms:g}"]
        if self.ca_file is not None:
            _make_certificate(self.ca_file)
            command += ["--cert", str(self.ca_file)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line.startswith("ready "):
            self.stop()
            raise TrialError(f"the fake API did not start: {self._log.read_text(errors='replace')}")
        self._port = int(line.split()[1])

    @property
    def base(self) -> str:
        """What a client calls its api_base."""
        return f"{'https' if self.ca_file else 'http'}://127.0.0.1:{self._port}/v1"

    @property
    def tree(self) -> Tree:
        """Its one process."""
        return Tree(self._process.pid)

    def stop(self) -> None:
        """End it; `totals` is there afterwards, unless it broke. Again does nothing."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            output = self._process.communicate(timeout=_STOP_SECS)[0]
        except subprocess.TimeoutExpired:
            self._process.kill()
            output = self._process.communicate()[0]
        if output:
            self.totals = ApiTotals(**json.loads(output))


def _make_certificate(path: Path) -> None:
    """A key and a certificate for 127.0.0.1 that is its own authority, both in `path`."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=forkd-bench", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    try:
        made = subprocess.run([*command, "-keyout", "-", "-out", "-"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or b""
        raise TrialError(f"openssl could not make a certificate: {error} {said.decode(errors='replace')}") from error
    path.write_bytes(made.stdout)
