"""Which class answers for which provider."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from forkd.settings import AnthropicBackend as AnthropicSettings
from forkd.settings import LangGraphBackend as LangGraphSettings
from forkd.settings import MockBackend as MockSettings
from forkd.settings import OpenAiBackend as OpenAiSettings
from forkd.settings import Settings
from forkd.settings import TypingBackend as TypingSettings
from workers.backends.anthropic import AnthropicBackend
from workers.backends.base import Backend
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
}


def build(settings: Settings) -> Mapping[str, Backend]:
    """Every configured backend whose provider this version has, by name."""
    return {name: FACTORIES[type(own)](name, own) for name, own in settings.backends.items() if type(own) in FACTORIES}
