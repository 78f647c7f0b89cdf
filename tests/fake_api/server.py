"""The fake API's server: its thread, its listener, what it remembers and how it is told what to do."""

import asyncio
import contextlib
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.fake_api.certificates import Certificates, Kind
from tests.fake_api.exchange import Exchange
from tests.fake_api.gate import Gate
from tests.fake_api.http1 import Http1Connection
from tests.fake_api.http2 import PREFACE, Http2Connection
from tests.fake_api.patterns import Pattern, find
from tests.fake_api.patterns.statuses import status
from tests.fake_api.pipe import PIECE, Pipe
from tests.fake_api.records import Connection, Seen

_PATIENCE_SECS = 20.0
_POLL_SECS = 0.01
_BACKLOG = 4096
_TLS_GOODBYE_SECS = 0.2
"""How long a client may take to answer the close_notify of a connection that is closed in order."""

T = TypeVar("T")


class FakeApi:
    """An LLM API on loopback or a Unix socket, in a thread of its own from `with` on.

    What a request is answered by: the next of `script`, or else its header X-Test-Pattern, or else `default`. Each of
    these is a pattern's name with its arguments ("429 retry_after=2"), or a coroutine function that takes an Exchange.
    What happens to the next connections: `on_accept`, of "reset", "silent" (no handshake, no word) and "serve".

    An exception in a pattern, such as a name that there is not, is raised when the `with` ends.
    """

    def __init__(
        self,
        *,
        tls: Kind | None = None,
        alpn: Sequence[str] = ("h2", "http/1.1"),
        prior_knowledge: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
        unix_path: Path | str | None = None,
        max_streams: int = 100,
        default: str | Pattern = "ok",
        listen: bool = True,
    ) -> None:
        """With `tls` it has that kind of certificate and offers `alpn`; `prior_knowledge` is HTTP/2 without that.
        `host` may be "::1". `max_streams` is of HTTP/2, per connection. Without `listen` it accepts nothing, and the
        connections of its clients wait.
        """
        self.requests: list[Seen] = []
        self.connections: list[Connection] = []
        self.connections_peak = 0
        """The most that were open at once."""
        self.script: list[str | Pattern] = []
        self.on_accept: list[str] = []
        self.default = default
        self.max_streams = max_streams
        self.gate = Gate(self.changed)
        self.errors: list[BaseException] = []
        self.ca_file = ""
        """The authority to trust, under `tls`."""
        self.unix_path = None if unix_path is None else str(unix_path)
        self.host = host
        self.port = port
        self._tls = tls
        self._alpn = alpn
        self._prior_knowledge = prior_knowledge
        self._listening = listen
        self._news = threading.Condition()
        self._pipes: set[Pipe] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._names: dict[int, str | None] = {}
        self._context: ssl.SSLContext | None = None
        self._listener: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fake API", daemon=True)

    def __enter__(self) -> Self:
        if self._tls:
            self._context = self._make_context(self._tls)
        self._bind()
        self._thread.start()
        if self._listening:
            self._call(self._begin())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.errors and error is None:
            raise self.errors[0]

    @property
    def root(self) -> str:
        """The URL without a path: LangGraph's api_base."""
        host = "localhost" if self.unix_path else f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.unix_path else f":{self.port}"
        return f"{'https' if self._tls else 'http'}://{host}{port}"

    @property
    def base(self) -> str:
        """OpenAI's and Anthropic's api_base."""
        return self.root + "/v1"

    @property
    def connections_opened(self) -> int:
        return len(self.connections)

    @property
    def connections_open(self) -> int:
        return sum(connection.closed_at is None for connection in list(self.connections))

    def wait_for(
        self, condition: Callable[["FakeApi"], T], what: str = "something", patience: float = _PATIENCE_SECS
    ) -> T:
        """Wait until `condition(api)` is true, and return what it returned."""
        end = time.monotonic() + patience
        with self._news:
            while not (result := condition(self)):
                assert time.monotonic() < end, f"the fake API never saw {what}: {self.requests} {self.connections}"
                self._news.wait(_POLL_SECS)
        return result

    def changed(self) -> None:
        """Wake those who wait."""
        with self._news:
            self._news.notify_all()

    def stop_listening(self) -> None:
        """Refuse new connections; those that are go on."""
        self._call(self._stop_listening())

    def listen(self) -> None:
        """Accept, for the first time or again, at the same place."""
        if self._listener is None:
            self._bind()
        self._call(self._begin())

    def drop_connections(self, *, reset: bool = False) -> None:
        """Close or reset every connection, as a restarting server or a balancer does with idle ones."""
        self._call(self._drop(reset))

    def asked(self, seen: Seen) -> None:
        """A request is complete. Called by the connections, which have it answered next."""
        self.requests.append(seen)
        seen.connection.requests += 1
        self.changed()

    async def answer(self, exchange: Exchange) -> None:
        """Let a request have the answer it is to get. Called by the connections."""
        seen = exchange.seen
        try:
            await self._pattern(exchange)(exchange)
        except OSError:
            if not exchange.pipe.closed and not seen.over:
                seen.cancelled_at = time.monotonic()
        except Exception as error:  # a test's mistake: it is told at the end, the client at once
            self.errors.append(error)
            exchange.cut()
        finally:
            if not seen.over:
                seen.ended_at = time.monotonic()
            self.changed()

    def _pattern(self, exchange: Exchange) -> Pattern:
        if not exchange.known:
            return lambda ask: status(ask, code=404)
        chosen = self.script.pop(0) if self.script else exchange.seen.headers.get("x-test-pattern") or self.default
        exchange.seen.pattern = chosen if isinstance(chosen, str) else chosen.__name__
        self.changed()
        return find(chosen) if isinstance(chosen, str) else chosen

    def _make_context(self, kind: Kind) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._directory = tempfile.TemporaryDirectory(prefix="fake-api-")
        certificates = Certificates(Path(self._directory.name))
        self.ca_file = str(certificates.ca_file)
        context.load_cert_chain(certificates.server(kind))
        if self._alpn:
            context.set_alpn_protocols(list(self._alpn))
        context.sni_callback = self._named
        return context

    def _named(self, tls: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        self._names[id(tls)] = name

    def _bind(self) -> None:
        if self.unix_path:
            Path(self.unix_path).unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.unix_path)
        else:
            listener = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
            self.port = listener.getsockname()[1]
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._listener = listener

    # From here on everything runs on the loop's thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(_PATIENCE_SECS)

    async def _begin(self) -> None:
        self._accepting = self._spawn(self._accept())

    async def _stop_listening(self) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _drop(self, reset: bool) -> None:
        for pipe in list(self._pipes):
            (pipe.reset if reset else pipe.close)()

    async def _end(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        await self._drop(reset=True)
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        if self._context is not None:
            self._directory.cleanup()

    def _spawn(self, what: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.errors.append(error)

    async def _accept(self) -> None:
        assert self._listener is not None
        while True:
            sock, _ = await self._loop.sock_accept(self._listener)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            record = Connection(len(self.connections), time.monotonic())
            self.connections.append(record)
            self.connections_peak = max(self.connections_peak, self.connections_open)
            self.changed()
            self._spawn(self._serve(sock, record))

    async def _serve(self, sock: socket.socket, record: Connection) -> None:
        fate = self.on_accept.pop(0) if self.on_accept else "serve"
        try:
            with sock:
                if fate == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif fate == "silent":
                    with contextlib.suppress(ConnectionError):
                        while await self._loop.sock_recv(sock, PIECE):
                            pass
                    record.closed_by_client = True
                else:
                    await self._speak(sock, record)
        finally:
            record.closed_at = time.monotonic()
            self.changed()

    async def _speak(self, sock: socket.socket, record: Connection) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: protocol,
                sock,
                ssl=self._context,
                ssl_shutdown_timeout=None if self._context is None else _TLS_GOODBYE_SECS,
            )
        except OSError as error:
            record.fault = f"TLS handshake: {error}"
            return
        pipe = Pipe(asyncio.StreamWriter(transport, protocol, reader, self._loop))
        self._pipes.add(pipe)
        try:
            await self._converse(transport, reader, pipe, record)
        except OSError:
            pass
        finally:
            record.closed_by_client = not pipe.closed
            self._pipes.discard(pipe)
            pipe.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await pipe.gone()

    async def _converse(
        self, transport: asyncio.BaseTransport, reader: asyncio.StreamReader, pipe: Pipe, record: Connection
    ) -> None:
        alpn = None
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            record.tls_version = tls.version()
            record.server_name = self._names.pop(id(tls), None)
            alpn = tls.selected_alpn_protocol()
        data = b""
        if alpn is None and self._prior_knowledge:
            while len(data) < len(PREFACE) and PREFACE.startswith(data):
                if not (more := await reader.read(PIECE)):
                    return
                data += more
        else:
            data = await reader.read(PIECE)
        record.protocol = "h2" if alpn == "h2" or data.startswith(PREFACE) else "http1"
        self.changed()
        if record.protocol == "h2":
            await Http2Connection(self, record, reader, pipe, self.max_streams).serve(data)
        else:
            await Http1Connection(self, record, reader, pipe).serve(data)
