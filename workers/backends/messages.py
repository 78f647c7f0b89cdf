"""A handoff's prompt or messages, with its attachments put in: one list of messages, in the shape that all APIs share.

A text attachment becomes part of the text around its placeholder, `{name}`; any other becomes a part of its own there,
as the API spells it. Without a placeholder it goes to the end. Prompts are written by users, so only the first mention
of a name is one, or a short prompt could ask for a large file a thousand times; and what is put in is not looked
through for more.
"""

import binascii
import codecs
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import msgspec

from workers.attachments import Attachment
from workers.backends.base import BadRequest
from workers.request import HandoffData

Message: TypeAlias = dict[str, Any]
Part: TypeAlias = dict[str, Any]
Medium: TypeAlias = Callable[[Attachment], Part]
"""Makes the part of a message that carries an attachment which is no text. Raises BadRequest if the API takes none."""

_PIECE_BYTES: Final = 3 << 16
"""What is done in one go; a multiple of three, for base64."""
_WAY_SECS: Final = 0.0001
_encode = msgspec.json.Encoder().encode


def messages(data: HandoffData, attachments: Mapping[str, Attachment], medium: Medium) -> list[Message]:
    """The messages, or the prompt as the only one; the attachments are in the last one of the user. Raises BadRequest.

    The data's `system` is not among them: APIs differ in where it goes.
    """
    if data.messages:
        found = [_checked(message) for message in data.messages]
    elif data.prompt:
        found = [{"role": "user", "content": data.prompt}]
    else:
        raise BadRequest("no_prompt", "neither a prompt nor messages")
    if attachments:
        for at in reversed(range(len(found))):
            if found[at]["role"] in ("user", "human"):
                found[at] = {**found[at], "content": _filled(found[at].get("content"), attachments, medium)}
                return found
        raise BadRequest("bad_attachment", "there is no message of the user that attachments could go into")
    return found


def _checked(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest("bad_handoff", "messages: expected objects that have a role")
    return message


def _filled(content: Any, attachments: Mapping[str, Attachment], medium: Medium) -> str | msgspec.Raw | list[Any]:
    """The content of a message with the attachments in it: a string if all of it is text."""
    left = dict(attachments)
    names = re.compile("{(" + "|".join(map(re.escape, left)) + ")}")
    parts: list[Any] = []
    for part in content if isinstance(content, list) else [text_part(content if isinstance(content, str) else "")]:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            parts += _expanded(part, names, left, medium)
        else:
            parts.append(part)
    for attachment in left.values():
        if attachment.is_text:
            separator = "\n\n" if parts and _is_text(parts[-1]) and parts[-1]["text"] else ""
            _add_text(parts, separator + _text(attachment))
        else:
            parts.append(medium(attachment))
    if isinstance(content, list) or not all(map(_is_text, parts)):
        filled = [part for part in parts if not (_is_text(part) and part["text"] == "")]
        return [{**part, "text": _in_json(part["text"])} if _is_text(part) else part for part in filled]
    return _in_json("".join(part["text"] for part in parts))


def _expanded(part: Part, names: re.Pattern[str], left: dict[str, Attachment], medium: Medium) -> list[Part]:
    """A part of text, its placeholders replaced by what they stand for. Takes that out of `left`."""
    parts: list[Part] = []
    text, start = part["text"], 0
    for match in names.finditer(text):
        attachment = left.pop(match[1], None)
        if attachment is None:
            continue  # a second mention
        _add_text(parts, text[start : match.start()])
        start = match.end()
        if attachment.is_text:
            _add_text(parts, _text(attachment))
        else:
            parts.append(medium(attachment))
    if not parts:
        return [part]  # as it was, with whatever else it says (cache_control)
    _add_text(parts, text[start:])
    return parts


def _add_text(parts: list[Any], text: str) -> None:
    if parts and _is_text(parts[-1]):
        parts[-1] = {**parts[-1], "text": parts[-1]["text"] + text}
    elif text:
        parts.append(text_part(text))


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def text_part(text: str) -> Part:
    """A part that is text, as all three APIs have it."""
    return {"type": "text", "text": text}


def medium_part(attachment: Attachment) -> Part:
    """An image or a PDF as a part of a message, as Chat Completions have it, and LangChain too. Raises BadRequest."""
    if attachment.media_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": data_url(attachment)}}
    if attachment.media_type == "application/pdf":
        name = attachment.name if attachment.name.lower().endswith(".pdf") else f"{attachment.name}.pdf"
        return {"type": "file", "file": {"filename": name, "file_data": data_url(attachment)}}
    raise BadRequest("bad_attachment", f"attachment {attachment.name}: the API takes no {attachment.media_type}")


def text_of(content: Any) -> str:
    """The text of a message's content, or of a chunk of one: a string, or a list of parts of which some have text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part if isinstance(part, str) else part.get("text") if _is_text(part) else "" for part in content)
    return "".join(text for text in texts if text)


def _text(attachment: Attachment) -> str:
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    view = memoryview(attachment.data)
    return "".join([decode(view[at : at + _PIECE_BYTES]) for at in _steps(len(view))]) + decode(b"", final=True)


def _in_json(text: str) -> str | msgspec.Raw:
    """A text as it is, or if it is large as the JSON that it makes."""
    if len(text) <= _PIECE_BYTES:
        return text
    pieces = [_encode(text[at : at + _PIECE_BYTES])[1:-1] for at in _steps(len(text))]
    return msgspec.Raw(b"".join([b'"', *pieces, b'"']))


def _steps(size: int) -> Iterator[int]:
    """The beginnings of the pieces to do something large in. Without a pause in between, the loop would have to wait
    for as long as the whole takes: it shares the GIL.
    """
    for at in range(0, size, _PIECE_BYTES):
        if at:
            time.sleep(_WAY_SECS)
        yield at


def in_base64(attachment: Attachment, prefix: str = "") -> msgspec.Raw:
    """The attachment as a string of JSON that needs no further look, `prefix` (plain characters) before it."""
    view = memoryview(attachment.data)
    pieces = [binascii.b2a_base64(view[at : at + _PIECE_BYTES], newline=False) for at in _steps(len(view))]
    return msgspec.Raw(b"".join([b'"', prefix.encode("ascii"), *pieces, b'"']))


def data_url(attachment: Attachment) -> msgspec.Raw:
    """The attachment as a `data:` URL (RFC 2397), likewise."""
    return in_base64(attachment, f"data:{attachment.media_type};base64,")
