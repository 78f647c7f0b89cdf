"""One client whose answer a program gives: from the handoff to the last close. What `workers.stream` is for others.

Theory of operation. The client's fd comes from a `Stream` that never began. Then

    waiting   for a thread to start the program (`workers.spawn` says why a thread)
    running   the program has the socket; we watch for the client's hang-up, its time, and its exit
    ending    it was told to end: `_code` says why, and is the outcome whatever its exit status then is
    over      it was waited for; the client is told, if there is something to tell, and closed in order

Whatever happens, this object is in `context.streams`, and so holds the slot and the worker, until the program was
waited for and the client closed: a drain waits for programs as for streams.

The answer is the program's. Only when it has certainly written nothing (`workers.lent`) does the client get one of
ours: a status with the usual JSON. After a first byte nothing can be added that would not be taken for the program's,
so a failure is in the log and in the metrics, and the client sees the end that there was. A bare body that is not whole
ends by a reset, as ever (`workers.bare`).

The board says GIVEN while it waits (should we die, another worker starts it), and FOREIGN from just before the start:
then nobody but the program may speak, and the master only closes its copy.
"""

import errno
import os
import time
from typing import Final, NamedTuple

from forkd.board import State
from forkd.handoff import sealed_memfd
from forkd.logs import Access
from forkd.process import how_it_ended
from forkd.reasons import REASONS
from workers import response, sse
from workers.backends.exec import ExecBackend
from workers.context import Context
from workers.lent import Lent
from workers.loop import TICKS_PER_SEC
from workers.program import Launched, Program, Unwatched, launch
from workers.request import Request, choose_id

RETRY_AFTER_SECS: Final = 1
SHUTDOWN_PATIENCE_SECS: Final = 1.0
"""Between SIGTERM and SIGKILL when this worker itself is told to end, and has not much longer."""
_NO_ROOM: Final = {
    errno.EMFILE: "out_of_fds",
    errno.ENFILE: "out_of_fds",
    errno.EAGAIN: "program_limit",
    errno.ENOMEM: "program_limit",
}
"""Errors that say nothing against the program."""


class Claim(NamedTuple):
    """A slot and its client. `received_at` is when the handoff reached the master (monotonic seconds). With `bare` the
    client has its response head already, and the program writes the body alone (see `workers.bare`).
    """

    fd: int
    slot: int
    attempt: int
    remote: str
    received_at: float
    bare: bool = False


