"""The configuration: its defaults, its three sources, and every way to get it wrong.

Run as a program (``.venv/bin/python -m tests.forkd.test_config``) this writes the tables of docs/configuration.md anew.
"""

import copy
import grp
import os
import pickle
import pwd
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import NODEFAULT, inspect

from forkd import config, cpus
from forkd.config import ENVIRONMENT, ConfigError, Loaded, load
from forkd.convert import REFERENCE_KEYS, known_keys
from forkd.settings import (
    HANDOFF_KEYS,
    MOCK_TEXT,
    PROVIDERS,
    AnthropicBackend,
    FileMode,
    HttpBackend,
    LangGraphBackend,
    ListenerSettings,
    MockBackend,
    OpenAiBackend,
    PoolSettings,
    Secret,
    Server,
    Settings,
    TypingBackend,
    Workers,
    default_socket_path,
    parse_address,
    worker_counts,
)
from workers.request import HandoffData

ROOT = Path(__file__).resolve().parents[2]

Loader = Callable[..., Loaded]


@pytest.fixture
def load_text(tmp_path: Path) -> Loader:
    """load(), from the text of a file."""

    def loader(text: str | bytes, environ: Mapping[str, str] | None = None, **overrides: object) -> Loaded:
        path = tmp_path / "forkd.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(str(path), environ or {}, {key.replace("__", "."): value for key, value in overrides.items()})

    return loader


def faults(action: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        action()
    assert str(refusal.value) == "\n".join(refusal.value.faults)
    return refusal.value.faults


def at(settings: Settings, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


# Defaults ------------------------------------------------------------------------------------------------------------


def test_everything_has_a_default() -> None:
    loaded = load(None, {}, {})
    assert loaded == Loaded(Settings(), [])
    assert loaded.settings.default_backend == "mock"
    assert list(loaded.settings.backends) == ["mock", "typing", "openai", "anthropic", "langgraph"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "server:\nworkers: {}\nlisteners:\nbackends:\nmetrics: ~\n"])
def test_an_empty_file_and_empty_sections_are_all_defaults(load_text: Loader, text: str) -> None:
    assert load_text(text).settings == Settings()


def test_the_mock_text_has_eighteen_words() -> None:
    assert len(MOCK_TEXT.split(" ")) == 18
    assert MockBackend().text == MOCK_TEXT


def test_the_socket_path_depends_on_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load(None, {"XDG_RUNTIME_DIR": "/run/user/0"}, {}).settings.server.socket_path == "/run/forkd/forkd.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    runtime = {"XDG_RUNTIME_DIR": "/run/user/1000"}
    assert load(None, runtime, {}).settings.server.socket_path == "/run/user/1000/forkd/forkd.sock"
    assert load(None, {}, {}).settings.server.socket_path == "/tmp/forkd-1000/forkd.sock"
    assert default_socket_path({"XDG_RUNTIME_DIR": "not/absolute"}) == "/tmp/forkd-1000/forkd.sock"
    assert faults(lambda: load(None, {"XDG_RUNTIME_DIR": "/" + "x" * 100}, {})) == [
        "server.socket_path: a Unix socket's path has at most 107 bytes, this has 118"
    ]


def test_all_listeners_begins_with_the_servers_own(load_text: Loader) -> None:
    settings = load_text(
        "server: {socket_path: /a, socket_type: stream, socket_mode: 0600, socket_group: 0, allow_users: [root, 33],"
        " allow_groups: ['7']}\nlisteners: [{path: /b, backend: typing, envelope: no}, {path: /c, mode: 0666}]"
    ).settings
    assert settings.all_listeners() == [
        ListenerSettings(
            path="/a", type="stream", mode=FileMode(0o600), group=0, allow_users=("root", 33), allow_groups=(7,)
        ),
        ListenerSettings(path="/b", backend="typing", envelope=False),
        ListenerSettings(path="/c", mode=FileMode(0o666)),
    ]
    assert settings.all_listeners()[0].protocol == "handoff"
    assert settings.all_listeners()[0].envelope is True


def test_worker_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 7)
    assert worker_counts(Settings()) == {"common": 7}
    pools = {"heavy": PoolSettings(count=2), "alone": PoolSettings()}
    assert worker_counts(Settings(workers=Workers(count=3), pools=pools)) == {"common": 3, "heavy": 2, "alone": 1}


def test_pools(load_text: Loader) -> None:
    settings = load_text(
        "{listeners: [{path: /a, pool: heavy}, {path: /b}, {path: /c, pool: x.1}, {path: /d, pool: heavy}],"
        " pools: {heavy: {count: 2}, x.1: }}"
    ).settings
    assert settings.pools == {"heavy": PoolSettings(count=2), "x.1": PoolSettings(count=1)}
    assert settings.pools_of_listeners() == ("common", "heavy", "common", "x.1", "heavy")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("listeners: [{path: /x, pool: heavy}]", ['listeners[0].pool: there is no pool "heavy"; write it under pools']),
        (
            "{listeners: [{path: /x, pool: hevy}], pools: {heavy: {count: 2}}}",
            ['listeners[0].pool: there is no pool "hevy"; did you mean heavy?'],
        ),
        (
            "{listeners: [{path: /x, pool: other}], pools: {heavy: {}}}",
            [
                'listeners[0].pool: there is no pool "other"; write it under pools',
                "pools.heavy: no listener names it, so its workers would have nothing to do",
            ],
        ),
        ("{listeners: [{path: /x, pool: 5}]}", ["listeners[0].pool: expected a string, got 5"]),
        (
            "{listeners: [{path: /x, pool: common}], pools: {common: {}}}",
            ["pools.common: this is what the workers of workers.count are called; choose another name"],
        ),
        (
            "{listeners: [{path: /x, pool: h}], pools: {h: {count: 0, cuont: 1}}}",
            [
                "pools.h.cuont: unknown key; did you mean pools.h.count?",
                "pools.h.count: expected a whole number from 1 to 1024, got 0",
            ],
        ),
        (
            "{listeners: [{path: /x, pool: h}], pools: {h: {count: auto}}}",
            ['pools.h.count: expected a whole number, got "auto"'],
        ),
        ("{listeners: [{path: /x, pool: h}], pools: {h: 2}}", ["pools.h: expected a mapping, got a number"]),
        ("pools: [h]", ["pools: expected a mapping, got a list"]),
        (
            '{listeners: [{path: /x, pool: "a b"}], pools: {"a b": {}}}',
            ["pools.a b: a pool's name is made of up to 32 letters, digits, dots, hyphens and underscores"],
        ),
        (
            "{listeners: [{path: /x, pool: h}], pools: {h: {count: 1000}}, workers: {count: 25}}",
            ["pools: there may be 1024 workers, these and workers.count are 1,025"],
        ),
        (
            f"{{listeners: [{', '.join(f'{{path: /{n}, pool: p{n}}}' for n in range(33))}],"
            f" pools: {{{', '.join(f'p{n}: {{}}' for n in range(33))}}}}}",
            ["pools: there may be 32 of them, these are 33"],
        ),
    ],
)
def test_pools_that_cannot_be(load_text: Loader, text: str, found: list[str]) -> None:
    assert faults(lambda: load_text(text)) == found


