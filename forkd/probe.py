"""Asks a backend's API whether it is there and takes the key, without asking for an answer that costs money.

It goes the way the workers go: no proxy, no redirect, the same certificates, the same Unix socket. What it cannot speak
is HTTP/2, which no API insists on but one behind `http2.enabled: force`. The key goes to nobody but the API, and what
the API says is not repeated, because some quote the key.

    openai      GET api_base/models: the key, and whether the default model is there
    anthropic   GET /v1/models: likewise
    langgraph   POST /assistants/search: the key, and whether the assistant is there
"""

import socket
import ssl
import warnings
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from forkd.finding import Finding, Level
from forkd.settings import AnthropicBackend, HttpBackend, LangGraphBackend, OpenAiBackend

ANSWER_SECS: Final = 10.0
"""The longest wait for an answer; less where `first_byte_timeout_secs` is."""
MAX_BYTES: Final = 16 << 20
_PAGE: Final = 1000
_UNKNOWN_ISSUER: Final = (18, 19, 20, 21)
"""X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT and its like (openssl-verification-options(1))."""
_KEY_VARIABLE: Final = "OPENAI_API_KEY"


def probe(name: str, backend: HttpBackend) -> Finding:
    """Ask one backend. Raises nothing that the network could cause."""
    subject = f"backend {name}"
    place = backend.api_base if backend.api_socket is None else f"{backend.api_base} by {backend.api_socket}"
    try:
        level, text = _ask(name, backend)
    except requests.RequestException as error:
        level, text = _in_words(error, backend)
    except (urllib3.exceptions.LocationParseError, UnicodeError):
        level, text = Level.FAULT, "there can be no such host"
    except urllib3.exceptions.HTTPError:  # while the body is read
        level, text = Level.FAULT, "it breaks off its answer"
    except OSError as error:
        level, text = Level.FAULT, f"cannot be asked: {error.strerror or error}"
    return Finding(level, subject, f"{place}: {text}")


def _ask(name: str, backend: HttpBackend) -> tuple[Level, str]:
    with requests.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
        session.trust_env = False  # no proxies, no .netrc
        session.verify = not backend.insecure_ssl
        adapter = _Adapter(backend)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        method, url, headers, body = _question(backend)
        with session.request(
            method,
            url,
            headers={"User-Agent": "forkd-check", "Accept": "application/json", **headers},
            json=body,
            timeout=(backend.connect_timeout_secs, _patience(backend)),
            allow_redirects=False,
            stream=True,
        ) as response:
            content = response.raw.read(MAX_BYTES, decode_content=True)
            return _judge(name, backend, response.status_code, content)


def _patience(backend: HttpBackend) -> float:
    return min(ANSWER_SECS, backend.first_byte_timeout_secs)


def _question(backend: HttpBackend) -> tuple[str, str, dict[str, str], object]:
    """Method, URL, headers with the key, JSON body."""
    base = backend.api_base.rstrip("/")
    key = backend.api_key.reveal() if backend.api_key is not None else ""
    if isinstance(backend, AnthropicBackend):
        headers = {"anthropic-version": backend.api_version, **({"x-api-key": key} if key else {})}
        return "GET", f"{base.removesuffix('/v1')}/v1/models?limit={_PAGE}", headers, None
    if isinstance(backend, LangGraphBackend):
        search = {"graph_id": backend.assistant_id, "limit": 1}
        return "POST", f"{base}/assistants/search", {"x-api-key": key} if key else {}, search
    return "GET", f"{base}/models", {"Authorization": f"Bearer {key}"} if key else {}, None


def _judge(name: str, backend: HttpBackend, status: int, content: bytes) -> tuple[Level, str]:
    if status in (401, 403):
        if backend.api_key is not None:
            return Level.FAULT, f"the key is refused ({status})"
        hint = f"api_key_file, or {_KEY_VARIABLE}" if name == "openai" else "api_key_file"
        return Level.FAULT, f"it wants a key ({status}), and none is configured: backends.{name}.{hint}"
    if status in (404, 405):
        return Level.WARNING, (
            f"it answers, but keeps no list that would show whether it takes the key ({status}); is the path of "
            "api_base right?"
        )
    if 300 <= status < 400:
        return Level.FAULT, f"it redirects ({status}), which forkd does not follow: write the final address in api_base"
    if status == 429:
        return Level.WARNING, "it answers, and has had enough requests for now (429)"
    if status >= 500:
        return Level.FAULT, f"it answers that it is out of order ({status})"
    if status >= 400:
        return Level.WARNING, f"it answers, but not as expected ({status}); is api_base right?"
    try:
        listed = msgspec.json.decode(content)
    except msgspec.MsgspecError:
        return Level.WARNING, "it answers, but not with JSON; is api_base right?"
    taken = "takes the key" if backend.api_key is not None else "asks for no key"
    missing = _missing(backend, listed)
    return (Level.WARNING, f"it {taken}, but {missing}") if missing else (Level.OK, taken)


