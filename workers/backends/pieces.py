"""What the answers of all APIs have in common: errors and their kinds, numbers of tokens, and JSON that is not quite
as it should be.
"""

import json
from typing import Any, Final

import msgspec

from workers.backends.base import Extra, Failure

MOST_TOKENS: Final = 1 << 40
_RATE_LIMITED: Final = ("rate_limit", "ratelimit", "rate limit", "too_many_requests", "exhausted", "quota", "429")
_OVERLOADED: Final = ("overloaded", "unavailable", "capacity", "503", "529")
_encode = msgspec.json.Encoder().encode


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


def raw(found: Any) -> msgspec.Raw:
    """What was decoded, as JSON again. Raises ValueError."""
    try:
        return msgspec.Raw(_encode(found))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def extra(name: str, data: object) -> Extra:
    """A further event, with its data as a line of JSON."""
    return Extra(name, _encode(data))


def extra_json(name: str, written: bytes) -> Extra:
    """A further event whose data is JSON already; a line of it unless it was written in several."""
    if b"\n" in written or b"\r" in written:
        try:
            written = msgspec.json.format(written, indent=-1)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    return Extra(name, written)
