"""What a program writes to its stderr, cut into lines for the log. No I/O: bytes in, lines out.

A log is for people, and one program must not fill it: a line is cut at LINE_BYTES, and of those above LINES_PER_SEC in
a second only their number is told. Control characters are shown, not passed on: a line of the program's is one line of
the log, whatever is in it.
"""

import re
from typing import Final

LINE_BYTES: Final = 1000
LINES_PER_SEC: Final = 50

_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


class Lines:
    """One program's stderr."""

    __slots__ = ("_cut", "_left_out", "_rest", "_second", "_told")

    def __init__(self) -> None:
        self._rest = b""
        self._cut = False
        """The line whose end is to come was told already, as far as it is told."""
        self._second = -1
        self._told = 0
        self._left_out = 0

    def feed(self, data: bytes, now: float) -> list[str]:
        """The lines that are whole with `data`, and what is to be said of others; `now` is monotonic seconds."""
        told: list[str] = []
        if int(now) != self._second:
            self._second, self._told = int(now), 0
            told += self._confess()
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._end(self._rest + piece, told)
            self._rest = b""
        if self._cut:
            return told
        self._rest += rest
        if len(self._rest) > LINE_BYTES:
            self._end(self._rest, told)
            self._rest, self._cut = b"", True
        return told

    def close(self) -> list[str]:
        """What is left: a line without an end, and how many were left out."""
        told: list[str] = []
        if self._rest:
            self._end(self._rest, told)
            self._rest = b""
        return told + self._confess()

    def _end(self, line: bytes, told: list[str]) -> None:
        cut, self._cut = self._cut, False
        if cut or not line.strip():
            return
        self._told += 1
        if self._told > LINES_PER_SEC:
            self._left_out += 1
            return
        text = line[:LINE_BYTES].rstrip().decode("utf-8", "backslashreplace")
        told.append(_CONTROL.sub(_shown, text) + (" …" if len(line) > LINE_BYTES else ""))

    def _confess(self) -> list[str]:
        left_out, self._left_out = self._left_out, 0
        return [f"({left_out} more lines in a second were left out)"] if left_out else []


def _shown(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
