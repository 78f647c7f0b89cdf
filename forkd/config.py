"""What people wrote, made into `Settings`: the file, the environment over it, the flags over both.

The promise: a wrong configuration is refused with *every* fault named, one line each, in the words of whoever wrote it
(``backends.openai.idle_timeout_secs: expected a number, got "fast"``; a fault of the environment names the variable).
No secret is ever quoted, and nothing but `ConfigError` comes out.

How: `forkd.strictyaml` reads the file; the three sources are laid over each other as plain data, remembering which came
from where; `forkd.convert` goes down that data beside the Structs of `forkd.settings` and converts each leaf. What is
left for here are the rules that take more than one key, or the system, to judge.
"""

import difflib
import grp
import os
import pwd
import re
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from forkd import programs, strictyaml, target
from forkd.convert import Walk, join, kind_of, shown
from forkd.handoff_data import HandoffData
from forkd.settings import (
    COMMON,
    POOLS_MAX,
    WORKERS_WANTED_MAX,
    AnthropicBackend,
    Backend,
    ExecBackend,
    HttpBackend,
    LangGraphBackend,
    ListenerSettings,
    PythonBackend,
    Secret,
    Settings,
    default_socket_path,
    parse_address,
    worker_counts,
)

# What this version can do of what can be configured. A new feature is let in here, and nowhere else.
AVAILABLE_PROVIDERS: Final = frozenset({"mock", "typing", "openai", "anthropic", "langgraph", "python", "exec"})
AVAILABLE_PROTOCOLS: Final = frozenset({"handoff", "fdpass"})
UNAVAILABLE_LISTENER_KEYS: Final = ("tls",)
# The reference's variables and those that are like them, and what each sets.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "DAEMON_SOCKET_PATH": "server.socket_path",
    "DAEMON_SOCKET_MODE": "server.socket_mode",
    "DAEMON_MAX_CONNECTIONS": "server.max_connections",
    "DAEMON_HANDOFF_TIMEOUT_SECS": "server.handoff_timeout_secs",
    "DAEMON_WRITE_TIMEOUT_SECS": "server.write_timeout_secs",
    "DAEMON_SHUTDOWN_TIMEOUT_SECS": "server.shutdown_timeout_secs",
    "DAEMON_BACKEND_PROVIDER": "default_backend",
    "DAEMON_BACKEND_TIMEOUT_SECS": "backends.openai.first_byte_timeout_secs",
    "DAEMON_DEFAULT_MODEL": "backends.openai.default_model",
    "DAEMON_TOKEN_DELAY_MS": "backends.mock.token_delay_ms",
    "OPENAI_API_KEY": "backends.openai.api_key",
    "OPENAI_API_BASE": "backends.openai.api_base",
    "OPENAI_API_SOCKET": "backends.openai.api_socket",
    "OPENAI_HTTP2_ENABLED": "backends.openai.http2.enabled",
    "OPENAI_INSECURE_SSL": "backends.openai.insecure_ssl",
    "ANTHROPIC_API_KEY": "backends.anthropic.api_key",
    "ANTHROPIC_API_BASE": "backends.anthropic.api_base",
    "LANGGRAPH_API_KEY": "backends.langgraph.api_key",
    "LANGGRAPH_API_BASE": "backends.langgraph.api_base",
    "DAEMON_METRICS_ENABLED": "metrics.enabled",
    "DAEMON_METRICS_ADDR": "metrics.listen_addr",
    "DAEMON_LOG_LEVEL": "logging.level",
    "DAEMON_LOG_FORMAT": "logging.format",
}

_IN_A_URL: Final = re.compile(r"[!-~]+")

# Variables that the reference reads and forkd has no use for.
OBSOLETE_VARIABLES: Final[Mapping[str, str]] = {
    "DAEMON_HANDOFF_BUFFER_SIZE": "a handoff is received whole, whatever its size; server.max_data_bytes bounds it",
    "RUST_LOG": "the level is logging.level or DAEMON_LOG_LEVEL",
}

