"""Which class answers for which provider."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from forkd.boot import Unfit
from forkd.settings import AnthropicBackend as AnthropicSettings
from forkd.settings import ExecBackend as ExecSettings
from forkd.settings import LangGraphBackend as LangGraphSettings
from forkd.settings import MockBackend as MockSettings
from forkd.settings import OpenAiBackend as OpenAiSettings
from forkd.settings import PythonBackend as PythonSettings
from forkd.settings import Settings
from forkd.settings import TypingBackend as TypingSettings
from forkd.target import BadTarget
from workers.backends.anthropic import AnthropicBackend
from workers.backends.base import Backend
from workers.backends.exec import ExecBackend
from workers.backends.handler import HandlerBackend
from workers.backends.langgraph import LangGraphBackend
from workers.backends.mock import MockBackend
from workers.backends.openai import OpenAiBackend
from workers.backends.typing import TypingBackend

FACTORIES: Final[dict[type, Callable[[str, Any], Backend]]] = {
    MockSettings: lambda name, own: MockBackend(name, own.text, own.token_delay_ms / 1000),
    TypingSettings: lambda name, own: TypingBackend(name, own.text, own.token_delay_ms / 1000, own.jitter),
    OpenAiSettings: OpenAiBackend,
    AnthropicSettings: AnthropicBackend,
    LangGraphSettings: LangGraphBackend,
    PythonSettings: HandlerBackend,
    ExecSettings: ExecBackend,
}


def build(settings: Settings) -> Mapping[str, Backend]:
    """Every configured backend whose provider this version has, by name. Raises Unfit."""
    backends: dict[str, Backend] = {}
    faults: list[str] = []
    for name, own in settings.backends.items():
        if type(own) in FACTORIES:
            try:
                backends[name] = FACTORIES[type(own)](name, own)
            except BadTarget as error:
                faults.append(f"backends.{name}.target: {error}" + (f"\n{error.stack}" if error.stack else ""))
    if faults:
        raise Unfit(faults)
    return backends