# The three sources ---------------------------------------------------------------------------------------------------

EXAMPLES: dict[str, tuple[str, object]] = {
    "DAEMON_SOCKET_PATH": ("/run/x.sock", "/run/x.sock"),
    "DAEMON_SOCKET_MODE": ("0o600", 0o600),
    "DAEMON_MAX_CONNECTIONS": ("50000", 50_000),
    "DAEMON_HANDOFF_TIMEOUT_SECS": ("6", 6.0),
    "DAEMON_WRITE_TIMEOUT_SECS": ("1.5", 1.5),
    "DAEMON_SHUTDOWN_TIMEOUT_SECS": ("0", 0.0),
    "DAEMON_BACKEND_PROVIDER": ("typing", "typing"),
    "DAEMON_BACKEND_TIMEOUT_SECS": ("31", 31.0),
    "DAEMON_DEFAULT_MODEL": ("gpt-5", "gpt-5"),
    "DAEMON_TOKEN_DELAY_MS": ("10", 10.0),
    "OPENAI_API_KEY": ("sk-1234\n", Secret("sk-1234")),
    "OPENAI_API_BASE": ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
    "OPENAI_API_SOCKET": ("/run/proxy.sock", "/run/proxy.sock"),
    "OPENAI_HTTP2_ENABLED": ("0", False),
    "OPENAI_INSECURE_SSL": ("TRUE", True),
    "ANTHROPIC_API_KEY": ("sk-ant-1234", Secret("sk-ant-1234")),
    "ANTHROPIC_API_BASE": ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
    "LANGGRAPH_API_KEY": (" lsv2-1234\n", Secret("lsv2-1234")),
    "LANGGRAPH_API_BASE": ("http://127.0.0.1:8001", "http://127.0.0.1:8001"),
    "DAEMON_METRICS_ENABLED": ("off", False),
    "DAEMON_METRICS_ADDR": ("[::]:9191", "[::]:9191"),
    "DAEMON_LOG_LEVEL": ("WARN", "warning"),
    "DAEMON_LOG_FORMAT": ("json", "json"),
}


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_every_variable_sets_its_key(variable: str) -> None:
    written, meant = EXAMPLES[variable]
    loaded = load(None, {variable: written}, {})
    assert at(loaded.settings, ENVIRONMENT[variable]) == meant
    assert loaded.warnings == []
    assert load(None, {variable: ""}, {}).settings == Settings(), "set to nothing is not set"


def test_environment_over_file_and_flags_over_both(load_text: Loader) -> None:
    file = "server: {socket_path: /file, linger_secs: 3}\nlogging: {level: error}\nbackends: {mock: {text: a b}}"
    environ = {"DAEMON_SOCKET_PATH": "/environ", "DAEMON_LOG_LEVEL": "info", "DAEMON_TOKEN_DELAY_MS": "1"}
    settings = load_text(file, environ, server__socket_path="/flag", workers__count=2, default_backend=None).settings
    assert settings.server == Server(socket_path="/flag", linger_secs=3)
    assert settings.logging.level == "info"
    assert settings.backends["mock"] == MockBackend(token_delay_ms=1, text="a b")
    assert settings.workers.count == 2
    assert settings.default_backend == "mock", "a flag that is None was not given"


def test_what_is_overridden_is_not_judged(load_text: Loader) -> None:
    assert load_text("server: {max_connections: many}", {"DAEMON_MAX_CONNECTIONS": "9"}).settings.server == Server(
        max_connections=9
    )


def test_a_fault_names_its_source(load_text: Loader) -> None:
    environ = {"DAEMON_MAX_CONNECTIONS": "many", "DAEMON_BACKEND_PROVIDER": "cohere", "DAEMON_TOKEN_DELAY_MS": "-1"}
    assert faults(lambda: load_text("server: {linger_secs: long}", environ, workers__count="few")) == [
        'DAEMON_MAX_CONNECTIONS: expected a whole number, got "many"',
        'server.linger_secs: expected a number, got "long"',
        'workers.count (command line): expected a whole number or auto, got "few"',
        'DAEMON_TOKEN_DELAY_MS: expected a number from 0 to 3600000, got "-1"',
        'DAEMON_BACKEND_PROVIDER: expected one of mock, typing, openai, anthropic, langgraph; got "cohere"',
    ]
    assert faults(lambda: load_text("backends: {openai: {provider: mock}}", {"OPENAI_API_KEY": "sk-1234"})) == [
        "OPENAI_API_KEY: sets backends.openai.api_key, an unknown key; this provider has no such key"
    ]


def test_sections_that_are_none_are_a_fault_beside_the_environment(load_text: Loader) -> None:
    assert faults(
        lambda: load_text("server: [1]\nbackends: {mock: quick}", {v: e for v, (e, _) in EXAMPLES.items()})
    ) == [
        "server: expected a mapping, got a list",
        "backends.mock: expected a mapping, got a string",
    ]


def test_warnings() -> None:
    environ = {
        "RUST_LOG": "debug",
        "DAEMON_HANDOFF_BUFFER_SIZE": "65536",
        "DAEMON_WRITE_TIMEOUT": "9",
        "DAEMON_PORT": "1",
    }
    assert load(None, environ, {}).warnings == [
        "DAEMON_HANDOFF_BUFFER_SIZE is ignored: a handoff is received whole, whatever its size; "
        "server.max_data_bytes bounds it",
        "RUST_LOG is ignored: the level is logging.level or DAEMON_LOG_LEVEL",
        "DAEMON_WRITE_TIMEOUT is ignored: did you mean DAEMON_WRITE_TIMEOUT_SECS?",
    ]


