"""Feeds a stream from a paced backend: text after text, each after its delay."""

from collections.abc import Iterator

from workers.context import Context
from workers.loop import TICKS_PER_SEC
from workers.stream import Stream


class PacedSource:
    """The source for backends that answer from themselves. `_text` is what the next tick will send."""

    __slots__ = ("_context", "_late", "_paused", "_steps", "_stream", "_text")

    def __init__(self, context: Context, stream: Stream, steps: Iterator[tuple[float, str]]) -> None:
        self._context = context
        self._stream: Stream | None = stream
        self._steps = steps
        self._text = ""
        self._paused = False
        self._late = False
        """The time came while the client was slow."""

    def start(self) -> None:
        """Send what is due at once, and wait for the rest."""
        self.tick()

    def pause(self) -> None:
        """Keep the next text back when its time comes."""
        self._paused = True

    def resume(self) -> None:
        """Send what was kept back."""
        self._paused = False
        if self._late:
            self._late = False
            self.tick()

    def cancel(self) -> None:
        """Let go of the stream; the tick that is still to come finds none."""
        self._stream = None

    def check(self, now: float) -> float:
        """It has no deadlines."""
        return float("inf")

    def tick(self) -> None:
        """The delay is over: send the text, and all that follows without a delay; wait for the next."""
        stream = self._stream
        if stream is None:
            return
        context = self._context
        context.words[context.current] = stream.slot + 1
        if self._paused:
            self._late = True
            return
        text = self._text
        while True:
            if text:
                stream.text(text)
                if self._stream is None:  # the client is gone
                    return
                if self._paused:
                    self._text, self._late = "", True
                    return
            for delay, text in self._steps:  # noqa: B007 - the next step, if there is one
                break
            else:
                stream.done()
                return
            if delay > 0:
                self._text = text
                context.loop.after(int(delay * TICKS_PER_SEC + 0.5), self)
                return

    def crashed(self, error: Exception) -> None:
        """Called by the loop."""
        if self._stream is not None:
            self._stream.crashed(error)
