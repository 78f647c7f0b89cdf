"""Every setting forkd has: its name, its type, its default and what it means.

The classes mirror the configuration file: a section is a `Struct`, a key is a field of the same name, and the
description of a field is what ``docs/configuration.md`` prints. They are frozen, so a worker or a generation that holds
a `Settings` holds the whole truth of its time; a reload makes a new one.

Nothing here reads a file or looks at the environment, except for the one default that depends on who runs forkd: the
socket path. `forkd.config` builds these from what people write.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from msgspec import Meta, Struct, field, structs

from forkd import cpus

MOCK_TEXT: Final = "Hello! I am forkd's mock backend. Each of these words comes to you as its own server-sent event."

TYPING_TEXT: Final = (
    "Let me think about that for a moment. A model does not answer at an even pace: it hesitates at the start of a "
    "sentence, runs through the easy words, and stops for breath at a comma. That is what you are looking at now, one "
    "small piece at a time, and your browser shows each of them as it arrives. When the last one is here, the stream "
    "ends and the connection closes."
)


class FileMode(int):
    """The permission bits of a socket. An `int`, shown as people write it (``0o660``)."""

    expected: ClassVar[str] = 'a file mode such as "0660" with which the owner may read and write'

    @classmethod
    def parse(cls, written: object) -> "FileMode":
        """Understand a mode as it was meant; ValueError if it is none.

        A string is octal with or without a prefix. A whole number is harder: YAML has read ``0660`` as octal already
        and hands over 432, but gives the number 660 for ``660``. Modes end at 0o777 = 511 and every mode in use begins
        with a 6 or a 7, so a number above 511 can only be the digits, and one up to 511 is the mode itself.
        """
        if isinstance(written, str):
            mode = int(written, 8)
        elif isinstance(written, int) and not isinstance(written, bool):
            mode = written if written <= 0o777 else int(str(written), 8)
        else:
            raise ValueError(cls.expected)
        if not 0 <= mode <= 0o777 or mode & 0o600 != 0o600:
            raise ValueError(cls.expected)
        return cls(mode)

    def __repr__(self) -> str:
        return f"0o{int(self):03o}"


class Secret:
    """A key or password, which shows itself only when asked to by `reveal`."""

    __slots__ = ("_value",)

    expected: ClassVar[str] = "a string of printable ASCII characters"

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def parse(cls, written: object) -> "Secret":
        """Take the text, without the line end that ``echo`` left on it; ValueError if no HTTP header could carry it."""
        text = written.strip() if isinstance(written, str) else ""
        if not (text and text.isascii() and text.isprintable()):
            raise ValueError(cls.expected)
        return cls(text)

    def reveal(self) -> str:
        """The secret itself. Whoever calls this keeps it out of logs, titles and errors."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


def about(text: str) -> Meta:
    """The meaning of a field, as the documentation prints it."""
    return Meta(description=text)


# Every number has an upper bound, so that no later sum, struct or system call can overflow on one.
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000_000)]
PositiveCount: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=31_536_000)]
PositiveSeconds: TypeAlias = Annotated[float, Meta(gt=0, le=31_536_000)]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0, le=3_600_000)]
Text: TypeAlias = Annotated[str, Meta(min_length=1)]
Principal: TypeAlias = Text | Annotated[int, Meta(ge=0, le=0xFFFF_FFFE)]  # a user or group: name or number
SocketType: TypeAlias = Literal["seqpacket", "stream"]


def default_socket_path(environ: Mapping[str, str] | None = None) -> str:
    """Where forkd listens when nobody said: under /run as root, else in the user's own runtime directory."""
    if os.geteuid() == 0:
        return "/run/forkd/forkd.sock"
    runtime_dir = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime_dir):
        return os.path.join(runtime_dir, "forkd", "forkd.sock")
    return f"/tmp/forkd-{os.geteuid()}/forkd.sock"