def test_a_missing_user_forkd_is_what_make_install_makes(load_text: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> object:
        raise KeyError(name)

    monkeypatch.setattr("pwd.getpwnam", nobody)
    with pytest.raises(ConfigError) as refused:
        load_text("server: {user: forkd}")
    said = 'server.user: there is no user "forkd"; make install makes it, or name another'
    assert refused.value.faults == [said]


# Faults --------------------------------------------------------------------------------------------------------------


def test_every_fault_is_named_at_once(load_text: Loader) -> None:
    text = """\
sever: {}
server:
  write_timeout_secs: fast
  write_timeout_secs: -1
  socket_type: tcp
listeners:
  - {type: seqpacket}
  - nonsense
backends:
  openai: {idle_timeout_secs: "fast", http2: {max_streams: 0}}
  mine: {}
logging: {access: perhaps}
"""
    expected = [
        "line 4: the key 'write_timeout_secs' was written before, on line 3",
        "sever: unknown key; did you mean server?",
        'server.socket_type: expected one of seqpacket, stream; got "tcp"',
        "server.write_timeout_secs: expected a number above 0 to 31536000, got -1",
        "listeners[0].path: is missing",
        "listeners[1]: expected a mapping, got a string",
        'backends.openai.idle_timeout_secs: expected a number, got "fast"',
        "backends.openai.http2.max_streams: expected a whole number from 1 to 10000, got 0",
        "backends.mine.provider: is missing; expected one of mock, typing, openai, anthropic, langgraph, python, exec",
        'logging.access: expected true or false, got "perhaps"',
    ]
    found = faults(lambda: load_text(text))
    assert found[0].endswith("forkd.yaml: " + expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("server: {queue_size: }", "server.queue_size: expected a whole number, got null"),
        ("server: {queue_size: 1.5}", "server.queue_size: expected a whole number from 0 to 1000000000, got 1.5"),
        ("server: {queue_size: yes}", "server.queue_size: expected a whole number, got true"),
        ("server: {queue_size: [1]}", "server.queue_size: expected a whole number, got a list"),
        ("server: {linger_secs: .nan}", "server.linger_secs: expected a number from 0 to 31536000, got NaN"),
        ("server: {linger_secs: .inf}", "server.linger_secs: expected a number from 0 to 31536000, got Infinity"),
        ("server: {linger_secs: 'inf'}", 'server.linger_secs: expected a number from 0 to 31536000, got "inf"'),
        (
            f"server: {{linger_secs: 1{'0' * 400}}}",
            f"server.linger_secs: expected a number from 0 to 31536000, got 1{'0' * 75} …",
        ),
        ("server: {max_connections: 0}", "server.max_connections: expected a whole number from 1 to 1000000000, got 0"),
        ("server: {write_timeout_secs: 0}", "server.write_timeout_secs: expected a number above 0 to 31536000, got 0"),
        ("server: {ledger: 2}", "server.ledger: expected true or false, got 2"),
        ("server: {socket_path: ''}", 'server.socket_path: expected a string that is not empty, got ""'),
        ("server: {socket_path: 5}", "server.socket_path: expected a string, got 5"),
        ('server: {socket_path: "/a\\0b"}', 'server.socket_path: expected a path, got "/a\\u0000b"'),
        ('server: {socket_path: "/\\ud800"}', 'server.socket_path: expected a string, got "/\\ud800"'),
        (
            f"server: {{socket_path: /{'ä' * 54}}}",
            "server.socket_path: a Unix socket's path has at most 107 bytes, this has 109",
        ),
        ("server: {user: nobody-here}", 'server.user: there is no user "nobody-here"'),
        ("server: {group: nobody-here}", 'server.group: there is no group "nobody-here"'),
        ("server: {socket_group: nobody-here}", 'server.socket_group: there is no group "nobody-here"'),
        (
            "server: {socket_group: -1}",
            "server.socket_group: expected a string or a whole number from 0 to 4294967294, got -1",
        ),
        ("server: {allow_users: root}", "server.allow_users: expected a list, got a string"),
        ("server: {allow_users: [root, 0, nobody-here]}", 'server.allow_users[2]: there is no user "nobody-here"'),
        (
            "server: {allow_groups: [root, 1.5]}",
            "server.allow_groups[1]: expected a string or a whole number from 0 to 4294967294, got 1.5",
        ),
        ("server: {1: 2}", "server.1: expected a name as the key, got a number"),
        ("workers: {count: 0}", "workers.count: expected a whole number from 1 to 1024 or auto, got 0"),
        ("workers: {timeout_secs: 1}", "workers.timeout_secs: expected a number above 1 to 86400, got 1"),
        ("listeners: {path: /x}", "listeners: expected a list, got a mapping"),
        ("listeners: [~]", "listeners[0].path: is missing"),
        ("listeners: [{path: /x, pth: 1}]", "listeners[0].pth: unknown key; did you mean listeners[0].path?"),
        ("listeners: [{path: /x}, {path: /y/../x}]", "listeners[1].path: listeners[0].path is the same path"),
        (
            "{server: {socket_path: /x}, listeners: [{path: /x}]}",
            "listeners[0].path: server.socket_path is the same path",
        ),
        (
            "listeners: [{type: stream}, {path: /x, group: nobody-here}]",
            'listeners[0].path: is missing\nlisteners[1].group: there is no group "nobody-here"',
        ),
        (
            "listeners: [{path: /x, protocol: http}]",
            'listeners[0].protocol: expected one of fdpass, handoff; got "http"',
        ),
        (
            "listeners: [{path: /x, data: {a: 1}}]",
            "listeners[0].data: only a listener with protocol fdpass has data of its own",
        ),
        (
            "listeners: [{path: /x, protocol: fdpass, type: seqpacket}]",
            "listeners[0].type: mod_proxy_fdpass connects to a stream socket; write stream, or leave it out",
        ),
        (
            "listeners: [{path: /x, protocol: fdpass, backend: openai}]",
            "listeners[0].data: openai asks an API, and mod_proxy_fdpass says not what: needs a prompt or messages",
        ),
        (
            "listeners: [{path: /x, protocol: fdpass, data: {prompt: 5}}, {path: /y, protocol: fdpass, data: "
            "{max_tokens: [1]}}, {path: /z, protocol: fdpass, data: {messages: {a: b}}}]",
            "listeners[0].data.prompt: expected a string, got a number\n"
            "listeners[1].data.max_tokens: expected a number, got a list\n"
            "listeners[2].data.messages: expected a list, got a mapping",
        ),
        (
            "listeners: [{path: /x, protocol: fdpass, data: {prompt: x, backend: cohere}}]",
            'listeners[0].data.backend: expected one of mock, typing, openai, anthropic, langgraph; got "cohere"',
        ),
        (
            "listeners: [{path: /x, protocol: fdpass, data: {a: {on: 1}}}, "
            "{path: /y, protocol: fdpass, data: {a: {null: 1}}}]",
            "listeners[0].data: expected a mapping of names to JSON values, got a mapping\n"
            "listeners[1].data: expected a mapping of names to JSON values, got a mapping",
        ),
        (
            "listeners: [{path: /x, data: {a: {1.5: .nan}}}]",
            "listeners[0].data: expected a mapping of names to JSON values, got a mapping",
        ),
        (
            "listeners: [{path: /x, backend: cohere}]",
            'listeners[0].backend: expected one of mock, typing, openai, anthropic, langgraph; got "cohere"',
        ),
        (
            "default_backend: cohere",
            'default_backend: expected one of mock, typing, openai, anthropic, langgraph; got "cohere"',
        ),
        ("default_backend:", "default_backend: expected a string, got null"),
        ("backends: [mock]", "backends: expected a mapping, got a list"),
        (
            "backends: {claude: {provider: pigeon}}",
            f'backends.claude.provider: expected one of {", ".join(PROVIDERS)}; got "pigeon"',
        ),
        (
            "backends: {mock: {provider: [x]}}",
            f"backends.mock.provider: expected one of {', '.join(PROVIDERS)}; got a list",
        ),
        # the name exists, though its provider does not: one fault is enough
        (
            "{default_backend: claude, backends: {claude: {provider: pigeon}}}",
            f'backends.claude.provider: expected one of {", ".join(PROVIDERS)}; got "pigeon"',
        ),
        (
            "backends: {my backend: {provider: mock}}",
            "backends.my backend: a backend's name is made of up to 64 letters, digits, dots, hyphens and underscores",
        ),
        (
            "backends: {typing: {jitter: 2}}",
            "backends.typing.jitter: expected a number from 0 to 1, got 2",
        ),
        (
            "backends: {openai: {http2: {enabled: maybe}}}",
            'backends.openai.http2.enabled: expected one of true, false, force; got "maybe"',
        ),
        (
            "backends: {openai: {api_key: a, api_key_file: /b}}",
            "backends.openai.api_key: there is an api_key_file too; write one of them",
        ),
        (
            "backends: {openai: {events: [usage, cost]}}",
            'backends.openai.events[1]: expected one of finish, reasoning, tool_calls, usage; got "cost"',
        ),
        (
            "backends: {openai: {pass_through: [top_p, stream, prompt]}}",
            'backends.openai.pass_through[1]: "stream" is forkd\'s own to set or to keep\n'
            'backends.openai.pass_through[2]: "prompt" is forkd\'s own to set or to keep',
        ),
        (
            "backends: {anthropic: {pass_through: [model]}, langgraph: {pass_through: [config, input]}}",
            'backends.anthropic.pass_through[0]: "model" is forkd\'s own to set or to keep\n'
            'backends.langgraph.pass_through[1]: "input" is forkd\'s own to set or to keep',
        ),
        (
            "backends: {openai: {attachment_types: [text/*, pdf, 5]}}",
            "backends.openai.attachment_types[2]: expected a string, got 5\n"
            'backends.openai.attachment_types[1]: expected a media type such as image/png, got "pdf"',
        ),
        (
            "backends: {anthropic: {api_version: 'a: b'}}",
            'backends.anthropic.api_version: expected a version such as 2023-06-01, got "a: b"',
        ),
        (
            "backends: {anthropic: {max_tokens: 0}}",
            "backends.anthropic.max_tokens: expected a whole number from 1 to 1000000000, got 0",
        ),
        (
            "backends: {langgraph: {stream_mode: tokens}}",
            "backends.langgraph.stream_mode: expected one of custom, debug, events, messages, messages-tuple, tasks, "
            'updates, values; got "tokens"',
        ),
        (
            "backends: {langgraph: {stream_mode: custom}, b: {provider: langgraph, stream_mode: debug, format: raw}}",
            "backends.langgraph.stream_mode: custom has no text to take out: it needs format: raw",
        ),
        (
            "backends: {langgraph: {usage: no}}",
            "backends.langgraph.usage: unknown key; did you mean backends.openai.usage?",
        ),
        ("backends: {python: {}}", "backends.python.target: is missing"),
        (
            "backends: {own: {provider: python, target: app}}",
            'backends.own.target: expected a module and a function such as "app.chat:answer", got "app"',
        ),
        ("backends: {own: {provider: python, target: 7}}", "backends.own.target: expected a string, got 7"),
        (
            "backends: {own: {provider: python, target: workers.main:run}}",
            "backends.own.target: workers is forkd's own; give your module another name",
        ),
        (
            "backends: {own: {provider: python, target: 'a:f', path: [own, /no, 5]}}",
            "backends.own.path[2]: expected a string, got 5\n"
            'backends.own.path[0]: expected an absolute path, got "own"\n'
            'backends.own.path[1]: there is no directory "/no"',
        ),
        (
            "default_backend: python",
            'default_backend: expected one of mock, typing, openai, anthropic, langgraph; got "python"',
        ),
        ("backends: {own: {provider: exec}}", "backends.own.command: is missing"),
        ("backends: {exec: {}}", "backends.exec.command: is missing"),
        (
            "backends: {own: {provider: exec, command: []}}",
            "backends.own.command: expected a program and its arguments, got nothing",
        ),
        (
            "backends: {own: {provider: exec, command: ./handler.sh}}",
            "backends.own.command: expected a list, got a string",
        ),
        (
            'backends: {own: {provider: exec, command: ["a\\0", 5, ""], directory: "/\\0"}}',
            "backends.own.command[1]: expected a string, got 5\n"
            'backends.own.command[2]: expected a string that is not empty, got ""\n'
            'backends.own.command[0]: expected an argument without NUL, got "a\\u0000"\n'
            'backends.own.directory: expected a path, got "/\\u0000"',
        ),
        (
            "backends: {own: {provider: exec, command: [x], environment: {A: yes, B: [1], HANDOFF_DATA: x, a-b: x}}}",
            "backends.own.environment.A: expected a string (in quotes), got true\n"
            "backends.own.environment.B: expected a string (in quotes), got a list\n"
            "backends.own.environment.HANDOFF_DATA: the names that begin with HANDOFF_ are forkd's own to set\n"
            "backends.own.environment.a-b: a variable's name is made of letters, digits and underscores",
        ),
        (
            "backends: {own: {provider: exec, command: [x], environment: x, pass_environment: [A, a=b]}}",
            'backends.own.environment: expected a mapping of names to JSON values, got "x"\n'
            'backends.own.pass_environment[1]: expected a variable\'s name, got "a=b"',
        ),
        (
            "backends: {own: {provider: exec, command: [x], max_processes: 0, timeout_secs: -1, kill_after_secs: 0}}",
            "backends.own.max_processes: expected a whole number from 1 to 1000000000, got 0\n"
            "backends.own.timeout_secs: expected a number from 0 to 31536000, got -1\n"
            "backends.own.kill_after_secs: expected a number above 0 to 31536000, got 0",
        ),
        ("backends: {openai: {ca_file: /no}}", 'backends.openai.ca_file: "/no": No such file or directory'),
        ("backends: {openai: {ca_file: /}}", 'backends.openai.ca_file: "/": is not a regular file'),
        (
            "backends: {openai: {ca_file: /etc/passwd}}",
            'backends.openai.ca_file: "/etc/passwd": holds no certificates in PEM',
        ),
        ('backends: {openai: {ca_file: "/a\\0"}}', 'backends.openai.ca_file: "/a\\u0000": is not a file name'),
        ("backends: {openai: {api_key_file: /no}}", 'backends.openai.api_key_file: "/no": No such file or directory'),
        ("backends: {openai: {api_key_file: /}}", 'backends.openai.api_key_file: "/": is not a regular file'),
        (
            "backends: {openai: {api_key_file: /dev/null}}",
            'backends.openai.api_key_file: "/dev/null": is not a regular file',
        ),
        (
            'backends: {openai: {api_key_file: "/a\\0"}}',
            'backends.openai.api_key_file: "/a\\u0000": is not a file name',
        ),
        (
            "metrics: {listen_addr: localhost}",
            'metrics.listen_addr: expected an address such as 127.0.0.1:9090, got "localhost"',
        ),
        (
            "metrics: {listen_addr: '::1:80'}",
            'metrics.listen_addr: expected an address such as 127.0.0.1:9090, got "::1:80"',
        ),
        (
            "metrics: {listen_addr: 'a:70000'}",
            'metrics.listen_addr: expected an address such as 127.0.0.1:9090, got "a:70000"',
        ),
        ("logging: {level: loud}", 'logging.level: expected one of debug, error, info, warning; got "loud"'),
        ('"a\\nb": 1', '"a\\nb": unknown key'),
        (f"{'x' * 300}: 1", f'"{"x" * 75} …: unknown key'),
    ],
)
def test_faults(load_text: Loader, text: str, fault: str) -> None:
    assert faults(lambda: load_text(text)) == fault.split("\n")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "server: {write_timout_secs: 1}",
            "server.write_timout_secs: unknown key; did you mean server.write_timeout_secs?",
        ),
        ("socket_path: /x", "socket_path: unknown key; did you mean server.socket_path?"),
        (
            "server: {default_model: x}",
            "server.default_model: unknown key; did you mean backends.openai.default_model?",
        ),
        (
            "backends: {openai: {keep_alive_timeout_secs: 1}}",
            "backends.openai.keep_alive_timeout_secs: unknown key; "
            "did you mean backends.openai.http2.keep_alive_timeout_secs?",
        ),
        (
            "listeners: [{path: /x, socket_mode: 0660}]",
            "listeners[0].socket_mode: unknown key; did you mean listeners[0].mode?",
        ),
        ("backends: {mock: {jitter: 1}}", "backends.mock.jitter: unknown key; did you mean backends.typing.jitter?"),
        (
            "backends: {mock: {default_model: x}}",
            "backends.mock.default_model: unknown key; did you mean backends.openai.default_model?",
        ),
        (
            "backends: {openai: {provider: mock, retries: 2}}",
            "backends.openai.retries: unknown key; this provider has no such key",
        ),
        ("server: {zzz: 1}", "server.zzz: unknown key"),
        # the reference's names
        (
            "server: {handoff_buffer_size: 65536}",
            "server.handoff_buffer_size: unknown key; forkd has no need of it, remove it",
        ),
        (
            "server: {backend_timeout_secs: 30}",
            "server.backend_timeout_secs: unknown key; forkd's name is backends.openai.first_byte_timeout_secs",
        ),
        ("backend: {provider: mock}", "backend.provider: unknown key; forkd's name is default_backend"),
        (
            "backend: {timeout_secs: 9}",
            "backend.timeout_secs: unknown key; forkd's name is backends.openai.idle_timeout_secs",
        ),
        (
            "backend: {openai: {http2: {enabled: no}}}",
            "backend.openai.http2.enabled: unknown key; forkd's name is backends.openai.http2.enabled",
        ),
        ("backend: openai", "backend: unknown key; did you mean backends?"),
        (
            "backends: {groq: {provider: openai, pool_max_idle_per_host: 3}}",
            "backends.groq.pool_max_idle_per_host: unknown key; forkd's name is backends.groq.pool_max_idle",
        ),
        (
            "backends: {openai: {http2: {adaptive_window: yes}}}",
            "backends.openai.http2.adaptive_window: unknown key; forkd has no need of it, remove it",
        ),
    ],
)
def test_an_unknown_key_and_the_one_that_was_meant(load_text: Loader, text: str, fault: str) -> None:
    assert faults(lambda: load_text(text)) == [fault]


