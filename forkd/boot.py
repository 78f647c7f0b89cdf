"""What the master hands to a worker at its birth."""

import socket
from dataclasses import dataclass
from typing import Final

from forkd.board import Board
from forkd.logs import Logs
from forkd.settings import COMMON, Settings

UNFIT: Final = 3
"""The exit status of a worker that is `Unfit`."""


class Unfit(Exception):
    """A worker cannot work with its configuration, and others could not either. `faults` says why: texts, some with a
    stack.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Boot:
    """A worker's inheritance. It owns `channel`; the board and the log's fd are shared with everyone.

    index: unique among live processes, used again after this one is reaped; names its row on the board and its
    metrics files. generation: counts configurations since the start.
    """

    index: int
    generation: int
    channel: socket.socket
    board: Board
    settings: Settings
    logs: Logs
    metrics_dir: str | None
    side: str = ""
    """Which of two masters that count in one directory this one's is (see `forkd.upgrade`)."""
    pool: str = COMMON