class Server(Struct, frozen=True, kw_only=True):
    """``server:`` the socket that Apache hands over to, and the limits of every stream."""

    socket_path: Annotated[
        Text,
        about(
            "The Unix socket that Apache hands over to. As root `/run/forkd/forkd.sock`, else "
            "`$XDG_RUNTIME_DIR/forkd/forkd.sock`, else `/tmp/forkd-UID/forkd.sock`"
        ),
    ] = field(default_factory=default_socket_path)
    socket_type: Annotated[SocketType, about("`stream` for senders older than SEQPACKET")] = "seqpacket"
    socket_mode: Annotated[FileMode, about("The socket's permissions: `0660`, `660`, `0o660`, quoted or not")] = (
        FileMode(0o660)
    )
    socket_group: Annotated[Principal | None, about("The socket's group, name or number. null: leave it")] = None
    allow_users: Annotated[
        tuple[Principal, ...],
        about(
            "Users whose processes may hand over (SO_PEERCRED). With `allow_groups`, either is enough. Both empty: "
            "whoever the file mode lets in"
        ),
    ] = ()
    allow_groups: Annotated[tuple[Principal, ...], about("Groups whose processes may hand over (SO_PEERCRED)")] = ()
    max_connections: Annotated[
        PositiveCount, about("Streams at once; more get a 503. Lowered, with a line in the log, to what the fds allow")
    ] = 100_000
    ledger: Annotated[
        bool,
        about("Keep a copy of every client's fd, so that a dead worker's streams are recovered. One fd per stream"),
    ] = True
    queue_size: Annotated[
        Count, about("Handoffs that may wait when no worker has room, for each pool; more get a 503")
    ] = 1024
    queue_timeout_secs: Annotated[Seconds, about("How long one may wait before its 503")] = 5
    max_pending_handoffs: Annotated[PositiveCount, about("Senders that have connected and sent nothing yet")] = 1024
    handoff_timeout_secs: Annotated[PositiveSeconds, about("How long such a sender may stay silent")] = 5
    max_data_bytes: Annotated[Annotated[int, Meta(ge=1, le=1 << 30)], about("The most handoff data accepted")] = 1 << 20
    headers_after_secs: Annotated[
        Seconds, about("Answer 200 and keep the client company while the model is still silent after so long. 0: never")
    ] = 10
    write_timeout_secs: Annotated[PositiveSeconds, about("How long a client may take nothing before it is dropped")] = (
        30
    )
    linger_secs: Annotated[Seconds, about("How long to go on reading after the last byte, so that no RST eats it")] = 2
    heartbeat_secs: Annotated[Seconds, about("A quiet stream gets an SSE comment this often. 0: none")] = 15
    max_stream_duration_secs: Annotated[Seconds, about("The longest a stream may last. 0: no limit")] = 300
    shutdown_timeout_secs: Annotated[Seconds, about("How long TERM lets streams finish")] = 120
    drain_timeout_secs: Annotated[Seconds, about("How long HUP, USR2 and recycling let an old worker's finish")] = 300
    user: Annotated[Principal | None, about("Dropped to after binding, when started as root")] = None
    group: Annotated[Principal | None, about("Likewise. null: the user's own group")] = None
    data_dir: Annotated[Text | None, about("The directory that attachments are read from. null: none")] = None
    max_attachment_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 30)], about("The most that the attachments of one handoff may have together")
    ] = 20 << 20
    attachments_max_age_secs: Annotated[
        Seconds, about("Files in `data_dir` that are older than this were left behind, and are deleted. 0: never")
    ] = 3600