def test_the_references_whole_file_is_answered_key_by_key(load_text: Loader) -> None:
    text = """
backend:
  provider: mock
  default_model: gpt-4o
  timeout_secs: 120
  openai:
    api_base: https://api.openai.com/v1
    pool_max_idle_per_host: 100
    insecure_ssl: false
    http2: {enabled: true, initial_stream_window_kb: 1024, adaptive_window: true, keep_alive_interval_secs: 10}
"""
    found = faults(lambda: load_text(text))
    assert len(found) == 10
    for fault in found:
        key, _, answer = fault.partition(": unknown key; ")
        assert answer == (
            f"forkd's name is {new}" if (new := REFERENCE_KEYS[key]) else "forkd has no need of it, remove it"
        )


def test_what_the_reference_is_told_exists() -> None:
    assert {new for new in REFERENCE_KEYS.values() if new} <= set(known_keys())
    assert set(ENVIRONMENT.values()) <= set(known_keys())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("listeners: [{path: /x, protocol: fdpass}]", "listeners[0].protocol: fdpass is not available in this version"),
        ("listeners: [{path: /x, tls: true}]", "listeners[0].tls: tls is not available in this version"),
        ("default_backend: openai", "default_backend: openai is not available in this version"),
        (
            "{default_backend: groq, backends: {groq: {provider: openai}}}",
            "default_backend: openai (the provider of groq) is not available in this version",
        ),
        ("listeners: [{path: /x, backend: openai}]", "listeners[0].backend: openai is not available in this version"),
    ],
)
def test_what_this_version_cannot_do_yet(
    load_text: Loader, text: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "AVAILABLE_PROVIDERS", frozenset({"mock", "typing"}))
    monkeypatch.setattr(config, "AVAILABLE_PROTOCOLS", frozenset({"handoff"}))
    monkeypatch.setattr(config, "UNAVAILABLE_LISTENER_KEYS", ("tls",))
    assert faults(lambda: load_text(text)) == [fault]
    monkeypatch.setattr(config, "AVAILABLE_PROVIDERS", frozenset({"mock", "typing", "openai"}))
    monkeypatch.setattr(config, "AVAILABLE_PROTOCOLS", frozenset({"handoff", "fdpass"}))
    monkeypatch.setattr(config, "UNAVAILABLE_LISTENER_KEYS", ())
    load_text(text)


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("protocol: fdpass", "stream"),
        ("protocol: fdpass, type: stream", "stream"),
        ("type: stream", "stream"),
        ("type: seqpacket", "seqpacket"),
        ("protocol: handoff", "seqpacket"),
    ],
)
def test_a_listeners_type_is_its_protocols_own(load_text: Loader, written: str, kind: str) -> None:
    (listener,) = load_text(f"listeners: [{{path: /x, {written}}}]").settings.listeners
    assert listener.socket_type == kind


