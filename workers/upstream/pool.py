"""The connections to one API: which of them carries a request, when another is opened, when one is let go.

Theory of operation. A request goes to a connection with room at once; the fullest first come, so that few connections
stay open. Without one it waits, and so many connections are being opened that all who wait find room: one for each
under HTTP/1.1, one for `http2.max_streams` of them under HTTP/2. Which of the two an https API speaks is known only
when TLS has told; until then it is taken for HTTP/2 (if that is enabled), so that the first thousand requests do not
open a thousand connections; if it is not, the missing ones are opened then.

Under HTTP/2 another is opened when three quarters of the last one are taken, before anybody has to wait for it.

When one that is being opened fails, as many as it would have carried fail with it, those that waited longest.

Idle connections are kept, `pool_max_idle` of them and for IDLE_SECS, the latest used first.
"""

import logging
from collections import deque
from typing import Final

from forkd.metrics import Metrics
from forkd.settings import HttpBackend as Settings
from workers.loop import Loop, to_ticks
from workers.upstream.exchange import Exchange, Failure, Receiver
from workers.upstream.http1 import Http1
from workers.upstream.http2 import Http2
from workers.upstream.message import HttpRequest
from workers.upstream.origin import Origin
from workers.upstream.transport import Route, Transport

IDLE_SECS: Final = 55.0
"""Less than what most servers and balancers allow, so that it is mostly us who close."""
AHEAD: Final = 4
"""Another connection is opened when there is room for less than this part of one."""
_HOUSEKEEPING_TICKS: Final = to_ticks(1.0)


