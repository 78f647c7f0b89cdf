"""Feeds a stream from a paced backend: text after text, each after its delay."""

from collections.abc import Iterator

from workers.context import Context
from workers.loop import to_ticks
from workers.stream import Stream


class PacedSource:
    """The source for backends that answer from themselves."""

    __slots__ = ("_context", "_paused", "_steps", "_stream", "_text", "_waiting")

    def __init__(self, context: Context, stream: Stream, steps: Iterator[tuple[float, str]]) -> None:
        self._context = context
        self._stream: Stream | None = stream
        self._steps = steps
        self._text = ""
        self._paused = False
        self._waiting = False

    def start(self) -> None:
        """Send what is due at once, and wait for the rest."""
        self._advance()

    def pause(self) -> None:
        """Keep the next text back when its time comes."""
        self._paused = True

    def resume(self) -> None:
        """Send what was kept back."""
        self._paused = False
        if self._waiting:
            self._waiting = False
            self._due()

    def cancel(self) -> None:
        """Let go of the stream; the callback that is still to come finds none."""
        self._stream = None

    def tick(self) -> None:
        """The delay is over."""
        stream = self._stream
        if stream is None:
            return
        context = self._context
        context.words[context.current] = stream.slot + 1
        if self._paused:
            self._waiting = True
        else:
            self._due()

    def crashed(self, error: Exception) -> None:
        """Called by the loop."""
        if self._stream is not None:
            self._stream.crashed(error)

    def _due(self) -> None:
        if self._text and self._stream is not None:
            self._stream.text(self._text)
        self._advance()

    def _advance(self) -> None:
        while (stream := self._stream) is not None:
            step = next(self._steps, None)
            if step is None:
                stream.done()
                return
            delay, self._text = step
            if delay > 0:
                self._context.loop.after(to_ticks(delay), self.tick)
                return
            if self._text:
                stream.text(self._text)