def test_what_a_listener_asks_in_its_senders_place(load_text: Loader) -> None:
    for question in ("prompt: x", "messages: [{role: user, content: x}]"):
        load_text(f"listeners: [{{path: /x, protocol: fdpass, backend: openai, data: {{{question}}}}}]")
    load_text(
        "{default_backend: langgraph, listeners: [{path: /x, protocol: fdpass, data: {langgraph_input: {a: 1}}}]}"
    )
    load_text("listeners: [{path: /x, protocol: fdpass, backend: typing}]")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x00\xff\xfe", "is not text in UTF-8 (byte 1)"),
        ("just a sentence", "expected a mapping of settings, got a string"),
        ("- a\n- list\n", "expected a mapping of settings, got a list"),
        ("a: &x [1]\nb: *x", "line 2: aliases (*name) are not accepted"),
        ("server: {a: [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}", "line 1: nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_fault(load_text: Loader, tmp_path: Path, content: str, why: str) -> None:
    assert faults(lambda: load_text(content)) == [f"{tmp_path}/forkd.yaml: {why}"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert faults(lambda: load(str(tmp_path), {}, {})) == [f"{tmp_path}: Is a directory"]
    assert faults(lambda: load(f"{tmp_path}/no", {}, {})) == [f"{tmp_path}/no: No such file or directory"]
    assert faults(lambda: load("a\nb", {}, {})) == ['"a\\nb": No such file or directory']


# Values that are more than they seem ---------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ['"0660"', "0660", "660", '"660"', "0o660", '"0o660"', "432"])
def test_a_socket_mode_is_meant_octal(load_text: Loader, written: str) -> None:
    mode = load_text(f"server: {{socket_mode: {written}}}").settings.server.socket_mode
    assert mode == 0o660
    assert repr(mode) == f"{mode}" == "0o660"
    assert isinstance(mode, int)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o660, 0o666, 0o700, 0o750, 0o755, 0o770, 0o777])