class Pool:
    """One worker's connections to one API."""

    def __init__(
        self, loop: Loop, log: logging.Logger, metrics: Metrics, name: str, settings: Settings, origin: Origin
    ) -> None:
        """`name` is the backend's."""
        self.log = log
        self._metrics = metrics
        self._name = name
        self._loop = loop
        self._settings = settings
        self._origin = origin
        self._protocol = origin.protocol
        self._room_each = settings.http2.max_streams
        """How many exchanges the last HTTP/2 connection took."""
        self._waiting: deque[Exchange] = deque()
        self._dials: set[_Dial] = set()
        self._unready: set[Http2] = set()
        self._idle: list[Http1] = []
        self._busy: set[Http1] = set()
        self._shared: list[Http2] = []
        self._roomy: list[Http2] = []
        """Of the shared ones those with room, and maybe some that have none since a moment ago."""
        self._keeping_house = False

    @property
    def connections(self) -> int:
        """Those that are open."""
        return len(self._idle) + len(self._busy) + len(self._shared) + len(self._unready)

    def ask(self, request: HttpRequest, receiver: Receiver, *, fresh: bool = False) -> Exchange:
        """Send `request` as soon as there is a connection for it. `fresh`: on none that was used before.

        ValueError if a field of the request would break out of its line, or cannot be sent.
        """
        text = request.path
        for name, value in request.headers:
            text += name + value
        if not (text.isascii() and text.isprintable()):
            raise ValueError("a header field holds what cannot be sent")
        exchange = Exchange(request, receiver, fresh=fresh)
        if not self._place(exchange):
            self._waiting.append(exchange)
            self._dial()
        elif self._shared:
            self._dial_ahead()
        if not self._keeping_house:
            self._keeping_house = True
            self._loop.after(_HOUSEKEEPING_TICKS, self)
        return exchange

    def prepare(self) -> None:
        """Get ready for the first to ask, opening no connection yet."""
        self._origin.prepare()

    def close(self) -> None:
        """Let every idle connection go."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        for shared in [one for one in self._shared if not one.live]:
            self._leave(shared)
            shared.close()

    # Choosing.

    def _place(self, exchange: Exchange) -> bool:
        """Give it to a connection that has room now."""
        for shared in self._roomy:
            if shared.room > 0 and not (exchange.fresh and shared.used and not shared.live):
                shared.send(exchange)
                if shared.room <= 0 and shared in self._roomy:  # it may be gone by now
                    self._roomy.remove(shared)
                return True
        if self._idle and not exchange.fresh:
            connection = self._idle.pop()
            self._busy.add(connection)
            connection.send(exchange)
            return True
        return False

    def _serve(self) -> None:
        """Those who wait, as far as there is room."""
        waiting = self._waiting
        while waiting:
            if waiting[0].over or self._place(waiting[0]):
                waiting.popleft()
            else:
                break

    @property
    def _each(self) -> int:
        """How many exchanges a connection that is being opened will carry, as far as one knows."""
        return 1 if self._protocol == "http/1.1" else self._room_each

    def _dial(self) -> None:
        """Open as many connections as those who wait need."""
        each = self._each
        while (len(self._dials) + len(self._unready)) * each < len(self._waiting):
            self._start_dial()

    def _start_dial(self) -> None:
        dial = _Dial(self)
        self._dials.add(dial)
        self._origin.reach(dial.found)

    def _dial_ahead(self) -> None:
        """HTTP/2: open the next connection before the last one is full, so that nobody waits for its handshake."""
        wanted = self._each // AHEAD
        if self._dials or self._unready or not wanted:
            return
        for shared in self._roomy:
            wanted -= shared.room
            if wanted <= 0:
                return
        self._start_dial()

    # What becomes of a dial.

    def dialled(self, dial: "_Dial", transport: Transport, protocol: str) -> None:
        """A connection is there."""
        self._dials.discard(dial)
        self._metrics.count("forkd_backend_connections_total", self._name)
        origin = self._origin
        # What TLS told of one connection need not be so of the next: the upstream may be several, or a new release.
        spoken = origin.protocol or protocol or "http/1.1"
        if spoken == "h2":
            self._protocol = origin.protocol
            connection = Http2(
                self._loop, self, transport, self._settings.http2, origin.scheme, origin.authority, origin.base_path
            )
            self._unready.add(connection)
            return
        told, self._protocol = not self._protocol, "http/1.1"
        self.idle(Http1(self._loop, self, transport, origin.authority, origin.base_path))
        if told:  # by TLS: from now on one connection for each
            self._dial()

    def failed(self, dial: "_Dial", failure: Failure) -> None:
        """There will be none. Those it was for are told."""
        self._dials.discard(dial)
        self._fail(failure)

    def _leave(self, connection: Http2) -> None:
        self._shared.remove(connection)
        if connection in self._roomy:
            self._roomy.remove(connection)

    def _fail(self, failure: Failure) -> None:
        waiting = self._waiting
        doomed = [waiting.popleft() for _ in range(min(self._each, len(waiting)))]  # none, if it was ahead of time
        for exchange in doomed:
            exchange.fail(failure)
        self._dial()

    # What connections say.

    def ready(self, connection: Http2) -> None:
        """HTTP/2: the SETTINGS are there."""
        self._unready.discard(connection)
        self._shared.append(connection)
        room = connection.room
        if room <= 0:  # another connection would be no better, and another, and another
            self._fail(Failure("backend_overloaded", "HTTP/2: it takes no streams", unseen=True))
            return
        self._room_each = room
        self.roomier(connection)

    def roomier(self, connection: Http2) -> None:
        """HTTP/2: an exchange has ended, or there is more room otherwise."""
        if connection.room > 0 and connection not in self._roomy:
            self._roomy.append(connection)
        if self._waiting:
            self._serve()
            self._dial()

    def idle(self, connection: Http1) -> None:
        """HTTP/1.1: it may carry the next one."""
        self._busy.discard(connection)
        waiting = self._waiting
        while waiting:
            exchange = waiting.popleft()
            if not exchange.over:
                self._busy.add(connection)
                connection.send(exchange)
                return
        if len(self._idle) < self._settings.pool_max_idle:
            self._idle.append(connection)
        else:
            connection.close()

    def closed(self, connection: Http1) -> None:
        """HTTP/1.1: it is no more."""
        self._busy.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def gone(self, connection: Http2, failure: Failure) -> None:
        """HTTP/2: it is no more."""
        if connection in self._unready:
            self._unready.discard(connection)
            self._fail(failure)
        elif connection in self._shared:
            self._leave(connection)
            self._dial()

    # Housekeeping.

    def tick(self) -> None:
        """About once a second while there are connections."""
        now = self._loop.now
        for shared in list(self._shared):
            shared.check(now)
        oldest = now - IDLE_SECS
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).close()
        unused = [one for one in self._shared if not one.live]
        for shared in unused:
            if shared.idle_since < oldest or len(unused) > self._settings.pool_max_idle:
                self._leave(shared)
                shared.close()
        self._keeping_house = bool(self._idle or self._busy or self._shared or self._unready or self._dials)
        if self._keeping_house:
            self._loop.after(_HOUSEKEEPING_TICKS, self)

    def crashed(self, error: Exception) -> None:
        """Called by the loop: a bug in `tick`."""
        self.log.error("the pool's housekeeping crashed", exc_info=error)
        self._loop.after(_HOUSEKEEPING_TICKS, self)


class _Dial:
    """One connection that is being opened."""

    __slots__ = ("_pool", "_transport")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: Transport | None = None

    def found(self, route: Route | Failure) -> None:
        """The origin's answer."""
        pool = self._pool
        if isinstance(route, Failure):
            # Not from within `ask`: the one who asks does not hold the exchange yet.
            pool._loop.after(1, _Later(self, route))
            return
        self._transport = Transport(pool._loop, self, pool._origin.reached)
        self._transport.open(route)

    def connected(self, protocol: str) -> None:
        """The transport's."""
        assert self._transport is not None
        self._pool.dialled(self, self._transport, protocol)

    def received(self, data: bytes) -> None:
        """The transport's: never, before it is connected."""

    def lost(self, code: str, detail: str) -> None:
        """The transport's."""
        self._pool.failed(self, Failure(code or "backend_unavailable", detail, unseen=True))

    def crashed(self, error: Exception) -> None:
        """The loop's."""
        if self._transport is not None:
            self._transport.close()
        self._pool.failed(self, Failure("internal_error", repr(error)))


class _Later:
    """A failure that is told in the next tick."""

    __slots__ = ("_dial", "_failure")

    def __init__(self, dial: _Dial, failure: Failure) -> None:
        self._dial = dial
        self._failure = failure

    def tick(self) -> None:
        self._dial._pool.failed(self._dial, self._failure)

    def crashed(self, error: Exception) -> None:
        self._dial._pool.log.error("an upstream's failure could not be told", exc_info=error)
