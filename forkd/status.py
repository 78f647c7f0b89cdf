"""`forkd status`: a live table of the master and its workers, from `/status`.

It asks the process that serves the metrics, so it never disturbs the master, and works from another machine too.
Without a terminal, or with `--once`, the table is printed once.

Exit status: 0 the daemon is ready (and when a live table is left by Ctrl-C), 1 it answers but would take no handoff
now, 2 the command line or the configuration is wrong, 3 it cannot be reached.
"""

import argparse
import http.client
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from rich.console import Console
from rich.live import Live

from forkd import config, lookout
from forkd.overview import Status
from forkd.panel import Panel
from forkd.settings import parse_address

READY: Final = 0
NOT_READY: Final = 1
WRONG: Final = 2
UNREACHABLE: Final = 3

TIMEOUT_SECS: Final = 3.0
REFRESH_SECS: Final = 1.0
SAMPLE_SECS: Final = 0.5
"""Between two looks at the master's CPU time, where there is to be one table only."""
MAX_BYTES: Final = 8 << 20

_EPILOG: Final = """\
It asks http://ADDRESS/status, where ADDRESS is metrics.listen_addr of the configuration (127.0.0.1:9090 without one),
or --addr. So metrics must not be switched off.

The columns: new/s, cpu and memory are of the last second (100% is one CPU); restarts counts the workers that died with
this number; oldest is the age of the worker's oldest stream. A worker's state is starting, standby (ready, and waiting
for the rest of its generation), ready, draining, or late (its heartbeat is missing, so it gets no handoffs).

exit status:
  0  the daemon is ready, or you left the table by Ctrl-C
  1  it answers, but takes no handoffs just now; the table says why
  2  the command line or the configuration is wrong
  3  it is not running, or cannot be reached

examples:
  forkd status -c /etc/forkd.yaml
  forkd status --addr 10.0.0.7:9090 --once
  forkd status --json | jq '.workers[].rss_bytes'
"""


class Unreachable(Exception):
    """There is no status to be had; the message says why, and what to do."""


def main(argv: Sequence[str]) -> int:
    """`forkd status ARGUMENTS`; returns the exit status."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a live table gives the terminal back
    try:
        return _run(options)
    except config.ConfigError as error:
        print("forkd status: the configuration is not valid (with --addr none is read):", file=sys.stderr)
        for fault in error.faults:
            print(f"  {fault}", file=sys.stderr)
        return WRONG
    except Unreachable as error:
        print(f"forkd status: {error}", file=sys.stderr)
        return UNREACHABLE
    except KeyboardInterrupt:
        return READY
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READY


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forkd status",
        description="A live table of the master and its workers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="the daemon's configuration, which says where to ask")
    parser.add_argument("--addr", metavar="HOST:PORT", type=_address, help="where to ask instead")
    parser.add_argument("--once", action="store_true", help="print the table once")
    parser.add_argument("--json", action="store_true", help="print what /status answers, once")
    return parser


def _address(written: str) -> tuple[str, int]:
    try:
        return parse_address(written)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {error}, got {written!r}") from error


def _run(options: argparse.Namespace) -> int:
    place = Place.given(*options.addr) if options.addr else Place.configured(options.config)
    if options.json:
        body = place.fetch()
        status = place.decode(body)
        print(body.decode().rstrip("\n"), flush=True)
        return NOT_READY if status.obstacle else READY
    console = Console(highlight=False)
    panel = Panel(place.status())
    if options.once or not console.is_terminal or console.is_dumb_terminal:
        time.sleep(SAMPLE_SECS)
        panel.update(place.status())
        console.print(panel.render(console))
        return NOT_READY if panel.status.obstacle else READY
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(panel.render(console, live=True), refresh=True)
                time.sleep(REFRESH_SECS)
                try:
                    panel.update(place.status())
                except Unreachable as error:
                    panel.lost(str(error).partition("\n")[0])
    except KeyboardInterrupt:
        console.print(panel.render(console))  # the screen that Live leaves is taken from the terminal
    return READY


@dataclass(frozen=True, slots=True)
class Place:
    """Where to ask. `hint` is what to try when nothing answers there."""

    host: str
    port: int
    hint: str

    @classmethod
    def given(cls, host: str, port: int) -> "Place":
        """An address from the command line."""
        return cls(_reachable(host), port, "Its log says where it serves them: 'metrics on http://...'")

    @classmethod
    def configured(cls, path: str | None) -> "Place":
        """The address of a configuration. Raises ConfigError or Unreachable."""
        settings = config.load(path, os.environ).settings
        source = path or "the configuration"
        if not settings.metrics.enabled:
            raise Unreachable(f"metrics are switched off in {source} (metrics.enabled), and they tell the status")
        host, port = parse_address(settings.metrics.listen_addr)
        if not port:
            raise Unreachable(
                f"metrics.listen_addr in {source} has port 0, so only the daemon's log knows which it got "
                "('metrics on http://...'): give it with --addr"
            )
        socket_path = settings.server.socket_path
        who = lookout.described(socket_path)
        if who.startswith("forkd"):
            hint = (
                f"{who} listens on {socket_path}, so it runs without metrics (metrics.enabled: false, --benchmark, the "
                "port was taken), or serves them elsewhere: its log says where. Give that with --addr"
            )
        else:
            hint = f"No forkd listens on {socket_path} either: start it with 'forkd{f' -c {path}' if path else ''}'"
            if path is None:
                hint += ". If it has a configuration file, name it with -c, or its metrics' address with --addr"
        return cls(_reachable(host), port, hint)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def status(self) -> Status:
        """Ask. Raises Unreachable."""
        return self.decode(self.fetch())

    def fetch(self) -> bytes:
        """What `/status` answers. Raises Unreachable."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_SECS)
        try:
            connection.request("GET", "/status")
            answer = connection.getresponse()
            body = answer.read(MAX_BYTES)
        except ConnectionRefusedError:
            raise Unreachable(f"nothing answers on {self}: forkd is not running there.\n{self.hint}.") from None
        except TimeoutError:
            raise Unreachable(f"no answer from {self} within {TIMEOUT_SECS:.0f} s") from None
        except socket.gaierror as error:
            raise Unreachable(f"cannot find {self.host}: {error.strerror}") from None
        except (http.client.HTTPException, UnicodeError):
            raise self._stranger() from None
        except OSError as error:
            raise Unreachable(f"cannot ask {self}: {error.strerror or error}") from None
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise self._stranger()
        return body

    def decode(self, body: bytes) -> Status:
        """Raises Unreachable if this is no status."""
        try:
            return msgspec.json.decode(body, type=Status)
        except msgspec.MsgspecError:
            raise self._stranger() from None

    def _stranger(self) -> Unreachable:
        return Unreachable(f"what answers on {self} is not forkd. Give the right address with --addr")


def _reachable(host: str) -> str:
    """An address to ask, for one to listen on: those that mean every address are reached by the loopback."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