OWN_USER: Final = "forkd"
"""Whom `make install` makes."""
MAX_SOCKET_PATH_BYTES: Final = 107  # sockaddr_un.sun_path less its NUL: unix(7)
MAX_KEY_FILE_BYTES: Final = 65_536
_TYPE_NAMES: Final = {
    "str": "a string",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
}
MODES_WITHOUT_TEXT: Final = ("custom", "tasks", "debug", "events")


class ConfigError(Exception):
    """The configuration is refused. `faults` says why, completely, one line each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults: list[str] = list(faults)
        super().__init__("\n".join(self.faults))


class Loaded(NamedTuple):
    """A good configuration, and what its author may want to know about it all the same."""

    settings: Settings
    warnings: list[str]


def load(
    path: str | None, environ: Mapping[str, str] = os.environ, overrides: Mapping[str, object] | None = None
) -> Loaded:
    """Read the configuration; raise `ConfigError` with every fault there is.

    path is the YAML file, or None for none. overrides are the flags, by dotted key (``{"workers.count": 2}``); one
    whose value is None was not given. A variable that is set to nothing counts as not set.
    """
    raw, faults = _read_file(path)
    walk = Walk(faults)
    walk.lay_over(raw, "server.socket_path", default_socket_path(environ), "server.socket_path", if_missing=True)
    for variable, key in ENVIRONMENT.items():
        if environ.get(variable):
            walk.lay_over(raw, key, environ[variable], variable)
    for key, value in (overrides or {}).items():
        if value is not None:
            walk.lay_over(raw, key, value, f"{key} (command line)")
    settings = walk.struct(Settings, raw, "")
    _check(settings, walk)
    settings = _with_keys(settings, walk)
    if walk.faults:
        raise ConfigError(walk.faults)
    return Loaded(settings, _warnings(environ))


def _read_file(path: str | None) -> tuple[dict[Any, Any], list[str]]:
    if path is None:
        return {}, []
    name = path if path.isprintable() else shown(path)
    try:
        data, duplicates = strictyaml.read(path)
    except strictyaml.Unreadable as error:
        raise ConfigError([f"{name}: {error}"]) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError([f"{name}: expected a mapping of settings, got {kind_of(data)}"])
    return data, [f"{name}: {duplicate}" for duplicate in duplicates]


def _warnings(environ: Mapping[str, str]) -> list[str]:
    warnings = [
        f"{variable} is ignored: {why}" for variable, why in OBSOLETE_VARIABLES.items() if environ.get(variable)
    ]
    for variable in environ:
        if variable.startswith(("DAEMON_", "OPENAI_", "ANTHROPIC_", "LANGGRAPH_")) and variable not in {
            *ENVIRONMENT,
            *OBSOLETE_VARIABLES,
        }:
            near = difflib.get_close_matches(variable, ENVIRONMENT, n=1, cutoff=0.85)
            warnings += [f"{variable} is ignored: did you mean {name}?" for name in near]
    return warnings


def _check(settings: Settings, walk: Walk) -> None:
    """The faults that no key has by itself, and those that only the system knows of."""
    server = settings.server
    _check_backend(settings, "default_backend", settings.default_backend, walk)
    paths: dict[str, str] = {}
    _check_socket("server.socket_path", server.socket_path, paths, walk)
    for key in ("user", "group", "socket_group", "allow_users", "allow_groups"):
        _check_principals(f"server.{key}", getattr(server, key), walk)
    for index, listener in enumerate(settings.listeners):
        _check_listener(f"listeners[{index}]", listener, settings, paths, walk)
    _check_pools(settings, walk)
    for name, backend in settings.backends.items():
        if isinstance(backend, HttpBackend):
            _check_http(f"backends.{name}", backend, walk)
        elif isinstance(backend, PythonBackend):
            _check_python(f"backends.{name}", backend, walk)
        elif isinstance(backend, ExecBackend):
            _check_exec(f"backends.{name}", backend, walk)
    try:
        parse_address(settings.metrics.listen_addr)
    except ValueError as error:
        walk.fault("metrics.listen_addr", f"expected {error}, got {shown(settings.metrics.listen_addr)}")


def _check_listener(
    key: str, listener: ListenerSettings, settings: Settings, paths: dict[str, str], walk: Walk
) -> None:
    if listener.path is not None:
        _check_socket(f"{key}.path", listener.path, paths, walk)
    for name in ("group", "allow_users", "allow_groups"):
        _check_principals(f"{key}.{name}", getattr(listener, name), walk)
    if listener.protocol not in AVAILABLE_PROTOCOLS:
        walk.fault(f"{key}.protocol", f"{listener.protocol} is not available in this version")
    for name in UNAVAILABLE_LISTENER_KEYS:
        if getattr(listener, name):
            walk.fault(f"{key}.{name}", f"{name} is not available in this version")
    if listener.data is not None and not listener.bare:
        walk.fault(f"{key}.data", "only a listener with protocol fdpass has data of its own")
    if listener.backend is not None:
        _check_backend(settings, f"{key}.backend", listener.backend, walk)
    if listener.pool is not None and listener.pool not in settings.pools:
        meant = _pool_meant(settings, listener.pool)
        hint = f"did you mean {meant}?" if meant else "write it under pools"
        walk.fault(f"{key}.pool", f"there is no pool {shown(listener.pool)}; {hint}")
    if listener.bare:
        _check_bare(key, listener, settings, walk)


def _pool_meant(settings: Settings, name: str) -> str:
    """The pool that is called like this, or nearly so, if there is one."""
    return "".join(difflib.get_close_matches(name, settings.pools, n=1))


def _check_pools(settings: Settings, walk: Walk) -> None:
    named = {_pool_meant(settings, listener.pool) for listener in settings.listeners if listener.pool is not None}
    for name in settings.pools:
        if name == COMMON:
            walk.fault(f"pools.{name}", "this is what the workers of workers.count are called; choose another name")
        elif name not in named:
            walk.fault(join("pools", name), "no listener names it, so its workers would have nothing to do")
    if len(settings.pools) > POOLS_MAX:
        walk.fault("pools", f"there may be {POOLS_MAX} of them, these are {len(settings.pools)}")
    if settings.pools and (total := sum(worker_counts(settings).values())) > WORKERS_WANTED_MAX:
        walk.fault("pools", f"there may be {WORKERS_WANTED_MAX} workers, these and workers.count are {total:,}")


def _check_bare(key: str, listener: ListenerSettings, settings: Settings, walk: Walk) -> None:
    """What a listener needs whose senders say nothing."""
    if listener.type == "seqpacket":
        walk.fault(f"{key}.type", "mod_proxy_fdpass connects to a stream socket; write stream, or leave it out")
    try:
        data = msgspec.json.decode(msgspec.json.encode(listener.data or {}), type=HandoffData, strict=False)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        walk.fault(f"{key}.data{where.removesuffix('`')}", re.sub(r"`(.*?)`", _in_words, what[0].lower() + what[1:]))
        return
    if data.backend is not None:
        _check_backend(settings, f"{key}.data.backend", data.backend, walk)
    name = listener.named_backend or settings.default_backend
    asked = {"prompt", "messages", "langgraph_input"} & (listener.data or {}).keys()
    if isinstance(settings.backends.get(name), HttpBackend) and not asked:
        walk.fault(f"{key}.data", f"{name} asks an API, and mod_proxy_fdpass says not what: needs a prompt or messages")


def _in_words(named: re.Match[str]) -> str:
    """What a type is called by whoever writes YAML, for msgspec's name of it."""
    return " or ".join(_TYPE_NAMES.get(one, one) for one in named[1].split(" | ") if one != "null") or "null"


