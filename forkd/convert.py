"""Plain data into Structs, with every fault named instead of the first.

`Walk` goes down a Struct's fields and the data side by side and hands each leaf to msgspec. A leaf that msgspec refuses
becomes a line in `Walk.faults` and leaves the default in its place, so that the walk, and whatever checks come after,
can go on. There is no code per key: what a key may be is said by its type, once, and so is what a fault says of it.

A key that does not exist is a fault as well, with the one that was probably meant; the names of the daemon that forkd
is a drop-in for ("the reference") are known for that.
"""

import difflib
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct, inspect

from forkd.settings import (
    PROVIDERS,
    Backend,
    FileMode,
    ListenerSettings,
    PoolSettings,
    Secret,
    Settings,
    default_backends,
)

# The reference's keys that have another name here, and those that have none.
REFERENCE_KEYS: Final[Mapping[str, str | None]] = {
    "server.handoff_buffer_size": None,
    "server.backend_timeout_secs": "backends.openai.first_byte_timeout_secs",
    "backend.provider": "default_backend",
    "backend.default_model": "backends.openai.default_model",
    "backend.timeout_secs": "backends.openai.idle_timeout_secs",
    "backend.openai.api_key": "backends.openai.api_key",
    "backend.openai.api_base": "backends.openai.api_base",
    "backend.openai.api_socket": "backends.openai.api_socket",
    "backend.openai.pool_max_idle_per_host": "backends.openai.pool_max_idle",
    "backend.openai.insecure_ssl": "backends.openai.insecure_ssl",
    "backend.openai.http2.enabled": "backends.openai.http2.enabled",
    "backend.openai.http2.initial_stream_window_kb": "backends.openai.http2.initial_stream_window_kb",
    "backend.openai.http2.initial_connection_window_kb": "backends.openai.http2.initial_connection_window_kb",
    "backend.openai.http2.adaptive_window": None,
    "backend.openai.http2.keep_alive_interval_secs": "backends.openai.http2.keep_alive_interval_secs",
    "backend.openai.http2.keep_alive_timeout_secs": "backends.openai.http2.keep_alive_timeout_secs",
}

# Words that people write for the ones we know, in the file or (where YAML does not do it for us) in the environment.
SYNONYMS: Final[Mapping[str, str]] = {
    "yes": "true",
    "on": "true",
    "no": "false",
    "off": "false",
    "warn": "warning",
    "trace": "debug",
}


T = TypeVar("T", bound=Struct)


