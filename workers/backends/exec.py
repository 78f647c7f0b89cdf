"""The exec backend: what a program is told of the handoff it answers. Pure: nothing is started here.

A program finds the data in HANDOFF_DATA, byte for byte. Linux takes no string above 128 KiB into an environment
(execve(2), MAX_ARG_STRLEN), and none with a NUL in it: such data is in the file that HANDOFF_DATA_FILE names instead.
"""

import os
import re
from collections.abc import Mapping
from typing import Final

from forkd import programs
from forkd.handoff import NO_DATA
from forkd.settings import ExecBackend as Settings
from workers.backends.base import Backend
from workers.request import HandoffData, Request
from workers.spawn import Command

STRING_MAX_BYTES: Final = 131_072
"""Of one variable with its name, the equals sign and the NUL at its end."""
DATA_FILE: Final = "/proc/self/fd/3"
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Z0-9]")


class ExecBackend(Backend):
    """Any program, with the client's socket as its stdin and stdout."""

    costs_money = False

    def __init__(self, name: str, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        """`environ` is forkd's own environment, of which little is handed on."""
        super().__init__(name)
        self.settings = settings
        self._base = {name: os.fsencode(value) for name, value in programs.environment(settings, environ).items()}
        self._path = os.fsdecode(self._base["PATH"])

    def has_question(self, data: HandoffData) -> bool:
        """What it needs is the program's business."""
        return True

    def command(self, handoff: Request, request_id: str, remote: str) -> tuple[Command, bytes | None]:
        """What to start for this handoff, and the data for the file, if it has to go into one.

        Looks for the program's file, so it is not for the loop's thread.
        """
        settings = self.settings
        line = handoff.line
        told = {
            "REQUEST_ID": request_id,
            "REMOTE_ADDR": remote,
            "METHOD": line.method if line.uri else "",
            "URI": line.uri,
            "HOST": line.host,
            "PROTOCOL": line.protocol,
        }
        told |= {f"HEADER_{_NOT_IN_A_NAME.sub('_', name.upper())}": value for name, value in line.headers.items()}
        variables = {f"{programs.PREFIX}{name}": value.encode("utf-8", "replace") for name, value in told.items()}
        variables["HANDOFF_RESPONSE_HEADERS"] = handoff.fields
        data = b"" if handoff.raw == NO_DATA else handoff.raw
        variables["HANDOFF_DATA"] = data
        fits = {name: value for name, value in variables.items() if _fits(name, value)}
        if "HANDOFF_DATA" not in fits:
            fits["HANDOFF_DATA_FILE"] = DATA_FILE.encode()
        fits = {name: value for name, value in fits.items() if value or name == "HANDOFF_DATA"}
        file = programs.find(settings.command[0], settings.directory, self._path)
        command = Command(file, settings.command, self._base | fits, settings.directory)
        return command, None if "HANDOFF_DATA" in fits else data


def _fits(name: str, value: bytes) -> bool:
    return b"\0" not in value and len(name) + len(value) + 2 <= STRING_MAX_BYTES