def _check_backend(settings: Settings, key: str, name: str, walk: Walk) -> None:
    backend = settings.backends.get(name)
    if backend is not None and backend.provider not in AVAILABLE_PROVIDERS:
        which = name if name == backend.provider else f"{backend.provider} (the provider of {name})"
        walk.fault(key, f"{which} is not available in this version")
    elif backend is None and name not in walk.broken_backends:
        walk.fault(key, f"expected one of {', '.join(settings.backends)}; got {shown(name)}")


def _check_socket(key: str, path: str, paths: dict[str, str], walk: Walk) -> None:
    if "\0" in path:
        walk.fault(key, f"expected a path, got {shown(path)}")
    elif (length := len(os.fsencode(path))) > MAX_SOCKET_PATH_BYTES:
        walk.fault(key, f"a Unix socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes, this has {length}")
    elif (other := paths.setdefault(os.path.abspath(path), key)) != key:
        walk.fault(key, f"{other} is the same path")


def _check_principals(key: str, value: str | int | tuple[str | int, ...] | None, walk: Walk) -> None:
    database, look_up = ("user", pwd.getpwnam) if "user" in key else ("group", grp.getgrnam)
    for index, name in enumerate(value if isinstance(value, tuple) else (value,)):
        if not isinstance(name, str):
            continue  # a number need not have a name
        try:
            look_up(name)
        except (KeyError, ValueError):
            here = f"{key}[{index}]" if isinstance(value, tuple) else key
            hint = "; make install makes it, or name another" if (key, name) == ("server.user", OWN_USER) else ""
            walk.fault(here, f"there is no {database} {shown(name)}{hint}")


