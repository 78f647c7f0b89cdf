"""`forkd demo`: everything in one command, without Apache and without root.

It starts the daemon as a child with a socket and a configuration of its own in a temporary directory, and the front
door in this process. INT, TERM or HUP stop both in order: no new requests, then TERM to the daemon, which gives its
streams a few seconds; a second signal ends them at once.

The daemon is in a process group of its own, so that a terminal's Ctrl-C reaches it only by way of us, and it is told to
stop by the kernel should we be killed.
"""

import argparse
import contextlib
import ctypes
import errno
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml

from forkd.front_door import ENDPOINT, FrontDoor
from forkd.process import Signals

START_TIMEOUT_SECS: Final = 20.0
SHUTDOWN_TIMEOUT_SECS: Final = 3
SOCKET_PATH_MAX: Final = 100
"""A Unix socket's path has 108 bytes (unix(7))."""
TEXT: Final = (
    "Hello! I am forkd's mock backend, and I say the same to everybody. The way these words take is real, though: the "
    "front door read your question, gave this very connection to forkd over a Unix socket, and forgot about it. The "
    "master passed it on to the worker with the fewest streams, and that worker is writing to your browser now, one "
    "server-sent event for each word. Press Stop, and it notices at once. Kill it (ps shows it as 'forkd: worker 1'), "
    "and you are told in good order, while another takes its place."
)
"""What the mock backend says in the demo."""
_PR_SET_PDEATHSIG: Final = 1
_POLL_SECS: Final = 0.02


class DemoError(Exception):
    """The demo cannot go on; the message is for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """`forkd demo ARGUMENTS`; returns the exit status."""
    return run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forkd demo",
        description="Starts forkd and a small web server with a chat page, to see streams at work without Apache.",
    )
    parser.add_argument("--port", type=_port, default=8080, help="where the page is served (8080; 0: any free one)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to serve it on (127.0.0.1: this machine alone)"
    )
    parser.add_argument("--backend", metavar="NAME", default="mock", help="what answers: mock (default) or typing")
    parser.add_argument("--workers", metavar="N", default="2", help="how many workers, or auto (2)")
    parser.add_argument(
        "--token-delay-ms", metavar="MS", type=_delay, help="between two pieces of mock's or typing's text"
    )
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def _delay(text: str) -> float:
    try:
        delay = float(text)
    except ValueError:
        delay = -1.0
    if not 0 <= delay <= 60_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no delay: give milliseconds from 0 to 60000")
    return delay


def run(options: argparse.Namespace) -> int:
    """Serve the demo until told to stop; returns the exit status."""
    signals = Signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), (signal.SIGPIPE,))
    try:
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(_temporary_directory())
            socket_path = os.path.join(directory, "forkd.sock")
            front_door = _front_door(options.host, options.port, socket_path)
            stack.callback(front_door.close)
            config = Path(directory, "forkd.yaml")
            config.write_text(yaml.safe_dump(_settings(options.token_delay_ms)))
            daemon = Daemon(config, socket_path, options)
            stack.callback(daemon.kill)
            if not daemon.wait_ready(signals):
                return daemon.stop(signals)
            front_door.start()
            _say(_welcome(front_door, daemon, options))
            daemon.wait(signals)
            front_door.close()
            _say("\nStopping. Ctrl-C once more ends the streams at once.")
            return daemon.stop(signals)
    except DemoError as error:
        print(f"forkd demo: {error}", file=sys.stderr)
        return 1


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, which is no reason to stop in disorder
        print(text, flush=True)


def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    long = len(tempfile.gettempdir()) > SOCKET_PATH_MAX - len("/forkd-demo-12345678/forkd.sock")
    return tempfile.TemporaryDirectory(prefix="forkd-demo-", dir="/tmp" if long else None, ignore_cleanup_errors=True)


def _settings(token_delay_ms: float | None) -> dict[str, object]:
    """The demo's configuration. The environment (DAEMON_*, OPENAI_*) is above it, as ever."""
    delay = {} if token_delay_ms is None else {"token_delay_ms": token_delay_ms}
    return {
        "server": {"max_connections": 1000, "shutdown_timeout_secs": SHUTDOWN_TIMEOUT_SECS},
        "metrics": {"enabled": False},
        "backends": {
            "mock": {"provider": "mock", "text": TEXT} | delay,
            "typing": {"provider": "typing"} | delay,
        },
    }