class Execution:
    """One client and its program."""

    __slots__ = (
        "_attempt",
        "_backend",
        "_bare",
        "_client",
        "_code",
        "_context",
        "_deadline",
        "_over",
        "_program",
        "_remote",
        "_request",
        "request_id",
        "slot",
        "started_at",
    )

    def __init__(self, context: Context, claim: Claim, backend: ExecBackend, request: Request) -> None:
        """Takes over the claim's fd, and answers for its slot. There must be room (`Starters.reserve`)."""
        self._context = context
        self._backend = backend
        self._request = request
        self._attempt = claim.attempt
        self._bare = claim.bare
        self._remote = request.line.remote_addr or claim.remote
        self.slot = claim.slot
        self.started_at = claim.received_at
        self.request_id = choose_id(request, claim.slot, claim.received_at)
        self._program: Program | None = None
        self._code = ""
        self._over = False
        self._deadline = float("inf")
        self._client = Lent(context, self, claim.fd, relayed=request.relayed)
        context.streams.add(self)

    def begin(self) -> None:
        """Have the program started."""
        try:
            self._client.watch()
            self._context.starters.threads.run(self._launch, self._launched, self.crashed)
        except OSError as error:  # no epoll watches, no fds
            self._context.log.error("stream %s: cannot be taken in: %s", self.request_id, error.strerror)
            self._finish(_NO_ROOM.get(error.errno or 0, "internal_error"))
            return
        self.tick()

    def fail(self, code: str) -> None:
        """Have it end, with this outcome unless there is one already."""
        if self._over:
            return
        if not self._code:
            self._code = code
        if self._program is not None:
            hurried = code == "shutdown"
            self._program.end(SHUTDOWN_PATIENCE_SECS if hurried else self._backend.settings.kill_after_secs)

    def client_gone(self, code: str) -> None:
        """The client hung up: nobody reads any more."""
        self.fail(code)

    def client_closed(self) -> None:
        """The slot is free for the master to use again."""
        self._context.finished.append((self.slot, self._attempt))
        self._context.streams.discard(self)

    def program_ended(self, code: int) -> None:
        """The program was waited for."""
        self._program = None
        written = self._client.written_bytes()
        outcome = self._code or self._client.hung_up()
        if not outcome:
            outcome = "program_mute" if written == 0 else "program_failed" if code else "ok"
            if outcome != "ok":
                how = how_it_ended(code) + (" without an answer" if written == 0 else "")
                self._context.log.warning("stream %s: %s %s", self.request_id, self._backend.settings.command[0], how)
        self._finish(outcome, written)

    def tick(self) -> None:
        """Look at the deadlines, and come again when the next one may be due."""
        if self._over or self._code:
            return
        context = self._context
        context.words[context.current] = self.slot + 1
        now, longest = context.loop.now, context.timings.max_duration
        last = self.started_at + longest if longest else float("inf")
        if now >= min(last, self._deadline):
            self.fail("max_duration" if last <= self._deadline else "program_timeout")
            return
        wait = min(last, self._deadline) - now
        context.loop.after(int(min(wait * TICKS_PER_SEC + 1, context.timings.checkup_ticks)), self)

    def crashed(self, error: Exception) -> None:
        """A callback of ours raised: a bug. This client pays for it, no other does."""
        self._context.log.error("stream %s crashed", self.request_id, exc_info=error)
        if self._program is not None:
            self.fail("internal_error")
        elif self._over:
            self._client.close()
        else:
            self._finish("internal_error", self._client.written_bytes())

    def _launch(self) -> Launched | None:
        """In a thread: start the program, unless nobody wants it any more. The fd cannot be closed meanwhile."""
        if self._code:
            return None
        command, data = self._backend.command(self._request, self.request_id, self._remote)
        data_fd = -1 if data is None else sealed_memfd(data)
        try:
            fd = self._client.lend()
            self._context.states[self.slot] = State.FOREIGN
            return launch(command, fd, data_fd)
        finally:
            if data_fd >= 0:
                os.close(data_fd)

    def _launched(self, outcome: Launched | Exception | None) -> None:
        """It runs, or it does not."""
        context = self._context
        context.words[context.current] = self.slot + 1
        if isinstance(outcome, Launched):
            try:
                self._program = Program(context, self, outcome)
            except OSError as error:
                outcome = error
            else:
                timeout = self._backend.settings.timeout_secs
                self._deadline = context.loop.now + timeout if timeout else float("inf")
                if self._code:
                    self.fail(self._code)
                else:
                    self.tick()
                return
        if outcome is None:
            self._finish(self._code)
        elif isinstance(outcome, OSError):
            settings = self._backend.settings
            where = f" in {settings.directory}" if settings.directory is not None else ""
            context.log.error(
                "stream %s: cannot start %s%s: %s", self.request_id, settings.command[0], where, outcome.strerror
            )
            written = self._client.written_bytes() if isinstance(outcome, Unwatched) else 0
            self._finish(_NO_ROOM.get(outcome.errno or 0, "program_unavailable"), written)
        else:
            self.crashed(outcome)

    def _finish(self, code: str, written: int | None = 0) -> None:
        """There is no program, or none any more."""
        self._over = True
        self._code = code
        context = self._context
        context.starters.free(self.slot)
        context.states[self.slot] = State.FOREIGN
        if self._bare:
            self._account(200, written or 0)  # Apache's
            if code == "ok":
                self._client.end()
            else:
                self._client.reset()
            return
        words = b""
        reason = REASONS.get(code)
        status = 0
        if written == 0 and reason is not None and reason.status:
            status = reason.status
            body = sse.error_body(code, reason.text, self.request_id)
            retry = RETRY_AFTER_SECS if status in (429, 503) else 0
            words = response.error_response(status, self.request_id, self._request.fields, body, retry)
            if self._request.line.method == "HEAD":
                words = words.removesuffix(body)
        self._account(status, (written or 0) + len(words))
        self._client.end(words)

    def _account(self, status: int, sent: int) -> None:
        """The access line and the metrics. The status is 0 where the program has said it, or nobody."""
        context, name, code = self._context, self._backend.name, self._code
        duration = context.loop.now - self.started_at
        context.metrics.stream_ended(name, sent, 0, duration, -1.0)
        context.sent_bytes += sent
        if code == "ok":
            context.completed += 1
        else:
            context.failed += 1
            context.metrics.stream_failed(code)
            if code.startswith("program_") or code == "internal_error":
                context.metrics.count("daemon_backend_errors_total", name)
                context.metrics.count("forkd_backend_errors_total", name, code)
        if context.logs.wants_access:
            user_id, ms = self._request.data.user_id, int(duration * 1000)
            line = Access(
                self.request_id, user_id, self._remote, name, None, status, sent, 0, None, ms, context.index, code
            )
            context.logs.access(time.time(), line)
