"""Server-Sent Events as bytes, in every spelling that the standard allows."""

from dataclasses import dataclass
from typing import NamedTuple


class Event(NamedTuple):
    """One event: its data, and its name and id if it has them."""

    data: str
    name: str = ""
    id: str = ""


@dataclass(frozen=True)
class Spelling:
    """How events are written."""

    line_end: str = "\n"
    space: bool = True
    """Behind the colon."""

    def encode(self, event: Event) -> bytes:
        """The event with the empty line that ends it. Each line of its data becomes a line of its own."""
        colon = ": " if self.space else ":"
        lines = []
        if event.id:
            lines.append(f"id{colon}{event.id}")
        if event.name:
            lines.append(f"event{colon}{event.name}")
        lines += [f"data{colon}{line}" for line in event.data.split("\n")]
        return "".join(line + self.line_end for line in [*lines, ""]).encode()

    def comment(self, text: str) -> bytes:
        return f": {text}{self.line_end}{self.line_end}".encode()