class Walk:
    """One pass over the data. `faults` grows; nothing is raised."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        self.sources: dict[str, str] = {}  # dotted key -> who set it, where that was not the file
        self.broken_backends: set[str] = set()  # written, but of no provider we know

    def fault(self, key: str, what: str) -> None:
        self.faults.append(f"{self.sources.get(key, key)}: {what}")

    def lay_over(self, raw: dict[Any, Any], key: str, value: object, source: str, *, if_missing: bool = False) -> None:
        """Set a dotted key in the data, on behalf of source. Under a section that is no mapping it is left out."""
        *sections, last = key.split(".")
        for section in sections:
            if raw.get(section) is None:
                raw[section] = {}
            raw = raw[section]
            if not isinstance(raw, dict):
                return  # the walk will say so
        if if_missing and last in raw:
            return
        raw[last] = value
        self.sources[key] = source

    def struct(self, kind: type[T], raw: object, key: str) -> T:
        """A Struct of the data; what is missing or wrong has its default, or None if it has none."""
        data = self.mapping(raw, key)
        values: dict[str, Any] = {}
        fields = msgspec.structs.fields(kind)
        names = [field.name for field in fields]
        for name in data:
            if name not in names:
                self.unknown(join(key, name), data[name], names)
        for field in fields:
            here = join(key, field.name)
            found = self.value(field.type, data[field.name], here) if field.name in data else NODEFAULT
            if found is not NODEFAULT:
                values[field.name] = found
            elif field.required:
                values[field.name] = None
                if field.name not in data and (raw is None or isinstance(raw, dict)):
                    self.fault(here, "is missing")
        return kind(**values)

    def mapping(self, raw: object, key: str) -> dict[str, Any]:
        """The data as a mapping by name; nothing at all (``server:`` and no more) is an empty one."""
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            self.fault(key, f"expected a mapping, got {kind_of(raw)}")
            return {}
        for name in raw:
            if not isinstance(name, str):
                self.fault(join(key, name), f"expected a name as the key, got {kind_of(name)}")
        return {name: value for name, value in raw.items() if isinstance(name, str)}

    def value(self, annotation: Any, raw: object, key: str) -> Any:
        """One field, whatever it is; NODEFAULT if it is faulty."""
        if key == "backends":
            return self.backends(raw)
        if key == "pools":
            return self.pools(raw)
        plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if isinstance(plain, type) and issubclass(plain, Struct):
            return self.struct(plain, raw, key)
        if get_origin(plain) in (list, tuple):
            return self.items(get_args(plain)[0], get_origin(plain), raw, key)
        return self.leaf(annotation, raw, key)

    def items(self, annotation: Any, container: Callable[[Iterable[Any]], Any], raw: object, key: str) -> Any:
        if raw is None:
            return NODEFAULT
        if not isinstance(raw, list | tuple):
            self.fault(key, f"expected a list, got {kind_of(raw)}")
            return NODEFAULT
        found = [self.value(annotation, item, f"{key}[{index}]") for index, item in enumerate(raw)]
        return container(None if item is NODEFAULT else item for item in found)  # so that the indexes stay right

    def backends(self, raw: object) -> dict[str, Backend]:
        """The backends that are written, over those that exist anyway."""
        written = self.mapping(raw, "backends")
        backends: dict[str, Backend] = {}
        for name in {**default_backends(), **written}:
            key = join("backends", name)
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
                self.fault(key, "a backend's name is made of up to 64 letters, digits, dots, hyphens and underscores")
            data = self.mapping(written.get(name), key)
            provider = data.get("provider", name)
            kind = PROVIDERS.get(provider.lower()) if isinstance(provider, str) else None
            if kind is not None:
                backends[name] = self.struct(kind, {**data, "provider": provider}, key)
            else:
                self.broken_backends.add(name)
                expected = f"expected one of {', '.join(PROVIDERS)}"
                what = f"{expected}; got {shown(provider)}" if "provider" in data else f"is missing; {expected}"
                self.fault(f"{key}.provider", what)
        return backends

    def pools(self, raw: object) -> dict[str, PoolSettings]:
        """The pools that are written."""
        pools: dict[str, PoolSettings] = {}
        for name, data in self.mapping(raw, "pools").items():
            key = join("pools", name)
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", name):
                self.fault(key, "a pool's name is made of up to 32 letters, digits, dots, hyphens and underscores")
            pools[name] = self.struct(PoolSettings, data, key)
        return pools

    def leaf(self, annotation: Any, raw: object, key: str) -> Any:
        """A value, converted by msgspec as its type says; NODEFAULT if that refuses it."""
        types = _types(inspect.type_info(annotation))
        value = raw
        try:
            if isinstance(raw, str) and any(isinstance(kind, inspect.LiteralType | inspect.BoolType) for kind in types):
                value = SYNONYMS.get(raw.lower(), raw.lower())
            elif isinstance(raw, str) and raw.isdecimal() and any(isinstance(kind, inspect.IntType) for kind in types):
                value = int(raw)  # or msgspec would leave a user's number a string, since it may be one
            found = msgspec.convert(value, annotation, strict=False, dec_hook=_decode)
            # Refuses lone surrogates, which nothing could print, and what no handoff data may hold.
            json.dumps(found, default=str, ensure_ascii=False, allow_nan=False).encode()
            if isinstance(found, dict):
                msgspec.json.encode(found)  # refuses keys that YAML has and JSON has not: true, null
        except (msgspec.ValidationError, ValueError, TypeError):
            expected = _expected(types, value)
            separator = ";" if expected.startswith("one of") else ","
            self.fault(key, f"expected {expected}{separator} got {_got(types, raw)}")
            return NODEFAULT
        return found

    def unknown(self, key: str, value: object, names: Collection[str]) -> None:
        """A key that does not exist, and the one that was probably meant. names: those that exist beside it."""
        if isinstance(value, dict) and value and any(known.startswith(f"{key}.") for known in REFERENCE_KEYS):
            for name, inner in value.items():  # a section of the reference: each of its keys has its own answer
                self.unknown(join(key, name), inner, ())
            return
        what = f"sets {key}, an unknown key" if key in self.sources else "unknown key"
        self.fault(key, "; ".join(filter(None, [what, _hint(key, names)])))


def _hint(key: str, names: Collection[str]) -> str:
    """What to say of an unknown key. names: the keys that exist beside it."""
    section, _, last = key.rpartition(".")
    by_last_part = {known.rpartition(".")[2]: new for known, new in REFERENCE_KEYS.items()}
    new = REFERENCE_KEYS.get(key, by_last_part.get(last, ""))
    if new is None:
        return "forkd has no need of it, remove it"
    if key in REFERENCE_KEYS:
        return f"forkd's name is {new}"
    if (sibling := new.rpartition(".")[2]) in names:
        return f"forkd's name is {join(section, sibling)}"
    elsewhere = [known for known in known_keys() if known.rpartition(".")[2] == last]
    if key in elsewhere:
        return "this provider has no such key"
    below = [known for known in elsewhere if section and known.startswith(f"{section}.")]
    beside = difflib.get_close_matches(last, names, n=1) or [name for name in names if last.endswith(f"_{name}")]
    for meant in [*below, *(join(section, name) for name in beside), *elsewhere, *filter(None, [new])]:
        return f"did you mean {meant}?"
    return ""


@functools.cache
def known_keys() -> Mapping[str, msgspec.structs.FieldInfo]:
    """Every key that can be written, dotted, in the order of the Structs; a listener's as ``listeners[].path``."""
    return dict(_keys_of(Settings, ""))


