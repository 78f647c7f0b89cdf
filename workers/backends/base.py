"""The contracts between a stream and what answers it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple, TypeAlias

from forkd.settings import HttpBackend as Settings
from workers import sse
from workers.attachments import Attachment
from workers.request import HandoffData, Request
from workers.upstream.message import HttpRequest


class Backend(ABC):  # noqa: B024 - its shapes below are what is abstract
    """Something that answers streams. `name` is its key in the configuration, and the metrics' label."""

    costs_money: ClassVar[bool] = True
    """Refuse handoffs that are malformed or have no prompt, instead of answering them with defaults."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.encode: Callable[[str], bytes] = sse.content_event
        """Makes the event that carries a piece of text to the client."""

    def has_question(self, data: HandoffData) -> bool:
        """Whether there is anything to answer in the data."""
        return data.prompt is not None or data.messages is not None


class PacedBackend(Backend):
    """Answers from itself, at a pace of its own."""

    costs_money = False

    @abstractmethod
    def steps(self, data: HandoffData) -> Iterator[tuple[float, str]]:
        """Yield (delay in seconds, text): wait so long, then send the text (nothing, if it is empty)."""


class Usage(NamedTuple):
    """The tokens of this answer, as the API counts them so far; None: not said here. Of what is said repeatedly the
    largest counts.
    """

    input_tokens: int | None
    output_tokens: int | None
    part: str = ""
    """The name of the part of the answer whose tokens these are, where an answer has several. They are added up."""


class Finish(NamedTuple):
    """The model has stopped, and why: "stop", "length", "tool_calls" … More may follow, such as the usage."""

    reason: str


class Extra(NamedTuple):
    """A further event for the client, when the operator asked for it: reasoning, tool_calls, usage, finish."""

    name: str
    data: bytes
    """JSON, without line ends."""


class Failure(NamedTuple):
    """The API reports an error in the middle of the answer."""

    code: str
    """Of `forkd.reasons`: backend_error, backend_rate_limited, backend_overloaded."""
    said: str
    """The API's own name for it (a type or code, never its message, which may quote a key or the prompt)."""


class Done(NamedTuple):
    """Nothing follows."""


Piece: TypeAlias = str | Usage | Finish | Extra | Failure | Done
Translation: TypeAlias = Piece | list[Piece] | None


class BadRequest(Exception):
    """This handoff cannot be put to this API. `code` is one of `forkd.reasons` (bad_handoff, no_prompt …)."""

    def __init__(self, code: str, fault: str) -> None:
        super().__init__(fault)
        self.code = code


class HttpBackend(Backend):
    """An HTTP API that answers with Server-Sent Events: two pure functions, and no socket anywhere near them."""

    repeatable: ClassVar[bool] = True
    """Whether the API may see the same request twice: asked again when it may or may not have taken the first one."""
    ends_with_body: ClassVar[bool] = False
    """Whether the API may say that an answer is over by nothing but ending the body in order."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name)
        self.settings = settings
        if settings.format == "text":
            self.encode = sse.text_event
        self.raw = settings.format == "raw"
        """The client gets the API's own events; what `translate` makes of them only counts."""
        self._labels = frozenset({self.model(HandoffData()), *settings.models})

    def label(self, model: str) -> str:
        """What the metrics call this model: its name if it was configured, or there would be a series for each name
        that somebody makes up.
        """
        return model if model in self._labels else "other"

    @abstractmethod
    def request(self, handoff: Request, request_id: str, attachments: Mapping[str, Attachment]) -> HttpRequest:
        """What to ask for. Raises BadRequest. Runs beside the loop when there are attachments: touch nothing shared."""

    @abstractmethod
    def translate(self, event: sse.Event) -> Translation:
        """What one event of the API means; None: nothing. Raises ValueError if the event is malformed.

        The most common case, a piece of text, is returned as a plain `str`: this runs for each token.
        """

    @abstractmethod
    def model(self, data: HandoffData) -> str:
        """The model that this handoff will be answered by."""
