"""The python backend: a function of the user's own, which yields the answer."""

from typing import Any, Final

import msgspec

from forkd import target
from forkd.handler import ClientRequest, Handoff
from forkd.settings import PythonBackend as Settings
from workers import sse
from workers.backends.base import Backend
from workers.request import HandoffData, Request

_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


class HandlerBackend(Backend):
    """`target` is the handler, imported when this is made."""

    costs_money = False

    def __init__(self, name: str, settings: Settings) -> None:
        """Raises `forkd.target.BadTarget`."""
        super().__init__(name)
        self.settings = settings
        self.target = target.load(settings.target, settings.path)
        self.label = f"{name} ({settings.target})"
        if settings.format == "text":
            self.encode = sse.text_event

    def has_question(self, data: HandoffData) -> bool:
        """Whether there is one is for the handler to judge: it may need none."""
        return True

    def handoff(self, request: Request, request_id: str) -> Handoff:
        """What the handler is given."""
        said, line = request.data, request.line
        try:
            data = _decode(request.raw) if request.fault is None else {}
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            data = {}
        return Handoff(
            request_id=request_id,
            backend=self.name,
            data=data,
            raw=request.raw,
            prompt=said.prompt,
            messages=said.messages,
            model=said.model,
            system=said.system,
            user_id=said.user_id,
            request=ClientRequest(line.method, line.uri, line.host, line.remote_addr, line.protocol, line.headers),
        )