class ListenerSettings(Struct, frozen=True, kw_only=True):
    """One entry of ``listeners:``, and what the ``server:`` section says of its own."""

    path: Annotated[Text, about("The Unix socket. Required")]
    type: Annotated[
        SocketType | None,
        about(
            "As `server.socket_type`. null: what the protocol takes, `seqpacket` for `handoff`, `stream` for `fdpass`"
        ),
    ] = None
    mode: Annotated[FileMode, about("As `server.socket_mode`")] = FileMode(0o660)
    group: Annotated[Principal | None, about("As `server.socket_group`")] = None
    protocol: Annotated[
        Literal["handoff", "fdpass"], about("`handoff`: our Apache module. `fdpass`: Apache's own mod_proxy_fdpass")
    ] = "handoff"
    envelope: Annotated[
        bool, about("Take a payload that begins with SOH for an envelope (`protocol: handoff` only)")
    ] = True
    tls: Annotated[bool, about("Accept clients under TLS")] = False
    backend: Annotated[Text | None, about("The backend for this listener's streams. null: `default_backend`")] = None
    data: Annotated[dict[str, Any] | None, about("The handoff data of an `fdpass` listener, which receives none")] = (
        None
    )
    pool: Annotated[
        Text | None, about("The pool of workers, by its name under `pools`, that serves it. null: those of `workers`")
    ] = None
    allow_users: Annotated[tuple[Principal, ...], about("As `server.allow_users`")] = ()
    allow_groups: Annotated[tuple[Principal, ...], about("As `server.allow_groups`")] = ()

    @property
    def bare(self) -> bool:
        """Its clients have their response head already: what they get from here on is the body, bare."""
        return self.protocol == "fdpass"

    @property
    def socket_type(self) -> SocketType:
        """The type, with the protocol's own where none is written."""
        return self.type or ("stream" if self.bare else "seqpacket")

    @property
    def named_backend(self) -> str | None:
        """The backend that it names, whichever way, if it names one."""
        return (self.data or {}).get("backend") or self.backend

    @property
    def takes_envelopes(self) -> bool:
        """Whether a payload that begins with SOH is an envelope."""
        return self.envelope and not self.bare


class Workers(Struct, frozen=True, kw_only=True):
    """``workers:`` how many, and when one is replaced."""

    count: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | Literal["auto"],
        about("`auto`: one per CPU that the cgroup's quota gives"),
    ] = "auto"
    timeout_secs: Annotated[
        Annotated[float, Meta(gt=1, le=86_400)],
        about("A worker whose heart is silent for so long is killed and replaced"),
    ] = 30
    max_streams: Annotated[Count, about("Recycle a worker after so many streams (with jitter). 0: never")] = 0
    max_rss_mb: Annotated[Count, about("Recycle a worker above so much memory. 0: never")] = 0


COMMON: Final = "common"
"""What the pool of the workers of `workers.count` is called wherever pools are told apart."""
WORKERS_WANTED_MAX: Final = 1024
"""In all pools together."""
POOLS_MAX: Final = 32


class PoolSettings(Struct, frozen=True, kw_only=True):
    """One entry of ``pools:``, workers for the listeners that name it, and for nothing else."""

    count: Annotated[
        Annotated[int, Meta(ge=1, le=1024)], about("How many workers it has. All else is as `workers` says")
    ] = 1


class MockBackend(Struct, frozen=True, kw_only=True):
    """``provider: mock`` says a fixed text, word by word, at an even pace."""

    provider: Annotated[Literal["mock"], about("Which kind of backend this is")] = "mock"
    token_delay_ms: Annotated[Milliseconds, about("Between two words")] = 50
    text: Annotated[str, about("What is said")] = MOCK_TEXT


class TypingBackend(Struct, frozen=True, kw_only=True):
    """``provider: typing`` says a text in small pieces with varying pauses, as a model or a person would."""

    provider: Annotated[Literal["typing"], about("Which kind of backend this is")] = "typing"
    token_delay_ms: Annotated[Milliseconds, about("Between two pieces, on average")] = 30
    jitter: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        about("How far a pause strays from the average. 0: even; 1: from none to twice"),
    ] = 0.5
    text: Annotated[str, about("What is said")] = TYPING_TEXT


class Http2(Struct, frozen=True, kw_only=True):
    """``http2:`` of a backend that speaks HTTP."""

    enabled: Annotated[
        bool | Literal["force"],
        about("`true`: where TLS negotiates it. `force`: also without TLS, by prior knowledge"),
    ] = True
    initial_stream_window_kb: Annotated[
        Annotated[int, Meta(ge=1, le=2_097_151)], about("Flow-control window of a stream")
    ] = 1024
    initial_connection_window_kb: Annotated[
        Annotated[int, Meta(ge=64, le=2_097_151)], about("Flow-control window of a connection")
    ] = 10_240
    max_streams: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)], about("Streams on one connection, or fewer if the server says so")
    ] = 100
    keep_alive_interval_secs: Annotated[Seconds, about("Between two PINGs. 0: none")] = 10
    keep_alive_timeout_secs: Annotated[
        PositiveSeconds, about("A connection without an answer for so long is closed")
    ] = 20


