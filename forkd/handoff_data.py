"""What an application says in the data of a handoff: the keys, and their types.

Both sides know it: workers answer it, and the configuration of a listener may hold it in an application's place.
"""

from typing import Any

import msgspec


class HandoffData(msgspec.Struct, kw_only=True):
    """The application's data. Unknown keys are ignored. Numbers may come as strings and an empty map as `[]`, for
    PHP.
    """

    prompt: str | None = None
    messages: list[Any] | None = None
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    user_id: str | int | None = None
    request_id: str | int | None = None
    backend: str | None = None
    response_headers: dict[str, Any] | list[Any] | None = None
    attachments: dict[str, str] | list[Any] | None = None
    test_pattern: str | None = None
    thread_id: str | None = None
    assistant_id: str | None = None
    stream_mode: str | list[str] | None = None
    langgraph_input: msgspec.Raw = msgspec.Raw()
    """As it was written; nothing, or null, if there is none."""
