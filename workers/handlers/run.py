"""One handler at work for one stream, as the thread that runs it and the worker's loop both see it.

Theory of operation. The handler's side counts what it gave, the loop's side what it took, and each number has one
writer. A handler is `held` between two yields while the client is slow (`paused`, the loop's word) or while
AHEAD_MAX of its pieces wait for the loop, so that no handler fills the memory, or the loop's whole turn, by itself.

Nobody is woken for nothing: the handler's side says `waits` before it looks for the last time whether it is held, and
the loop's side looks at `waits` after each change. Python's threads see each other's stores in order (the GIL), so one
of the two always sees the other.
"""

import codecs
import traceback
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from forkd.handler import Event, Handoff
from workers.handlers.mailbox import Mailbox, Receiver

AHEAD_MAX: Final = 64
_SAID_CHARS: Final = 3000
"""Of an exception: a log line has 4096 bytes, and the end of a stack says the most."""


class Ended(NamedTuple):
    """The last piece of every run: all is said, or `code` says why not (and `said` more, for the log)."""

    code: str = ""
    said: str = ""


class BadYield(TypeError):
    """A handler yielded what cannot be sent."""


class Run:
    """`label` says for the log which handler and which stream this is."""

    __slots__ = (
        "_decoder",
        "_mailbox",
        "cancelled",
        "function",
        "given",
        "handoff",
        "label",
        "paused",
        "receiver",
        "taken",
        "waits",
    )

    def __init__(
        self,
        function: Callable[[Handoff], Any],
        handoff: Handoff,
        label: str,
        mailbox: Mailbox,
        receiver: Receiver,
    ) -> None:
        self.function = function
        self.handoff = handoff
        self.label = label
        self._mailbox = mailbox
        self.receiver = receiver
        self._decoder: codecs.IncrementalDecoder | None = None
        self.given = 0
        self.taken = 0
        self.paused = False
        self.cancelled = False
        self.waits = False

    # The handler's side.

    @property
    def held(self) -> bool:
        """The handler is to wait before it goes on."""
        return (self.paused or self.given - self.taken >= AHEAD_MAX) and not self.cancelled

    def give(self, value: object) -> None:
        """Hand on what the handler yielded. Raises BadYield."""
        if isinstance(value, str):
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise BadYield(f"it yielded text that UTF-8 cannot carry: {error.reason}") from None
            piece: str | bytes = value if type(value) is str else str.__str__(value)  # JSON's encoder takes no subclass
        elif isinstance(value, bytes | bytearray | memoryview):
            if self._decoder is None:
                self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
            piece = self._decoder.decode(bytes(value))
        elif isinstance(value, Event) and isinstance(value.encoded, bytes):
            piece = value.encoded
        else:
            kind = type(value).__name__
            raise BadYield(f"it yielded {kind}; a handler yields str, bytes, or what forkd.handler.event makes")
        if piece:
            self.given += 1
            self._mailbox.put(self.receiver, piece)

    def end(self, error: BaseException | None = None) -> None:
        """The handler has ended, by `error` or in order. Said once, as the last."""
        if self._decoder is not None and error is None:
            rest = self._decoder.decode(b"", final=True)
            if rest:
                self.given += 1
                self._mailbox.put(self.receiver, rest)
        if error is None:
            ended = Ended()
        elif isinstance(error, BadYield):
            ended = Ended("handler_bad_yield", str(error))
        else:
            ended = Ended("handler_error", described(error))
        self._mailbox.put(self.receiver, ended)


def described(error: BaseException) -> str:
    """An exception of a handler for the log, with its stack, less the frames of ours that called it."""
    stack = traceback.extract_tb(error.__traceback__)
    ours = [index for index, frame in enumerate(stack) if frame.filename.startswith(_HERE)]
    frames = stack[ours[-1] + 1 :] if ours else stack
    lines = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
    return "".join(lines).rstrip()[-_SAID_CHARS:]


_HERE: Final = __file__.rpartition("/")[0]
