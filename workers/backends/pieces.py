"""What the answers of all APIs have in common: errors and their kinds, numbers of tokens, and JSON that is not quite
as it should be.
"""

import json
from typing import Any, Final, TypeVar, get_args, get_origin

import msgspec

from workers.backends.base import Extra, Failure, Usage

MOST_TOKENS: Final = 1 << 40
_RATE_LIMITED: Final = ("rate_limit", "ratelimit", "rate limit", "too_many_requests", "exhausted", "quota", "429")
_OVERLOADED: Final = ("overloaded", "unavailable", "capacity", "503", "529")
T = TypeVar("T", bound=msgspec.Struct)
_encode = msgspec.json.Encoder().encode


def understood(kind: type[T], data: bytes) -> T:
    """What of an object of JSON fits the type, member by member; the others have their defaults. For what a decoder
    refused. Raises ValueError if there is no object at all.
    """
    found = leniently(data)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return fitting(kind, found)


def leniently(data: bytes) -> Any:
    """JSON as it comes: bytes that are no UTF-8 and halves of surrogate pairs become U+FFFD, as the standard of events
    decodes them. Raises ValueError if it is none.
    """
    text = data.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        if "\\u" in text:
            # Halves of pairs are left if they stood alone: UTF-16 has them too, and knows that they are none.
            plain = json.dumps(found, ensure_ascii=False)
            found = json.loads(plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return found


def fitting(kind: type[T], found: dict[str, Any]) -> T:
    """What of an object fits the type, likewise. Raises ValueError."""
    values = {}
    for field in msgspec.structs.fields(kind):
        if field.name in found and (value := _as(field.type, found[field.name])) is not msgspec.UNSET:
            values[field.name] = value
    return kind(**values)


def _as(annotation: Any, value: Any) -> Any:
    """The value as this type; UNSET if nothing of it fits."""
    try:
        return msgspec.convert(value, annotation)
    except (msgspec.ValidationError, OverflowError):
        pass
    except RecursionError:
        raise ValueError("nested too deeply") from None
    for kind in get_args(annotation) or (annotation,):
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
            return fitting(kind, value)
        if get_origin(kind) is list and isinstance(value, list):
            items = (_as(get_args(kind)[0], item) for item in value)
            return [item for item in items if item is not msgspec.UNSET]
    return msgspec.UNSET


def failure(*names: object) -> Failure:
    """An error in mid-answer, of the kind that the API's names for it (type, code, status) tell."""
    said = " ".join(name[:64] if isinstance(name, str) else f"{name:d}" for name in names if _is_name(name))
    plain = said.lower()
    if any(word in plain for word in _RATE_LIMITED):
        return Failure("backend_rate_limited", said)
    if any(word in plain for word in _OVERLOADED):
        return Failure("backend_overloaded", said)
    return Failure("backend_error", said)


def _is_name(name: object) -> bool:
    return (isinstance(name, str) and name != "") or (isinstance(name, int) and 0 < name < 1000)


def failure_of(error: Any, *names: object) -> Failure:
    """Likewise, from what the API has under `error`: an object with names, or a sentence, which tells nothing."""
    if not isinstance(error, dict):
        return failure(*names)
    return failure(*names, error.get("type"), error.get("code"), error.get("status"))


def tokens(number: Any) -> int | None:
    """A number of tokens, None if it is none that can be true."""
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < MOST_TOKENS:
        return number
    return None


def extra(name: str, data: object) -> Extra:
    """A further event, with its data as a line of JSON. Raises ValueError."""
    return Extra(name, _encoded(data))


def json_of(data: object) -> str:
    """Data as JSON. Raises ValueError."""
    return _encoded(data).decode()


def _encoded(data: object) -> bytes:
    try:
        return _encode(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def reasoning(text: str) -> Extra:
    """A piece of what the model thinks."""
    return extra("reasoning", {"content": text})


def usage(counted: Usage) -> Extra:
    """What is known of the tokens so far."""
    numbers = {"input_tokens": counted.input_tokens, "output_tokens": counted.output_tokens}
    return extra("usage", {name: number for name, number in numbers.items() if number is not None})


def finish(reason: str) -> Extra:
    """Why the model stopped, in the API's own word."""
    return extra("finish", {"reason": reason})


def tool_call(index: int, arguments: str, name: str | None = None, call_id: str | None = None) -> Extra:
    """A piece of a tool call, spelled as Chat Completions have it, so that a client need not know the API: `name` and
    `call_id` come with the first, and the arguments of all that have the same index make one JSON text.
    """
    call: dict[str, Any] = {"index": index}
    if call_id is not None:
        call |= {"id": call_id, "type": "function"}
    call["function"] = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    return extra("tool_calls", [call])
