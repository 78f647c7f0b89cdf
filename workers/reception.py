"""From a message of the master to a living stream: check the client, read the data, choose the backend, begin."""

import os
import socket

import msgspec

from forkd.board import State
from forkd.channel import DATA_FD, PAYLOAD_IN_MEMFD, Assignment, parse_end_body
from forkd.handoff import (
    ENVELOPE_MAX_BYTES,
    BadDataFd,
    ClientGone,
    DataTooLarge,
    check_client,
    read_sealed_memfd,
)
from forkd.settings import ListenerSettings
from workers.backends.base import Backend, HttpBackend, PacedBackend
from workers.backends.exec import ExecBackend
from workers.backends.handler import HandlerBackend
from workers.bare import BareStream
from workers.context import Context
from workers.execution import Claim, Execution
from workers.handlers.watch import Handlers
from workers.paced import PacedSource
from workers.relay import RelaySource
from workers.request import Request, parse
from workers.stream import Source, Stream

_TCP_USER_TIMEOUT = 18  # socket.TCP_USER_TIMEOUT is missing from some builds of Python; tcp(7)


class Reception:
    """Takes clients in. Every method owns the fds it is given: each is closed or belongs to a stream on return."""

    def __init__(self, context: Context, handlers: Handlers) -> None:
        self._context = context
        self._handlers = handlers
        self._listeners = context.settings.all_listeners()
        self._bare = {index: _given(listener) for index, listener in enumerate(self._listeners) if listener.bare}
        """What is asked by every handoff of a listener whose senders send no data."""
        self._user_timeout_ms = min(int(context.settings.server.write_timeout_secs * 1000), 2**31 - 1)  # a C int
        self._max_data = context.settings.server.max_data_bytes

    def assign(self, head: Assignment, body: bytes, fds: tuple[int, ...]) -> None:
        """A client that nothing has been said to."""
        context = self._context
        context.words[context.current] = head.slot + 1
        remote = self._check(head, fds)
        if remote is None:
            return
        code = ""
        try:
            if head.flags & PAYLOAD_IN_MEMFD:
                body = read_sealed_memfd(fds[1], self._max_data + ENVELOPE_MAX_BYTES)
            elif head.flags & DATA_FD:
                body += read_sealed_memfd(fds[1], self._max_data)
        except BadDataFd:
            code = "bad_data_fd"
        except DataTooLarge:
            code = "payload_too_large"
        for fd in fds[1:]:
            os.close(fd)
        request = self._bare.get(head.listener) or parse(body, envelopes=self._listeners[head.listener].envelope)
        if not code:
            if request.bad_envelope:
                code = "bad_handoff"
            elif len(request.raw) > self._max_data:
                code = "payload_too_large"
        stream = self._stream(head, fds[0], remote, request)
        if stream is None:
            return
        try:
            self._begin(stream, request, head, code)
        except Exception as error:  # a backend's bug: on the way to the loop it would take the whole worker with it
            stream.crashed(error)
            stream.tick()

    def _begin(self, stream: Stream, request: Request, head: Assignment, code: str) -> None:
        """Let the stream be fed, or refuse it with `code`."""
        context = self._context
        self._warn_of_fields(stream, request)
        context.metrics.observe("daemon_handoff_duration_seconds", max(0.0, context.loop.now - head.received_at))
        backend = None if code else self._backend(request, head.listener)
        if backend is not None:
            code = self._judge(stream, request, backend)
        elif not code:
            code = "unknown_backend"
            name = self._backend_name(request, head.listener)
            context.log.warning("stream %s: there is no backend named %.100r", stream.request_id, name)
        if code or backend is None:
            context.metrics.handoff_failed(code)
            stream.fail(code)
            stream.tick()
            return
        if isinstance(backend, ExecBackend):
            self._execute(stream, backend, request, head)
        else:
            stream.begin(backend, self._source(stream, backend, request))

    def _source(self, stream: Stream, backend: Backend, request: Request) -> Source:
        """The source that drives this shape of backend."""
        context = self._context
        if isinstance(backend, HttpBackend):
            return RelaySource(context, stream, backend, request)
        if isinstance(backend, HandlerBackend):
            return self._handlers.source(context, stream, backend, request)
        assert isinstance(backend, PacedBackend)
        return PacedSource(context, stream, backend.steps(request.data))

    def _execute(self, stream: Stream, backend: ExecBackend, request: Request, head: Assignment) -> None:
        """Have a program answer, if there may be one more of them."""
        context = self._context
        if not context.starters.reserve(head.slot, backend.name, backend.settings.max_processes):
            stream.backend = backend
            stream.fail("program_limit")
            stream.tick()
            return
        bare = isinstance(stream, BareStream)
        claim = Claim(stream.hand_over(), head.slot, head.attempt, stream.remote, head.received_at, bare)
        Execution(context, claim, backend, request).begin()

    def end(self, head: Assignment, body: bytes, fds: tuple[int, ...]) -> None:
        """A client that somebody else could not go on with."""
        context = self._context
        context.words[context.current] = head.slot + 1
        remote = self._check(head, fds[:1])
        for fd in fds[1:]:
            os.close(fd)
        if remote is None:
            return
        state, code, payload = parse_end_body(body)
        request = self._bare.get(head.listener) or parse(payload, envelopes=self._listeners[head.listener].envelope)
        stream = self._stream(head, fds[0], remote, request)
        if stream is None:
            return
        stream.take_up(state, code)
        stream.tick()

    def _check(self, head: Assignment, fds: tuple[int, ...]) -> str | None:
        """The client's address, with its socket tuned; None, with every fd closed and the slot reported, if it is
        none.
        """
        fd = fds[0]
        try:
            family, remote = check_client(fd)
            if family != socket.AF_UNIX:
                sock = socket.socket(family, socket.SOCK_STREAM, 0, fileno=fd)
                try:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, self._user_timeout_ms)
                finally:
                    sock.detach()
            return remote
        except Exception as error:  # whatever it is: a handoff must not cost the worker
            context = self._context
            if isinstance(error, ClientGone):
                context.log.debug("a client was gone before its stream: %s", error)
                context.metrics.handoff_failed("client_disconnected")
            else:
                context.log.warning("a handoff's fd is no client: %s", error)
                context.metrics.handoff_failed("bad_client_fd")
            self._close(head, fds)
            return None

    def _stream(self, head: Assignment, fd: int, remote: str, request: Request) -> Stream | None:
        """A stream that owns `fd`; None, with it closed and the slot reported, if the kernel will not watch it."""
        kind = BareStream if head.listener in self._bare else Stream
        try:
            return kind(self._context, fd, head.slot, head.attempt, remote, head.received_at, request)
        except OSError as error:  # /proc/sys/fs/epoll/max_user_watches, no memory
            self._context.log.error("cannot take a client in: %s", error.strerror)
            self._context.metrics.handoff_failed("internal_error")
            self._close(head, (fd,))
            return None

    def _close(self, head: Assignment, fds: tuple[int, ...]) -> None:
        """Done with a client that never became a stream."""
        self._context.states[head.slot] = State.ENDED
        for fd in fds:
            os.close(fd)
        self._context.finished.append((head.slot, head.attempt))

    def _backend(self, request: Request, listener: int) -> Backend | None:
        return self._context.backends.get(self._backend_name(request, listener))

    def _backend_name(self, request: Request, listener: int) -> str:
        default = self._context.settings.default_backend
        return request.data.backend or self._listeners[listener].backend or default

    def _judge(self, stream: Stream, request: Request, backend: Backend) -> str:
        """The code to refuse the handoff with, or "" with a warning logged where defaults will do."""
        if request.fault is not None:
            code, fault = "bad_handoff", request.fault
        elif not backend.has_question(request.data):
            code, fault = "no_prompt", "no prompt"
        else:
            return ""
        if backend.costs_money:
            return code
        if isinstance(stream, BareStream):
            return ""  # nobody has forgotten the data: its senders have none
        self._context.metrics.count("forkd_handoff_warnings_total", code)
        self._context.log.warning("stream %s: %s; answered with defaults", stream.request_id, fault)
        return ""

    def _warn_of_fields(self, stream: Stream, request: Request) -> None:
        if request.refused_fields:
            context = self._context
            context.metrics.count("forkd_response_headers_refused_total", amount=len(request.refused_fields))
            context.log.warning("stream %s: response headers refused: %r", stream.request_id, request.refused_fields)


def _given(listener: ListenerSettings) -> Request:
    """What a listener asks in place of its senders."""
    return parse(msgspec.json.encode(listener.data or {}), envelopes=False)
