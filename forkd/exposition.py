"""The process that serves the metrics: `/metrics`, `/healthz`, `/readyz` and `/status`, over HTTP.

It asks nobody. The counts are in the files that the master and the workers write (`forkd.metrics`), everything else is
on the board, where the master leaves word of itself and its workers four times a second. So it answers the same whether
the master is busy, hangs or drains, and the master never waits for it. It has no fd of any client. When nobody asks
it sleeps in select without a timeout.

The master binds the port and keeps it: while this process is started again, scrapes wait in the backlog.
"""

import errno
import glob
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from logging import Logger
from math import inf
from typing import Final

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from forkd import process
from forkd.board import Board
from forkd.logs import Logs
from forkd.metrics import BOUNDS, SPECS
from forkd.overview import Overview
from forkd.settings import Settings, parse_address
from forkd.webserver import Reply, WebServer

BACKLOG: Final = 128
SKIPPED: Final = "forkd_metrics_files_skipped_total"
_ATTEMPTS: Final = 4
_TEXT: Final = "text/plain; charset=utf-8"

_HANDLED: Final = (signal.SIGUSR1,)
_IGNORED: Final = (  # it ends when the master does, whatever a terminal or `kill` says to the whole group
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGPIPE,
)


def bind(listen_addr: str) -> socket.socket:
    """The listening socket for `HOST:PORT`; an empty host is every address of both families. Raises OSError."""
    host, port = parse_address(listen_addr)
    try:
        sock = _listen(host, port)
    except socket.gaierror:
        raise
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "not a host name") from error
    except OSError as error:  # whose text, from create_server, would name the address twice
        raise OSError(error.errno, os.strerror(error.errno or 0)) from error
    sock.setblocking(False)
    return sock


def is_bound_to(listener: socket.socket, listen_addr: str) -> bool:
    """Whether `bind(listen_addr)` would give a socket of this address. A name that is not found is believed."""
    host, port = parse_address(listen_addr)
    bound_host, bound_port = listener.getsockname()[:2]
    if port not in (0, bound_port):
        return False
    if not host:
        return bound_host in ("::", "0.0.0.0")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return any(address[0] == bound_host for *_, address in found)


def _listen(host: str, port: int) -> socket.socket:
    if host:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return socket.create_server(("", port), backlog=BACKLOG)  # a machine without IPv6


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, as people write it: `127.0.0.1:9090`, `[::1]:9090`."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Collector:
    """What prometheus_client's MultiProcessCollector reads from the files, made whole.

    The library gives up at the first file that it cannot read, and files can be found half made or cut short. Such a
    file is left out, counted, and named in the log once. And what was never counted is 0 rather than absent, wherever
    the labels are known beforehand: a rate needs the 0 before the first 1. Gauges of the board are taken from there.
    """

    def __init__(self, directory: str, backends: Iterable[str], log: Logger, overview: Overview) -> None:
        self._directory = directory
        self._log = log
        self._overview = overview
        self._named: set[str] = set()
        self._skipped = 0
        self._zeros = [_zero(name, backends) for name in SPECS]

    def collect(self) -> Iterator[Metric]:
        """Every metric of SPECS, in that order. Raises OSError when there is nothing to read at all."""
        found = {family.name: family for family in self._read()}
        found.update(self._on_board())
        for zero in self._zeros:
            family = found.get(zero.name)
            if family is None:
                family = Metric(zero.name, zero.documentation, zero.type)
            have = {(sample.name, *sorted(sample.labels.items())) for sample in family.samples}
            family.samples += [s for s in zero.samples if (s.name, *sorted(s.labels.items())) not in have]
            if family.name + "_total" == SKIPPED:
                family.samples = [sample._replace(value=float(self._skipped)) for sample in family.samples]
            yield family

    def _on_board(self) -> dict[str, Metric]:
        families = {}
        for name, label, value in self._overview.gauges():
            if name not in families:
                families[name] = GaugeMetricFamily(name, SPECS[name].help, labels=SPECS[name].labels)
            families[name].add_metric([label] if label else [], value)
        return dict(families)

    def _read(self) -> Iterable[Metric]:
        files = glob.glob(os.path.join(glob.escape(self._directory), "*.db"))
        for _ in range(_ATTEMPTS):
            if not files:
                break
            try:
                return MultiProcessCollector.merge(files)  # type: ignore[no-any-return, no-untyped-call]
            except Exception:  # struct.error, RuntimeError, ValueError, OSError, KeyError: whatever the damage leads to
                files = [file for file in files if self._is_whole(file)]
        # Zeros would be a lie, which a counter that falls tells loudly.
        raise OSError(f"no file of counts in {self._directory} can be read; the log says why")

    def _is_whole(self, file: str) -> bool:
        try:
            MultiProcessCollector.merge([file])  # type: ignore[no-untyped-call]
        except FileNotFoundError:  # the gauges of a master that is gone
            return False
        except Exception as error:
            self._skipped += 1
            if file not in self._named:
                self._named.add(file)
                self._log.warning("%s cannot be read (%s) and is left out of the metrics", file, error)
            return False
        self._named.discard(file)
        return True


