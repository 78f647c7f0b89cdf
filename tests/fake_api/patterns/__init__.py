"""What the API can be told to do: each pattern is a coroutine function that takes an Exchange, and maybe arguments.

A pattern is called by its name with hyphens, and arguments as `key=value` ("ok words=9 delay=0.1"); a number alone is
that status. Every file here is one kind of behaviour, and its functions' docstrings are the list.
"""

import importlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeAlias

from tests.fake_api.exchange import Exchange

Pattern: TypeAlias = Callable[[Exchange], Awaitable[None]]

_FILES: Final = ("good", "pace", "events", "statuses", "endings", "broken_http", "http2")


def find(said: str) -> Pattern:
    """The pattern of this name and arguments. Raises LookupError, or, when it is called, TypeError."""
    name, *pairs = said.split()
    arguments = {key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    if name.isdigit():
        name, arguments = "status", {"code": int(name), **arguments}
    found = PATTERNS.get(name)
    if found is None:
        raise LookupError(f"the fake API has no pattern {name!r}: {', '.join(sorted(PATTERNS))}")
    return partial(found, **arguments)


def _value(said: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(said)
        except ValueError:
            pass
    return said


def _collect() -> dict[str, Callable[..., Awaitable[None]]]:
    found: dict[str, Any] = {}
    for file in _FILES:
        module = importlib.import_module(f"{__name__}.{file}")
        found |= {name.replace("_", "-"): getattr(module, name) for name in module.__all__}
    return found


PATTERNS: Final = _collect()