def test_every_way_to_write_a_mode(mode: int) -> None:
    for written in (f"{mode:o}", f"0{mode:o}", f"0o{mode:o}", int(f"{mode:o}"), mode):
        assert FileMode.parse(written) == mode


@pytest.mark.parametrize(
    "written",
    ['""', "rw", "0680", "680", "999", "0111", "0o1777", "1777", "7777", "-0660", "-432", "660.0", "yes", "~", "[]"],
)
def test_what_is_no_mode(load_text: Loader, written: str) -> None:
    (fault,) = faults(lambda: load_text(f"server: {{socket_mode: {written}}}"))
    assert fault.startswith('server.socket_mode: expected a file mode such as "0660"')


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("true", True),
        ("'True'", True),
        ("1", True),
        ("'0'", False),
        ("off", False),
        ("force", "force"),
        ("FORCE", "force"),
    ],
)
def test_http2_enabled(load_text: Loader, written: str, meant: object) -> None:
    backend = load_text(f"backends: {{openai: {{http2: {{enabled: {written}}}}}}}").settings.backends["openai"]
    assert isinstance(backend, HttpBackend)
    assert backend.http2.enabled is meant or backend.http2.enabled == meant


def test_backends_of_ones_own(load_text: Loader) -> None:
    settings = load_text(
        "default_backend: slow\nbackends:\n  slow: {provider: Typing, token_delay_ms: '200'}\n"
        "  gpt-4.1: {provider: openai, default_model: gpt-4.1}\n  mock: {provider: typing}\n"
    ).settings
    assert settings.backends == {
        "mock": TypingBackend(),
        "typing": TypingBackend(),
        "openai": OpenAiBackend(),
        "anthropic": AnthropicBackend(),
        "langgraph": LangGraphBackend(),
        "slow": TypingBackend(token_delay_ms=200),
        "gpt-4.1": OpenAiBackend(default_model="gpt-4.1"),
    }


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("127.0.0.1:9090", ("127.0.0.1", 9090)),
        ("[::1]:0", ("::1", 0)),
        (":80", ("", 80)),
        ("host:65535", ("host", 65535)),
    ],
)
def test_addresses(load_text: Loader, written: str, address: tuple[str, int]) -> None:
    assert parse_address(load_text(f"metrics: {{listen_addr: '{written}'}}").settings.metrics.listen_addr) == address


# Secrets -------------------------------------------------------------------------------------------------------------

SECRET = "sk-do-not-print-me"  # noqa: S105 (it is none)


def test_a_key_is_kept_but_not_shown(load_text: Loader) -> None:
    loaded = load_text(f"backends: {{mine: {{provider: openai, api_key: {SECRET}}}}}", {"OPENAI_API_KEY": SECRET})
    for name in ("mine", "openai"):
        backend = loaded.settings.backends[name]
        assert isinstance(backend, HttpBackend)
        assert backend.api_key is not None
        assert backend.api_key.reveal() == SECRET
        assert copy.deepcopy(backend) == pickle.loads(pickle.dumps(backend)) == backend
    for shown in (repr(loaded), str(loaded.settings), f"{loaded.settings}", f"{Secret(SECRET)} {Secret(SECRET)!r}"):
        assert SECRET not in shown
    with pytest.raises(TypeError):
        msgspec.json.encode(loaded.settings)