def _keys_of(kind: type[Struct], key: str) -> Iterator[tuple[str, msgspec.structs.FieldInfo]]:
    sections: dict[str, Mapping[str, type[Struct]]] = {
        "listeners": {"listeners[]": ListenerSettings},
        "pools": {"pools.NAME": PoolSettings},
        "backends": {f"backends.{name}": backend for name, backend in PROVIDERS.items()},
    }
    for field in msgspec.structs.fields(kind):
        here = join(key, field.name)
        plain = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
        if here in sections:
            for name, inner in sections[here].items():
                yield from _keys_of(inner, name)
        elif isinstance(plain, type) and issubclass(plain, Struct):
            yield from _keys_of(plain, here)
        else:
            yield here, field


def _decode(kind: type[Any], raw: object) -> object:
    """msgspec's hook for the types that it does not know."""
    if issubclass(kind, FileMode | Secret):
        return kind.parse(raw)
    raise NotImplementedError(kind)


def _types(info: inspect.Type) -> list[inspect.Type]:
    """The alternatives of a type, without the null that only says that a key may be left out."""
    if isinstance(info, inspect.Metadata):
        return _types(info.type)
    if isinstance(info, inspect.UnionType):
        return [kind for member in info.types for kind in _types(member)]
    return [] if isinstance(info, inspect.NoneType) else [info]


def _expected(types: Iterable[inspect.Type], value: object) -> str:
    """What a value of the type is, in words; the bounds of a number only for one that breaks them."""
    words: list[str] = []
    others: list[str] = []
    for kind in types:
        match kind:
            case inspect.BoolType():
                words += ["true", "false"]
            case inspect.LiteralType(values=values):
                words += [str(word) for word in values]
            case inspect.IntType() | inspect.FloatType():
                noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
                others.append(noun + (_bounds(kind) if _is_number(value) else ""))
            case inspect.StrType():
                others.append("a string that is not empty" if value == "" else "a string")
            case inspect.CustomType(cls=custom) if issubclass(custom, FileMode | Secret):
                others.append(custom.expected)
            case _:
                others.append("a mapping of names to JSON values")
    if words and not others:
        return "true or false" if words == ["true", "false"] else f"one of {', '.join(words)}"
    return " or ".join(others + words)


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    low = f"from {kind.ge:g}" if kind.ge is not None else f"above {kind.gt:g}"  # every number has both bounds
    return f" {low} to {kind.le:.15g}"


def _is_number(value: object) -> bool:
    try:
        msgspec.convert(value, float, strict=False)
    except msgspec.ValidationError:
        return isinstance(value, int) and not isinstance(value, bool)  # one that is out of a float's range
    return True


def _got(types: Iterable[inspect.Type], raw: object) -> str:
    if any(isinstance(kind, inspect.CustomType) and kind.cls is Secret for kind in types):
        return "other characters" if isinstance(raw, str) else kind_of(raw)
    return shown(raw)


def shown(value: object) -> str:
    """A value as a fault quotes it: one line, printable, not too long."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=not value.isprintable())
    elif value is None or isinstance(value, bool | int | float):
        try:
            text = json.dumps(value)
        except ValueError:  # more digits than Python likes to print
            text = "a very long number"
    else:
        return kind_of(value)
    return text if len(text) <= 80 else f"{text[:76]} …"


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "a mapping" if isinstance(value, dict) else f"a {type(value).__name__}")


def join(key: str, name: object) -> str:
    plain = name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 80 else shown(name)
    return f"{key}.{plain}" if key else plain
