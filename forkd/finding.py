"""What a check found: one line for people, and its part in the exit status."""

from enum import Enum
from typing import NamedTuple


class Level(Enum):
    """How bad it is. A warning is for people; a fault is for scripts too."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


class Finding(NamedTuple):
    """One line: what was looked at, and what is to be said of it."""

    level: Level
    subject: str
    text: str