# What the handoff data says to forkd itself: it goes to an API as forkd sees fit, or not at all.
HANDOFF_KEYS: Final = frozenset(
    {
        "prompt",
        "messages",
        "model",
        "system",
        "max_tokens",
        "temperature",
        "user_id",
        "request_id",
        "backend",
        "response_headers",
        "attachments",
        "test_pattern",
        "thread_id",
        "assistant_id",
        "stream_mode",
        "langgraph_input",
    }
)


class HttpBackend(Struct, frozen=True, kw_only=True):
    """What every provider has that relays a stream from an HTTP API."""

    reserved_keys: ClassVar[frozenset[str]] = HANDOFF_KEYS
    """What `pass_through` may not name, since forkd writes it."""

    provider: str
    api_base: Text
    api_key: Annotated[Secret | None, about("The key; better by environment or `api_key_file`")] = None
    api_key_file: Annotated[
        Text | None, about("A file that holds the key. It is read at the start and by a reload")
    ] = None
    api_socket: Annotated[
        Text | None,
        about(
            "A Unix socket to reach it by: HTTP/1.1, or HTTP/2 with `http2.enabled: force`. An `https` address has its "
            "TLS inside of it"
        ),
    ] = None
    connect_timeout_secs: Annotated[PositiveSeconds, about("To connect, TLS included; for each of its addresses")] = 5
    first_byte_timeout_secs: Annotated[
        PositiveSeconds, about("From the request to the first byte, retries included")
    ] = 30
    idle_timeout_secs: Annotated[PositiveSeconds, about("Silence between two bytes of the upstream")] = 120
    retries: Annotated[Annotated[int, Meta(ge=0, le=100)], about("Further attempts before the first byte")] = 2
    format: Annotated[
        Literal["json", "text", "raw"],
        about('`json`: `{"content": …}`. `text`: plain data lines. `raw`: the upstream\'s own events'),
    ] = "json"
    events: Annotated[
        tuple[Literal["reasoning", "tool_calls", "usage", "finish"], ...],
        about("Further events for the client, by these names, where the format is not `raw`"),
    ] = ()
    models: Annotated[
        tuple[Text, ...], about("Models that the metrics count by name, beside the default. Others count as `other`")
    ] = ()
    pass_through: Annotated[
        tuple[Text, ...], about("Further keys of the handoff data that are handed on to the API as they are")
    ] = ()
    attachment_types: Annotated[
        tuple[Text, ...], about("Media types of attachments that are accepted. `text/*` is any text, JSON too")
    ] = ("text/*", "image/png", "image/jpeg", "image/gif", "image/webp", "application/pdf")
    pool_max_idle: Annotated[Count, about("Idle connections kept, in each worker")] = 100
    ca_file: Annotated[
        Text | None, about("A file of certificates (PEM) to trust instead of the system's. null: the system's")
    ] = None
    insecure_ssl: Annotated[bool, about("Do not verify the certificate. For tests")] = False
    http2: Annotated[Http2, about("HTTP/2")] = field(default_factory=Http2)


class OpenAiBackend(HttpBackend, frozen=True, kw_only=True):
    """``provider: openai`` is OpenAI's Chat Completions, and every server that speaks it."""

    reserved_keys: ClassVar[frozenset[str]] = HANDOFF_KEYS | {"stream", "stream_options"}

    provider: Annotated[Literal["openai"], about("Which kind of backend this is")] = "openai"
    api_base: Annotated[Text, about("The API's address, without the part after its version")] = (
        "https://api.openai.com/v1"
    )
    default_model: Annotated[Text, about("The model when the handoff data names none")] = "gpt-4o"
    usage: Annotated[bool, about("Ask for the tokens used (`stream_options`), which some servers do not know")] = True


