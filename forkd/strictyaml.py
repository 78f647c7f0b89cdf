"""A configuration file, read with suspicion: plain YAML data out, or `Unreadable` with one line that says why.

The promise: whatever the path names and whatever the bytes are, this neither hangs, nor runs anything, nor takes more
than a moment, nor lets another exception out. PyYAML's safe loader sees to the running; the rest is ours:

* the file must be a regular one (or a device such as /dev/null): to read a FIFO could block a reload for ever;
* size, number of values and depth are bounded, aliases are refused: a reload is done by a process others wait for;
* a key that is written twice is noted, where PyYAML would let the last one win;
* scalars follow YAML 1.2 where 1.1 surprises people: ``0660`` stays the text ``0660`` rather than 432, ``1:30`` is no
  number of base 60, ``2026-01-01`` no date. ``yes``, ``no``, ``on`` and ``off`` stay as 1.1 has them.

The pure Python loader is used on purpose: libyaml's cannot be bounded while it composes.
"""

import os
import re
import stat
from collections.abc import Hashable, Iterable
from typing import Any, Final

import yaml

MAX_BYTES: Final = 1 << 20
MAX_VALUES: Final = 5_000
MAX_DEPTH: Final = 16
_TAB: Final = "found character '\\t' that cannot start any token"
"""What PyYAML says of a line that begins with one."""


class Unreadable(Exception):
    """The file gives no data at all. The message is one line, without the file's name and without its content."""


def read(path: str) -> tuple[Any, list[str]]:
    """The data of the YAML file (None if it is empty), and a line for each key that is written twice."""
    try:
        text = _bytes_of(path).decode("utf-8-sig")
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be read") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not text in UTF-8 (byte {error.start})") from None
    except ValueError:
        raise Unreadable("is not a file name") from None  # a NUL, or a surrogate that no encoding takes
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.duplicates
    except Unreadable:
        raise
    except yaml.YAMLError as error:
        raise Unreadable(_explain(error)) from None
    except Exception as error:
        # "!!int x", "!!timestamp x" and their like: the constructors raise whatever int() or a failed match raises.
        raise Unreadable(f"has a value that does not fit its tag ({type(error).__name__})") from None


def _bytes_of(path: str) -> bytes:
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:  # a directory is refused here
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            raise Unreadable("is not a regular file")
        content = b""
        while chunk := file.read(MAX_BYTES + 1 - len(content)):
            content += chunk
        if len(content) > MAX_BYTES:
            raise Unreadable(f"is larger than {MAX_BYTES} bytes")
        return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # or the open itself would wait for a FIFO's writer


def _explain(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((error.problem or error.context or "is not YAML").split())
        return where + ("a tab, where YAML takes spaces only" if problem == _TAB else problem)
    return "is not text: it holds control characters"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own table, filled below)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = 0
        self.depth = 0
        self.duplicates: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.values += 1
        refused = (
            "aliases (*name) are not accepted"
            if isinstance(event, yaml.AliasEvent)
            else f"more than {MAX_VALUES} values"
            if self.values > MAX_VALUES
            else "nested too deeply"
            if self.depth > MAX_DEPTH
            else None
        )
        if refused:
            raise Unreadable(f"line {event.start_mark.line + 1}: {refused}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                before = lines[key.tag, key.value]
                self.duplicates.append(f"line {line}: the key {key.value[:40]!r} was written before, on line {before}")
            lines.setdefault((key.tag, key.value), line)
        return super().construct_mapping(node, deep)


def _plain(tag: str, pattern: str, first: Iterable[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), list(first))


_plain("null", "~|null|Null|NULL|", ["~", "n", "N", ""])
_plain("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO")
_plain("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789")
_plain("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|(?:\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+)", "-+.0123456789")
_plain("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.")