def test_the_environments_key_wins_over_the_files(load_text: Loader) -> None:
    backend = load_text("backends: {openai: {api_key_file: /k}}", {"OPENAI_API_KEY": SECRET}).settings.backends[
        "openai"
    ]
    assert isinstance(backend, HttpBackend)
    assert backend.api_key == Secret(SECRET)


def test_a_key_in_a_file(load_text: Loader, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    text = (
        f"backends: {{anthropic: {{api_key_file: {key_file}}}, mine: {{provider: openai, api_key_file: {key_file}}}}}"
    )
    for content in (SECRET, f"{SECRET}\n", f" {SECRET}\r\n"):
        key_file.write_text(content)
        loaded = load_text(text)
        for name in ("anthropic", "mine"):
            assert at(loaded.settings, f"backends.{name}.api_key") == Secret(SECRET)
            assert at(loaded.settings, f"backends.{name}.api_key_file") == str(key_file)
        assert SECRET not in repr(loaded)
    key_file.write_text("sk-another")
    assert at(load_text(text).settings, "backends.mine.api_key").reveal() == "sk-another", "a reload reads it again"
    assert at(load_text(text, {"ANTHROPIC_API_KEY": "e"}).settings, "backends.anthropic.api_key") == Secret("e")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (f"{SECRET}ä".encode(), "expected a string of printable ASCII characters, got other characters"),
        (f"{SECRET}\n{SECRET}".encode(), "expected a string of printable ASCII characters, got other characters"),
        (SECRET.encode() + b"\xff", "expected a string of printable ASCII characters, got other characters"),
        (SECRET.encode() * 10_000, "is too large for a key"),
    ],
)
def test_files_without_a_key(load_text: Loader, tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "key").write_bytes(content)
    text = f"backends: {{mine: {{provider: openai, api_key_file: {tmp_path}/key}}}}"
    assert faults(lambda: load_text(text)) == [f'backends.mine.api_key_file: "{tmp_path}/key": {why}']


def test_a_key_file_that_is_a_fifo_holds_nothing_up(load_text: Loader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    for key in ("api_key_file", "ca_file"):
        (fault,) = faults(lambda key=key: load_text(f"backends: {{openai: {{{key}: {tmp_path}/key}}}}"))
        assert fault == f'backends.openai.{key}: "{tmp_path}/key": is not a regular file'


def test_certificates_of_ones_own(load_text: Loader, tmp_path: Path) -> None:
    system = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    if not os.path.exists(system):
        pytest.skip("this machine has no certificates")
    settings = load_text(f"backends: {{openai: {{ca_file: {system}}}}}").settings
    assert at(settings, "backends.openai.ca_file") == system


def test_what_pass_through_may_not_name() -> None:
    assert set(HandoffData.__struct_fields__) == HANDOFF_KEYS
    for kind in (OpenAiBackend, AnthropicBackend, LangGraphBackend):
        assert kind.reserved_keys >= HANDOFF_KEYS


@pytest.mark.parametrize(
    "text",
    [
        f"backends: {{openai: {{api_key: [{SECRET}]}}}}",
        f"backends: {{openai: {{api_key: {{{SECRET}: 1}}}}}}",
        f'backends: {{openai: {{api_key: "{SECRET}\\r\\nX: y"}}}}',
        f'backends: {{openai: {{api_key: "{SECRET}ä"}}}}',
        f"backends: {{openai: {SECRET}}}",
        f"backends: {{openai: [api_key, {SECRET}]}}",
        f"backends: {{openai: {{api_kye: {SECRET}}}}}",
        f"backend: {{openai: {{api_key: {SECRET}}}}}",
        f"openai_api_key: {SECRET}",
        f'backends: {{openai: {{api_base: "https://me:{SECRET}@example.org/"}}}}',
        f'backends: {{openai: {{api_base: "https://example.org/?key={SECRET}"}}}}',
        f'backends: {{openai: {{api_base: "https://{SECRET}@[x"}}}}',
        f"{SECRET}",
        f"backends: {{openai: {{api_key: '{SECRET}}}}}",
        f"api_key: {SECRET}: {SECRET}",
    ],
)
def test_no_fault_quotes_a_key(load_text: Loader, text: str) -> None:
    assert SECRET not in "\n".join(faults(lambda: load_text(text)))


def test_a_bad_key_in_the_environment_names_the_variable_alone() -> None:
    assert faults(
        lambda: load(None, {"OPENAI_API_KEY": SECRET + "\nX: y", "OPENAI_API_BASE": f"ftp://{SECRET}"}, {})
    ) == [
        "OPENAI_API_KEY: expected a string of printable ASCII characters, got other characters",
        "OPENAI_API_BASE: expected a URL such as https://api.openai.com/v1, without user, query or fragment",
    ]


@pytest.mark.parametrize(
    "url",
    [
        *("x", "ftp://x", "http://", "https:///v1", "http://x:port", "http://x:0", "http://[::1", "http://x#y"),
        *("http://x/v 1", "http://x y/", "https://ex\u00e4mple.org/v1", "http://x/v\u00e9"),
    ],
)
def test_what_is_no_api_base(load_text: Loader, url: str) -> None:
    (fault,) = faults(lambda: load_text(f"backends: {{openai: {{api_base: '{url}'}}}}"))
    assert fault.startswith("backends.openai.api_base: expected a URL such as")


# Whatever people write -----------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=5),
    st.sampled_from(["auto", "force", "/x", "0660", "mock", "typing", "openai", "yes", "1e9", "nan", "-1"]),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | st.integers(), inner, max_size=4)
    ),
    max_leaves=8,
)
paths = st.sampled_from(
    [*known_keys(), *REFERENCE_KEYS, "server", "backends", "listeners", "backends.openai", "backends.x"]
)