class AnthropicBackend(HttpBackend, frozen=True, kw_only=True):
    """``provider: anthropic`` is Anthropic's Messages API."""

    reserved_keys: ClassVar[frozenset[str]] = HANDOFF_KEYS | {"stream"}

    provider: Annotated[Literal["anthropic"], about("Which kind of backend this is")] = "anthropic"
    api_base: Annotated[Text, about("The API's address, with or without `/v1` at its end")] = (
        "https://api.anthropic.com"
    )
    default_model: Annotated[Text, about("The model when the handoff data names none")] = "claude-sonnet-4-5"
    max_tokens: Annotated[PositiveCount, about("The longest answer when the handoff data does not say")] = 4096
    api_version: Annotated[Text, about("What `anthropic-version` says")] = "2023-06-01"


StreamMode: TypeAlias = Literal["messages-tuple", "messages", "updates", "values", "custom", "tasks", "debug", "events"]


class LangGraphBackend(HttpBackend, frozen=True, kw_only=True):
    """``provider: langgraph`` is a LangGraph server: its runs, with or without a thread."""

    reserved_keys: ClassVar[frozenset[str]] = HANDOFF_KEYS | {"input"}

    provider: Annotated[Literal["langgraph"], about("Which kind of backend this is")] = "langgraph"
    api_base: Annotated[Text, about("The server's address, without `/threads` or `/runs`")] = "http://127.0.0.1:2024"
    assistant_id: Annotated[Text, about("The assistant, or graph, when the handoff data names none")] = "agent"
    stream_mode: Annotated[
        StreamMode,
        about(
            "What to ask the server for when the handoff data does not say. Unless the format is `raw`, `messages` is "
            "asked for as `messages-tuple` and `values` as `updates`, which say the same without repeating it"
        ),
    ] = "messages-tuple"


class PythonBackend(Struct, frozen=True, kw_only=True):
    """``provider: python`` is a function of your own, which yields the answer: see docs/handlers.md."""

    provider: Annotated[Literal["python"], about("Which kind of backend this is")] = "python"
    target: Annotated[Text, about("`module:function`, a generator or an async generator")]
    path: Annotated[
        tuple[Text, ...], about("Directories to look for modules in, absolute, after all that forkd itself can import")
    ] = ()
    threads: Annotated[
        Annotated[int, Meta(ge=1, le=4096)],
        about("Plain generators that run at once, in each worker. Async ones need none of these"),
    ] = 64
    queue_size: Annotated[Count, about("Streams that may wait for a thread, in each worker; more get a 503")] = 1024
    queue_timeout_secs: Annotated[PositiveSeconds, about("How long one may wait before its 503")] = 5
    idle_timeout_secs: Annotated[PositiveSeconds, about("From one `yield` to the next, the first included")] = 120
    format: Annotated[Literal["json", "text"], about('`json`: `{"content": …}`. `text`: plain data lines')] = "json"


class ExecBackend(Struct, frozen=True, kw_only=True):
    """``provider: exec`` starts a program for each stream and gives it the client's socket."""

    provider: Annotated[Literal["exec"], about("Which kind of backend this is")] = "exec"
    command: Annotated[
        tuple[Text, ...], about("The program and its arguments, a list. No shell looks at it: docs/exec.md. Required")
    ]
    directory: Annotated[
        Text | None, about("Where it runs, and where a relative `command` is looked for. null: where forkd was started")
    ] = None
    environment: Annotated[
        dict[str, Any] | None, about("Variables for it, by name, beside those that every program gets")
    ] = None
    pass_environment: Annotated[
        tuple[Text, ...], about("Variables of forkd's own that are handed on to it, by name; never a key unless named")
    ] = ()
    max_processes: Annotated[
        PositiveCount, about("How many may run at once, in all workers together; more get a 503")
    ] = 64
    timeout_secs: Annotated[Seconds, about("How long it may run before it is ended. 0: no limit of its own")] = 300
    kill_after_secs: Annotated[
        PositiveSeconds, about("How long it may take to end after SIGTERM; then its process group gets SIGKILL")
    ] = 5


