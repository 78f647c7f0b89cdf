"""Logs that never block: lines go to a sink which drops and counts what it cannot write at once.

Two kinds of lines. *Records* are Python's `logging`, for all that happens now and then; each is written at once.
*Access lines*, one per finished stream, are formatted by hand (a logging record costs more than the stream's own
bookkeeping) and leave in batches, once per loop turn. Both look alike, as text (`pretty`) or as one JSON object per
line (`json`).

A process that writes to a full pipe sleeps until somebody reads it. O_NONBLOCK belongs to the open file description,
which we share with whoever started us, so the sink opens a description of its own through /proc/self/fd where the
kernel allows that (pipes, terminals), and sends with MSG_DONTWAIT where it does not (sockets).
"""

import json
import logging
import os
import re
import select
import socket
import stat
import sys
import time
from typing import Final, NamedTuple

from forkd.settings import Logging

_ATOMIC_BYTES: Final = 4096
"""A non-blocking write of so much to a pipe is all or nothing (PIPE_BUF, pipe(7)), so no line is ever cut."""
_PLAIN = re.compile(r"[\w.:@/+\[\]-]{1,200}").fullmatch


WINDOW_SECS: Final = 10.0
WINDOW_RECORDS: Final = 50
_PRIORITIES: Final = {"DEBUG": 7, "INFO": 6, "ACCESS": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
"""syslog(3)'s, which journald takes from the front of a line: sd-daemon(3)."""


class Access(NamedTuple):
    """What an access line says of a finished stream. `status` is 0 if it ended before there was one."""

    request_id: str
    user_id: str | int | None
    remote: str
    backend: str
    model: str | None
    status: int
    bytes: int
    chunks: int
    ttfb_ms: int | None
    duration_ms: int
    worker: int
    reason: str
    input_tokens: int | None = None
    output_tokens: int | None = None


class Sink:
    """Where lines go: a file that it opened and can reopen, or the process's stderr."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.dropped = 0
        self._lines: list[str] = []
        self._socket: socket.socket | None = None
        self._poll: select.poll | None = None
        self.fd = -1
        self._open()

    def _open(self) -> None:
        if self.path is not None:
            self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            return
        mode = os.fstat(2).st_mode
        self.fd = 2
        if stat.S_ISREG(mode):
            return
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(2))
            self.fd = self._socket.fileno()
            return
        try:
            self.fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:  # not ours to open: look before each write, the best that is left
            self._poll = select.poll()
            self._poll.register(2, select.POLLOUT)

    @property
    def is_journal(self) -> bool:
        """Whether journald reads it: systemd.exec(5), JOURNAL_STREAM."""
        if self.path is not None:
            return False
        found = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"

    def reopen(self) -> None:
        """Open the file again by its name, after logrotate(8) moved it away. Raises OSError and keeps the old one."""
        if self.path is not None:
            own = self.fd
            self._open()
            # Under the old number: faulthandler was given it, and must not write to whoever got it next.
            os.dup2(self.fd, own, inheritable=False)
            os.close(self.fd)
            self.fd = own

    def take_dropped(self) -> int:
        """How many lines were dropped since the last time this was asked."""
        dropped, self.dropped = self.dropped, 0
        return dropped

    def put(self, line: str) -> None:
        """Keep a line for the next `flush`."""
        self._lines.append(line)

    def flush(self) -> None:
        """Write what was kept, in chunks of whole lines; drop and count what does not go."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        chunk, size, count = bytearray(), 0, 0
        for line in lines:
            data = line.encode("utf-8", "backslashreplace")[: _ATOMIC_BYTES - 1] + b"\n"
            if size + len(data) > _ATOMIC_BYTES:
                self._write(bytes(chunk), count)
                chunk, size, count = bytearray(), 0, 0
            chunk += data
            size += len(data)
            count += 1
        self._write(bytes(chunk), count)

    def _write(self, chunk: bytes, lines: int) -> None:
        try:
            if self._socket is not None:
                self._socket.send(chunk, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            elif self._poll is not None and not self._poll.poll(0):
                self.dropped += lines
            else:
                os.write(self.fd, chunk)
        except OSError:  # full pipe, full disk, reader gone
            self.dropped += lines


class Formatter(logging.Formatter):
    """Renders records, and access lines, as text or as JSON. `process` names who writes: `master`, `worker 2`."""

    def __init__(self, style: str, process: str, *, priorities: bool = False) -> None:
        super().__init__()
        self.json = style == "json"
        self.priorities = priorities
        self.process = process
        self._second = -1
        self._stamp = ""

    def stamp(self, now: float) -> str:
        """Wall-clock time `now` as RFC 3339 in UTC with milliseconds."""
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._stamp}.{int((now - second) * 1000):03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        """One line for a record; a stack, if there is one, follows on lines of its own (within the JSON string)."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        stamp = self.stamp(record.created)
        if self.json:
            return self._within(stamp, record.levelname, {"message": message})
        line = f"{stamp} {record.levelname:<7} {self.process}: {message}"
        if self.priorities:  # each line is an entry of its own to journald
            front = self._front(record.levelname)
            line = front + line.replace("\n", f"\n{front}")
        return line

    def _front(self, level: str) -> str:
        return f"<{_PRIORITIES.get(level, 6)}>" if self.priorities else ""

    def _within(self, stamp: str, level: str, rest: dict[str, object]) -> str:
        """One JSON object that is not cut anywhere when it is written: if it is too long, its texts are."""
        record = {"ts": stamp, "level": level, "process": self.process, **rest}
        line = json.dumps(record)
        room = _ATOMIC_BYTES
        while len(line) >= _ATOMIC_BYTES:
            room //= 2
            line = json.dumps({key: text[:room] if isinstance(text, str) else text for key, text in record.items()})
        return self._front(level) + line

    def access(self, now: float, line: "Access") -> str:
        """One line for a finished stream."""
        stamp = self.stamp(now)
        if self.json:
            return self._within(stamp, "ACCESS", line._asdict())
        # Written out, because a loop over the fields takes longer than the rest of a stream's end.
        ttfb_ms = "-" if line.ttfb_ms is None else line.ttfb_ms
        asked = "-" if line.input_tokens is None else line.input_tokens
        answered = "-" if line.output_tokens is None else line.output_tokens
        front = self._front("ACCESS")
        return (
            f"{front}{stamp} ACCESS  {self.process}: request_id={quoted(line.request_id)} "
            f"user_id={quoted(line.user_id)} remote={quoted(line.remote)} backend={line.backend or '-'} "
            f"model={quoted(line.model)} status={line.status} bytes={line.bytes} chunks={line.chunks} "
            f"ttfb_ms={ttfb_ms} duration_ms={line.duration_ms} worker={line.worker} reason={line.reason} "
            f"input_tokens={asked} output_tokens={answered}"
        )


def quoted(value: str | int | None) -> str:
    """A value as it stands in a log line: quoted if it could be taken for something else. Never more than one line."""
    if isinstance(value, int):
        return str(value)
    if not value:
        return "-"
    return value if _PLAIN(value) else json.dumps(value[:200])


class Repeats(logging.Filter):
    """Lets through so many warnings and errors of one kind in each WINDOW_SECS, and counts the rest. A kind is a place
    in the code and a message before its parts are filled in: compiled modules are at no place of their own.

    An upstream that is down, or a disk that is full, is told hundreds of times a second otherwise, and hides all else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple[str, int, str], list[float]] = {}
        """When the window began, how many came in it, and how many of those were left out."""
        self._examples: dict[tuple[str, int, str], logging.LogRecord] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this record is written."""
        if record.levelno < logging.WARNING or hasattr(record, "told"):
            return True
        key = (record.pathname, record.lineno, str(record.msg))
        place = self._places.get(key)
        if place is None or record.created - place[0] >= WINDOW_SECS:
            if place is None or not place[2]:
                self._places[key] = [record.created, 1, 0]
                return True
            place[1] = 0  # an old window that nobody has told about yet
        place[1] += 1
        if place[1] <= WINDOW_RECORDS and not place[2]:
            return True
        place[2] += 1
        self._examples[key] = record
        return False

    def take(self, now: float) -> list[tuple[int, logging.LogRecord]]:
        """What was left out in windows that are over (wall-clock seconds): how many, and the last of them."""
        over = [key for key, place in self._places.items() if now - place[0] >= WINDOW_SECS]
        told = []
        for key in over:
            left_out = int(self._places.pop(key)[2])
            if left_out:
                told.append((left_out, self._examples.pop(key)))
        return told


class Handler(logging.Handler):
    """Puts records into a sink, at once."""

    def __init__(self, sink: Sink, formatter: Formatter) -> None:
        super().__init__()
        self.sink = sink
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; what cannot be rendered is reported by logging's own error path."""
        try:
            self.sink.put(self.format(record))
            self.sink.flush()
        except Exception:
            self.handleError(record)


class Logs:
    """What a process needs to write its logs: a logger, and access lines if they are wanted."""

    def __init__(self, sink: Sink, level: str, style: str, *, access: bool) -> None:
        self.sink = sink
        self.wants_access = access
        self._style = style
        self._formatter = Formatter(style, "master", priorities=sink.is_journal)
        self.logger = logging.getLogger("forkd")
        handler = Handler(sink, self._formatter)
        self._repeats = Repeats()
        handler.addFilter(self._repeats)
        self.logger.handlers[:] = [handler]
        self.logger.propagate = False
        self.logger.setLevel({"trace": "DEBUG", "warn": "WARNING"}.get(level, level.upper()))
        logging.raiseExceptions = sys.stderr is not None and level == "debug"

    def configure(self, settings: Logging) -> None:
        """Live by these settings from now on, except for the file."""
        self.wants_access = settings.access
        self._formatter.json = settings.format == "json"
        self.logger.setLevel(settings.level.upper())

    def tell_repeats(self) -> None:
        """Say how much was left out; called about once a second."""
        for count, record in self._repeats.take(time.time()):
            self.logger.log(
                record.levelno,
                "%d more like this in %.0f s were left out: %s",
                count,
                WINDOW_SECS,
                record.getMessage(),
                extra={"told": True},
            )

    def rename(self, process: str) -> None:
        """Say who writes from now on, after a fork."""
        self._formatter.process = process

    def access(self, now: float, line: Access) -> None:
        """Keep one access line for the next flush. `now` is wall-clock time in seconds."""
        self.sink.put(self._formatter.access(now, line))