def _missing(backend: HttpBackend, listed: Any) -> str:
    """What is configured and not in the list, in words; "" if nothing, or if the list has another form."""
    if isinstance(backend, LangGraphBackend):
        # An assistant is named by its graph or by a UUID, and what is found is by graph.
        is_graph = "-" not in backend.assistant_id
        return f"has no graph {backend.assistant_id!r} (assistant_id)" if listed == [] and is_graph else ""
    if not isinstance(backend, OpenAiBackend | AnthropicBackend):
        return ""
    entries = listed.get("data") if isinstance(listed, Mapping) else None
    if not isinstance(entries, list):
        return ""
    names = [entry["id"] for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("id"), str)]
    wanted = backend.default_model
    # Aliases are not listed: claude-sonnet-4-5 is claude-sonnet-4-5-20250929.
    if not names or any(name == wanted or name.startswith((f"{wanted}-", f"{wanted}:")) for name in names):
        return ""
    return f"does not list the model {wanted!r} (default_model) among its {len(names)}"


def _in_words(error: requests.RequestException, backend: HttpBackend) -> tuple[Level, str]:
    """Why there was no answer. The library's own text is long, and quotes what it was given."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "; name its authority in ca_file" if cause.verify_code in _UNKNOWN_ISSUER else ""
            return Level.FAULT, f"its certificate is not trusted: {cause.verify_message}{hint}"
        if isinstance(cause, ssl.SSLError):
            return Level.FAULT, f"TLS fails: {cause.reason or 'no TLS is spoken there'}"
        if isinstance(cause, socket.gaierror):
            return Level.FAULT, f"cannot find {urlsplit(backend.api_base).hostname}: {cause.strerror}"
        if isinstance(cause, ConnectionRefusedError):
            return Level.FAULT, "nothing listens there (connection refused)"
    if isinstance(error, requests.exceptions.InvalidURL):
        return Level.FAULT, "there can be no such host"
    if isinstance(error, requests.ConnectTimeout):
        return Level.FAULT, f"no connection within {backend.connect_timeout_secs:g} s"
    if isinstance(error, requests.Timeout):
        return Level.FAULT, f"no answer within {_patience(backend):g} s"
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror and cause.errno:
            return Level.FAULT, f"cannot connect: {cause.strerror}"
    if backend.http2.enabled == "force":
        return Level.WARNING, "it answers, but no HTTP/1.1, and the check speaks no HTTP/2 (http2.enabled: force)"
    return Level.FAULT, "it hangs up without an answer in HTTP"


def _causes(error: BaseException) -> list[BaseException]:
    """What led to an error, outermost first."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


class _Adapter(HTTPAdapter):
    """requests, with the certificates that workers trust, and by a Unix socket if there is to be one."""

    def __init__(self, backend: HttpBackend) -> None:
        self._socket = backend.api_socket
        self._context = ssl.create_default_context(cafile=backend.ca_file)
        if backend.insecure_ssl:
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
        super().__init__()

    def get_connection_with_tls_context(
        self, request: requests.PreparedRequest, *_arguments: Any, **_named: Any
    ) -> HTTPConnectionPool:
        url = urlsplit(request.url or "")
        pool: HTTPConnectionPool
        if url.scheme == "https":
            # urllib3 sets the context's own verify_mode by this.
            verify = self._context.verify_mode.name
            pool = HTTPSConnectionPool(url.hostname or "", url.port, ssl_context=self._context, cert_reqs=verify)
        else:
            pool = HTTPConnectionPool(url.hostname or "", url.port)
        if self._socket is not None:
            pool.ConnectionCls = _by_socket(pool.ConnectionCls, self._socket)
        return pool

    def cert_verify(self, *_arguments: Any, **_named: Any) -> None:
        """The context knows; requests would add certificates of its own."""


def _by_socket(kind: Any, path: str) -> Any:
    """A class of connections like `kind` that go to the Unix socket at `path`."""

    class Connection(kind):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            sock = socket.socket(socket.AF_UNIX)
            timeout = self.timeout
            sock.settimeout(timeout if isinstance(timeout, int | float) else None)
            try:
                sock.connect(path)
            except BaseException:
                sock.close()
                raise
            return sock

    return Connection