Backend: TypeAlias = (
    MockBackend | TypingBackend | OpenAiBackend | AnthropicBackend | LangGraphBackend | PythonBackend | ExecBackend
)

# The kinds of backend that can be configured. Each name is also that of a backend, which exists without being written
# if nothing about it must be (`default_backends`).
PROVIDERS: Final[Mapping[str, type[Backend]]] = {
    "mock": MockBackend,
    "typing": TypingBackend,
    "openai": OpenAiBackend,
    "anthropic": AnthropicBackend,
    "langgraph": LangGraphBackend,
    "python": PythonBackend,
    "exec": ExecBackend,
}


def default_backends() -> dict[str, Backend]:
    """The backends that exist without being written: those of which nothing must be."""
    alone = [name for name, kind in PROVIDERS.items() if not any(key.required for key in structs.fields(kind))]
    return {name: PROVIDERS[name]() for name in alone}  # type: ignore[call-arg] # mypy cannot know what is not required


class Metrics(Struct, frozen=True, kw_only=True):
    """``metrics:`` the Prometheus endpoint."""

    enabled: Annotated[bool, about("Count, and serve `/metrics`, `/healthz`, `/readyz` and `/status`")] = True
    listen_addr: Annotated[Text, about("Where: `HOST:PORT`, `[IPV6]:PORT` or `:PORT`")] = "127.0.0.1:9090"
    dir: Annotated[Text | None, about("Where the metric files live. null: a place of forkd's own")] = None


class Logging(Struct, frozen=True, kw_only=True):
    """``logging:``"""

    level: Annotated[Literal["debug", "info", "warning", "error"], about("The least that is logged")] = "info"
    format: Annotated[Literal["pretty", "json"], about("`json`: one object a line")] = "pretty"
    access: Annotated[bool, about("One line for each finished stream")] = True
    file: Annotated[Text | None, about("Appended to, and reopened on USR1. null: stderr")] = None


class Settings(Struct, frozen=True, kw_only=True):
    """The whole configuration, checked."""

    server: Server = field(default_factory=Server)
    listeners: list[ListenerSettings] = field(default_factory=list)
    workers: Workers = field(default_factory=Workers)
    pools: dict[str, PoolSettings] = field(default_factory=dict)
    default_backend: Annotated[Text, about("The backend of a stream that asks for none, by name")] = "mock"
    backends: dict[str, Backend] = field(default_factory=default_backends)
    metrics: Metrics = field(default_factory=Metrics)
    logging: Logging = field(default_factory=Logging)

    def all_listeners(self) -> list[ListenerSettings]:
        """Every socket to listen on: the server's own first, then ``listeners`` in their order."""
        server = self.server
        own = ListenerSettings(
            path=server.socket_path,
            type=server.socket_type,
            mode=server.socket_mode,
            group=server.socket_group,
            allow_users=server.allow_users,
            allow_groups=server.allow_groups,
        )
        return [own, *self.listeners]

    def pools_of_listeners(self) -> tuple[str, ...]:
        """Which pool serves each of `all_listeners`."""
        return tuple(listener.pool or COMMON for listener in self.all_listeners())


def parse_address(written: str) -> tuple[str, int]:
    """Take ``HOST:PORT`` apart; an empty host is every address. ValueError if it is none.

    >>> parse_address("[::1]:9090")
    ('::1', 9090)
    """
    host, colon, port = written.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or (":" in host) != bracketed or not (port.isascii() and port.isdigit() and int(port) <= 0xFFFF):
        raise ValueError("an address such as 127.0.0.1:9090")
    return host, int(port)


def worker_counts(settings: Settings) -> dict[str, int]:
    """How many workers to run in each pool, the common one first; ``auto`` is resolved for the machine or container as
    it is now.
    """
    count = settings.workers.count
    common = cpus.available() if count == "auto" else count
    return {COMMON: common, **{name: pool.count for name, pool in settings.pools.items()}}