def nested(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Dotted keys as the mapping of mappings that a file holds; what does not fit is left out."""
    root: dict[str, Any] = {}
    for key, value in pairs:
        where: Any = root
        *sections, last = key.split(".")
        for section in sections:
            if section == "listeners[]":
                items = where.setdefault("listeners", [{}])
                where = items[0] if isinstance(items, list) and items else None
            else:
                where = where.setdefault(section, {})
            if not isinstance(where, dict):
                break
        else:
            where.setdefault(last, value)
    return root


def loads_or_is_refused(path: Path, environ: Mapping[str, str], overrides: Mapping[str, object]) -> None:
    try:
        loaded = load(str(path), environ, overrides)
    except ConfigError as error:
        refusal = error
    else:
        repr(loaded).encode()
        assert len(loaded.settings.all_listeners()) == 1 + len(loaded.settings.listeners)
        return
    assert refusal.faults
    assert all(fault and fault.isprintable() and len(fault) < 1000 for fault in refusal.faults)
    str(refusal).encode()


garbage = hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@garbage
@given(data=values)
@example(data={"server": {"socket_path": float("nan")}, "backends": {"": {"": None}}})
def test_any_data_loads_or_is_refused(tmp_path: Path, data: object) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    loads_or_is_refused(path, {}, {})


@garbage
@given(
    pairs=st.lists(st.tuples(paths, values), max_size=6),
    environ=st.dictionaries(st.sampled_from([*ENVIRONMENT, "RUST_LOG"]), st.text(max_size=20), max_size=4),
    overrides=st.dictionaries(paths, values, max_size=2),
)
def test_any_value_of_any_key_loads_or_is_refused(
    tmp_path: Path, pairs: list[tuple[str, object]], environ: dict[str, str], overrides: dict[str, object]
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(nested(pairs)), encoding="utf-8", errors="surrogatepass")
    loads_or_is_refused(path, environ, overrides)


# The papers agree with the code --------------------------------------------------------------------------------------


def test_the_example_file_is_the_defaults_and_names_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grp, "getgrnam", lambda name: None)  # www-data need not exist here
    monkeypatch.setattr(pwd, "getpwnam", lambda name: None)
    example_file = ROOT / "etc" / "forkd.yaml"
    loaded = load(str(example_file), {}, {})
    assert loaded == (Settings(server=Server(socket_group="www-data", user="forkd")), [])
    text = example_file.read_text()
    missing = [key for key in known_keys() if not re.search(rf"^[# -]*{key.rpartition('.')[2]}:", text, re.MULTILINE)]
    assert missing == []


def test_the_documentation_has_every_key() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == documented(page), "run .venv/bin/python -m tests.forkd.test_config"


def documented(page: str) -> str:
    """The page with its tables made anew from the Structs."""
    for mark, table in (("tables", key_tables()), ("renamed", renamed_table())):
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        before, _, rest = page.partition(begin)
        page = before + begin + table + end + rest.partition(end)[2]
    return page


def renamed_table() -> str:
    rows = [(old, new) for old, new in REFERENCE_KEYS.items() if old != new]
    lines = [f"| `{old}` | {f'`{new}`' if new else 'gone: remove it'} |\n" for old, new in rows]
    return "".join(["| There | Here |\n", "|---|---|\n", *lines])


def is_as_for_openai(key: str) -> bool:
    """Whether another HTTP backend has this key just as openai has it."""
    for name in ("anthropic", "langgraph"):
        twin = known_keys().get(key.replace(f"backends.{name}.", "backends.openai."))
        here = known_keys()[key]
        if key.startswith(f"backends.{name}.") and twin is not None:
            return (twin.type, twin.default) == (here.type, here.default)
    return False


def key_tables() -> str:
    variables = {key: variable for variable, key in ENVIRONMENT.items()}
    lines: list[str] = []
    section = None
    sections = ["", *dict.fromkeys(key.rpartition(".")[0] for key in known_keys())]  # the top level first
    for key, field in sorted(known_keys().items(), key=lambda item: sections.index(item[0].rpartition(".")[0])):
        if is_as_for_openai(key) and key not in variables:
            continue
        if (parent := key.rpartition(".")[0]) != section:
            section = parent
            lines += [f"\n### {f'`{section}`' if section else 'The top level'}\n"]
            if section in ("backends.anthropic", "backends.langgraph"):
                lacking = set(OpenAiBackend.__struct_fields__) - set(PROVIDERS[section[9:]].__struct_fields__)
                lines += [f"And every key of `openai` but {' and '.join(f'`{name}`' for name in sorted(lacking))}.\n"]
            lines += ["| Key | Type | Default | Environment | Meaning |", "|---|---|---|---|---|"]
        meaning = next(
            part.description for part in get_args(field.type) if isinstance(part, msgspec.Meta) and part.description
        )
        variable = f"`{variables[key]}`" if key in variables else ""
        lines.append(
            f"| `{key.rpartition('.')[2]}` | {in_words(field.type)} | {default(key, field)} | {variable} | {meaning} |"
        )
    return "\n".join(lines) + "\n\n"


def default(key: str, field: msgspec.structs.FieldInfo) -> str:
    if key == "server.socket_path":
        return "see there"
    if field.name == "text":
        return "a sentence"
    if field.default is NODEFAULT:
        return "required"
    if isinstance(field.default, FileMode):
        return f'`"{int(field.default):04o}"`'
    if isinstance(field.default, tuple):
        return f"`[{', '.join(field.default)}]`"
    return f"`{msgspec.json.encode(field.default).decode()}`".replace('"', "")


def in_words(annotation: Any) -> str:
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if get_origin(plain) is tuple:
        return f"list of: {in_words(get_args(plain)[0])}"
    return words_of(inspect.type_info(annotation))


def words_of(kind: inspect.Type) -> str:
    match kind:
        case inspect.Metadata(type=inner):
            return words_of(inner)
        case inspect.UnionType(types=types) if {type(inner) for inner in types} >= {inspect.StrType, inspect.IntType}:
            return "name or number" + (" or null" if inspect.NoneType() in types else "")
        case inspect.UnionType(types=types):
            return " or ".join(words_of(inner) for inner in types)
        case inspect.IntType(ge=low, gt=above, le=high) | inspect.FloatType(ge=low, gt=above, le=high):
            noun = "whole number" if isinstance(kind, inspect.IntType) else "number"
            limit = f"{low:g} or more" if low is not None else f"above {above:g}"
            # The bounds that are only there against overflows are of no interest to a reader.
            return f"{noun}, {limit}" + (f", up to {high:.15g}" if high not in (1_000_000_000, 31_536_000) else "")
        case inspect.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case inspect.CustomType(cls=custom):
            return {FileMode: "file mode", Secret: "secret"}[custom]
    names = {inspect.BoolType: "true or false", inspect.StrType: "string", inspect.NoneType: "null"}
    return names.get(type(kind), "mapping")


if __name__ == "__main__":
    document = ROOT / "docs" / "configuration.md"
    document.write_text(documented(document.read_text()))