def _front_door(host: str, port: int, socket_path: str) -> FrontDoor:
    try:
        return FrontDoor(host, port, socket_path)
    except socket.gaierror as error:
        raise DemoError(f"cannot serve on {host}: {error.strerror}; choose an address with --host") from error
    except PermissionError as error:
        raise DemoError(f"port {port} is not yours to use; choose one above 1023 with --port") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DemoError(
                f"port {port} is in use; end the program that uses it, or choose another with --port"
            ) from (error)
        raise DemoError(f"cannot serve on {host} port {port}: {error.strerror}") from error


def _welcome(front_door: FrontDoor, daemon: "Daemon", options: argparse.Namespace) -> str:
    reach = (
        "" if front_door.is_local else "\n  Note     served to the network: whoever can reach this machine can use it\n"
    )
    command = f"curl -N {shlex.quote(front_door.url + ENDPOINT)} -d prompt=Hello"
    return f"""
  forkd demo

  Open     {front_door.url}
  Or try   {command}
  Stop     Ctrl-C
{reach}
  The front door (this process, in Apache's place) hands each request for a stream to forkd:
  pid {daemon.pid}, workers: {options.workers}, backend: {options.backend}. Its log:
"""


class Daemon:
    """The forkd that we started."""

    def __init__(self, config: Path, socket_path: str, options: argparse.Namespace) -> None:
        self._socket_path = socket_path
        command = [sys.executable, "-P", "-m", "forkd", "-c", str(config), "-s", socket_path]
        command += ["-b", options.backend, "-w", options.workers]
        environ = dict(os.environ)
        # -P and this path: the forkd that we are ourselves, whatever lies in the directory we were started in.
        own = str(Path(__file__).resolve().parents[1])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (own, environ.get("PYTHONPATH"))))
        if options.token_delay_ms is not None:
            environ["DAEMON_TOKEN_DELAY_MS"] = str(options.token_delay_ms)
        prctl = ctypes.CDLL(None).prctl
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=environ,
                process_group=0,
                preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509 - no threads yet
            )
        except OSError as error:
            raise DemoError(f"cannot start the daemon: {error}") from error
        self.pid = self._process.pid

    def wait_ready(self, signals: Signals) -> bool:
        """Until it accepts handoffs; False if we were told to stop meanwhile. Raises DemoError if it never does."""
        deadline = time.monotonic() + START_TIMEOUT_SECS
        while not self._accepts():
            if signals.take():
                return False
            if self._process.poll() is not None:
                raise DemoError(f"the daemon did not start ({self._how_it_ended()}); it says why above")
            if time.monotonic() > deadline:
                raise DemoError(f"the daemon did not start within {START_TIMEOUT_SECS:.0f} s")
            time.sleep(_POLL_SECS)
        return True

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            try:
                probe.connect(self._socket_path)
            except OSError:
                return False
        return True

    def wait(self, signals: Signals) -> None:
        """Until we are told to stop. Raises DemoError if the daemon ends by itself."""
        with selectors.DefaultSelector() as selector:
            pidfd = os.pidfd_open(self.pid)
            try:
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(signals.wakeup_fd, selectors.EVENT_READ)
                selector.select()
            finally:
                os.close(pidfd)
        if not signals.take():
            self._process.wait()
            raise DemoError(f"the daemon has stopped by itself ({self._how_it_ended()}); its log is above")

    def stop(self, signals: Signals) -> int:
        """TERM, or QUIT when we are told again; returns our exit status once it has ended."""
        self._process.terminate()
        with selectors.DefaultSelector() as selector:
            pidfd = os.pidfd_open(self.pid)
            try:
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(signals.wakeup_fd, selectors.EVENT_READ)
                while self._process.poll() is None:
                    selector.select()
                    if signals.take():
                        self._process.send_signal(signal.SIGQUIT)
            finally:
                os.close(pidfd)
        if self._process.returncode:
            raise DemoError(f"the daemon did not stop in good order ({self._how_it_ended()}); its log is above")
        return 0

    def kill(self) -> None:
        """End it whatever happens. Harmless when it has ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _how_it_ended(self) -> str:
        status = self._process.returncode
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"