def _check_http(key: str, backend: HttpBackend, walk: Walk) -> None:
    try:
        url = urlsplit(backend.api_base)
        # Anything else would have to be encoded, and what is asked for would not be what is written here.
        good = (
            url.scheme in ("http", "https")
            and url.hostname
            and url.port != 0
            and _IN_A_URL.fullmatch(url.netloc + url.path)
        )
    except ValueError:  # a port that is none, a bracket that does not close
        good = False
    if not good or "@" in url.netloc or url.query or url.fragment:
        # Not quoted: people put keys into URLs.
        walk.fault(
            f"{key}.api_base", "expected a URL such as https://api.openai.com/v1, without user, query or fragment"
        )
    if backend.api_socket is not None:
        _check_socket(f"{key}.api_socket", backend.api_socket, {}, walk)
    if backend.api_key and backend.api_key_file and f"{key}.api_key" not in walk.sources:
        walk.fault(f"{key}.api_key", "there is an api_key_file too; write one of them")
    for index, name in enumerate(backend.pass_through):
        if name in backend.reserved_keys:
            walk.fault(f"{key}.pass_through[{index}]", f"{shown(name)} is forkd's own to set or to keep")
    for index, written in enumerate(backend.attachment_types):
        if written is not None and not re.fullmatch(r"(\*|[\w.+-]+)/(\*|[\w.+-]+)", written, re.ASCII):
            walk.fault(
                f"{key}.attachment_types[{index}]", f"expected a media type such as image/png, got {shown(written)}"
            )
    if isinstance(backend, AnthropicBackend) and not re.fullmatch(r"[\w.-]+", backend.api_version, re.ASCII):
        walk.fault(f"{key}.api_version", f"expected a version such as 2023-06-01, got {shown(backend.api_version)}")
    if isinstance(backend, LangGraphBackend) and backend.format != "raw" and backend.stream_mode in MODES_WITHOUT_TEXT:
        walk.fault(f"{key}.stream_mode", f"{backend.stream_mode} has no text to take out: it needs format: raw")
    if backend.ca_file is not None and (fault := _ca_fault(backend.ca_file)):
        walk.fault(f"{key}.ca_file", f"{shown(backend.ca_file)}: {fault}")