def _go(bound: float) -> str:
    """A bucket's bound as prometheus_client writes it."""
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


def _zero(name: str, backends: Iterable[str]) -> Metric:
    """A metric that was never counted. A histogram with a label shows nothing yet: too many zeros for too little."""
    spec = SPECS[name]
    if spec.kind == "gauge":
        return GaugeMetricFamily(name, spec.help, value=0 if spec.merge else None)
    if spec.kind == "counter":
        if not spec.labels:
            return CounterMetricFamily(name, spec.help, value=0)
        family = CounterMetricFamily(name, spec.help, labels=spec.labels)
        for value in sorted(backends) if spec.labels == ("backend",) else spec.values:
            family.add_metric([value], 0)
        return family
    histogram = HistogramMetricFamily(name, spec.help, labels=spec.labels)
    if not spec.labels:
        histogram.add_metric([], [(_go(bound), 0.0) for bound in (*BOUNDS[name], inf)], 0.0)
    return histogram


class Pages:
    """Path to answer."""

    def __init__(self, overview: Overview, collector: Collector) -> None:
        self._overview = overview
        self._collector = collector

    def answer(self, path: str, accept: str) -> Reply:
        """The page at `path`."""
        overview = self._overview
        if path == "/metrics":
            encode, content_type = choose_encoder(accept)
            try:
                return Reply(HTTPStatus.OK, content_type, encode(self._collector))
            except OSError as error:
                return _verdict(str(error))
        if path == "/healthz":
            return _verdict(overview.sickness())
        if path == "/readyz":
            return _verdict(overview.sickness() or overview.obstacle())
        if path == "/status":
            return Reply(HTTPStatus.OK, "application/json", msgspec.json.encode(overview.status()) + b"\n")
        return Reply(HTTPStatus.NOT_FOUND, _TEXT, b"here are /metrics, /healthz, /readyz and /status\n")


def _verdict(fault: str) -> Reply:
    if fault:
        return Reply(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{fault}\n".encode())
    return Reply(HTTPStatus.OK, _TEXT, b"ok\n")


class _Callbacks:
    """What ends the loop, and what reopens the log."""

    def __init__(self, lifeline: int, logs: Logs) -> None:
        self._lifeline = lifeline
        self.running = True
        self._logs = logs
        os.set_blocking(lifeline, False)
        self._signals = process.Signals(_HANDLED, _IGNORED)
        self.wakeup_fd = self._signals.wakeup_fd

    def on_ready(self, _mask: int) -> None:
        """A signal came, or the master has gone."""
        if self._signals.take():
            try:
                self._logs.sink.reopen()
            except OSError as error:
                self._logs.logger.error("cannot reopen %s: %s", self._logs.sink.path, error.strerror)
        try:
            self.running = bool(os.read(self._lifeline, 1))
        except BlockingIOError:
            pass


class Exposition:
    """The process's main function and what it inherits. Made in the master; `run` is called in the child."""

    def __init__(self, listener: socket.socket, board: Board, settings: Settings, directory: str, logs: Logs) -> None:
        self._listener = listener
        self._logs = logs
        overview = Overview(board, os.getpid(), time.monotonic())
        self._pages = Pages(overview, Collector(directory, settings.backends, logs.logger, overview))

    def fds(self) -> tuple[int, ...]:
        """What the process needs of the master's."""
        return (self._listener.fileno(),)

    def run(self, lifeline: int) -> None:
        """Serve until the master has gone."""
        callbacks = _Callbacks(lifeline, self._logs)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        process.restore_signals(set())
        process.Title().show(f"forkd: metrics [{address_of(self._listener)}]", time.monotonic())
        selector = selectors.DefaultSelector()
        selector.register(lifeline, selectors.EVENT_READ, callbacks)
        selector.register(callbacks.wakeup_fd, selectors.EVENT_READ, callbacks)
        server = WebServer(selector, self._listener, self._pages.answer, self._logs.logger)
        while callbacks.running:
            for key, mask in selector.select(server.timeout(time.monotonic())):
                key.data.on_ready(mask)
            server.expire(time.monotonic())
