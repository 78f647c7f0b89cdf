"""The contracts between a stream and what answers it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from workers.request import HandoffData


class Backend(ABC):  # noqa: B024 - its shapes below are what is abstract
    """Something that answers streams. `name` is its key in the configuration, and the metrics' label."""

    costs_money: ClassVar[bool] = True
    """Refuse handoffs that are malformed or have no prompt, instead of answering them with defaults."""

    def __init__(self, name: str) -> None:
        self.name = name


class PacedBackend(Backend):
    """Answers from itself, at a pace of its own."""

    costs_money = False

    @abstractmethod
    def steps(self, data: HandoffData) -> Iterator[tuple[float, str]]:
        """Yield (delay in seconds, text): wait so long, then send the text (nothing, if it is empty)."""