def _check_python(key: str, backend: PythonBackend, walk: Walk) -> None:
    """What can be said of a handler without importing it, which only workers do."""
    if backend.target is not None:
        try:
            module, _ = target.split(backend.target)
        except ValueError as error:
            walk.fault(f"{key}.target", f"expected {error}, got {shown(backend.target)}")
        else:
            if (top := module.partition(".")[0]) in target.RESERVED:
                walk.fault(f"{key}.target", f"{top} is forkd's own; give your module another name")
    for index, directory in enumerate(backend.path):
        if directory is not None and not os.path.isabs(directory):
            walk.fault(f"{key}.path[{index}]", f"expected an absolute path, got {shown(directory)}")
        elif directory is not None and not os.path.isdir(directory):
            walk.fault(f"{key}.path[{index}]", f"there is no directory {shown(directory)}")


def _check_exec(key: str, backend: ExecBackend, walk: Walk) -> None:
    if backend.command == ():
        walk.fault(f"{key}.command", "expected a program and its arguments, got nothing")
    for index, argument in enumerate(backend.command or ()):
        if argument is not None and "\0" in argument:
            walk.fault(f"{key}.command[{index}]", f"expected an argument without NUL, got {shown(argument)}")
    if backend.directory is not None and "\0" in backend.directory:
        walk.fault(f"{key}.directory", f"expected a path, got {shown(backend.directory)}")
    for name, value in (backend.environment or {}).items():
        here = f"{key}.environment.{name if name.isprintable() else shown(name)}"
        if not programs.NAME.fullmatch(name):
            walk.fault(here, "a variable's name is made of letters, digits and underscores")
        elif name.startswith(programs.PREFIX):
            walk.fault(here, f"the names that begin with {programs.PREFIX} are forkd's own to set")
        elif not isinstance(value, str | int | float) or isinstance(value, bool):
            walk.fault(here, f"expected a string (in quotes), got {shown(value)}")
        elif "\0" in str(value):
            walk.fault(here, f"expected a string without NUL, got {shown(value)}")
    for index, variable in enumerate(backend.pass_environment):
        if variable is not None and not programs.NAME.fullmatch(variable):
            walk.fault(f"{key}.pass_environment[{index}]", f"expected a variable's name, got {shown(variable)}")


def _ca_fault(path: str) -> str:
    """What keeps a file from being one of certificates, or nothing."""
    import ssl  # noqa: PLC0415 (a megabyte that few masters need)

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is not a regular file"
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return "holds no certificates in PEM"
    except OSError as error:
        return error.strerror or "cannot be read"
    except ValueError:
        return "is not a file name"
    return ""


def _with_keys(settings: Settings, walk: Walk) -> Settings:
    """The settings with the keys that are in files. A key that was given otherwise is not looked for."""
    backends: dict[str, Backend] = {}
    for name, backend in settings.backends.items():
        backends[name] = backend
        if isinstance(backend, HttpBackend) and backend.api_key is None and backend.api_key_file is not None:
            try:
                secret = _key_in(backend.api_key_file)
            except ValueError as error:
                walk.fault(f"backends.{name}.api_key_file", f"{shown(backend.api_key_file)}: {error}")
            else:
                backends[name] = msgspec.structs.replace(backend, api_key=secret)
    return msgspec.structs.replace(settings, backends=backends)


def _key_in(path: str) -> Secret:
    """The key that a file holds. ValueError says why there is none, and quotes nothing of it."""
    try:
        # O_NONBLOCK: a FIFO would wait for somebody to write, and a reload with it.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(error.strerror or "cannot be read") from None
    except ValueError:
        raise ValueError("is not a file name") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("is not a regular file")
        content = os.read(fd, MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror or "cannot be read") from None
    finally:
        os.close(fd)
    if len(content) > MAX_KEY_FILE_BYTES:
        raise ValueError("is too large for a key")
    if not content.strip():
        raise ValueError("is empty")
    try:
        return Secret.parse(content.decode())
    except ValueError:
        raise ValueError(f"expected {Secret.expected}, got other characters") from None
