"""Files that the application leaves under `server.data_dir` for a request: found, checked, read, deleted, swept."""

from typing import NamedTuple


class Attachment(NamedTuple):
    """One file of a handoff, read."""

    name: str
    """Its key in the handoff data, and its placeholder in the prompt."""
    media_type: str
    data: bytes
