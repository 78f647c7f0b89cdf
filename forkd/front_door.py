"""The demo's front door: a small HTTP server that does Apache's part, for `forkd demo` and tests. Not for production.

It serves the chat page, and answers /stream.php as Apache, mod_socket_handoff and apache/htdocs/stream.php do together:
reads the request, checks it, hands the client's socket and the data to forkd, and is done with it.

Theory of operation. One thread per connection, one request per connection. A connection is *ours* until `sendmsg`
succeeded, *forkd's* from then on:

    ours     every way out answers (or finds the client gone), then closes in order: FIN, read what still comes, close
    forkd's  our copy of the fd is closed and nothing else: a shutdown, or one more byte, would reach forkd's client

What belongs to the request is read and not a byte more: whatever follows it is still in the socket when forkd gets it.
"""

import contextlib
import errno
import ipaddress
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from typing import Any, Final
from urllib.parse import parse_qs, unquote

import msgspec

from forkd import sender

ENDPOINT: Final = "/stream.php"
MAX_HEAD_BYTES: Final = 16384
MAX_LINE_BYTES: Final = 8190
"""Of the request line, as Apache's LimitRequestLine."""
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
MAX_DATA_BYTES: Final = 1024 * 1024
"""As SocketHandoffMaxData; percent-encoding makes a form up to three times as long."""
REQUEST_TIMEOUT_SECS: Final = 15.0
HANDOFF_TIMEOUT_SECS: Final = 2.0
LINGER_SECS: Final = 2.0
MAX_THREADS: Final = 64
FORWARDED: Final = ("traceparent", "last-event-id", "accept-language")
"""Request headers that go into the envelope, as SocketHandoffRequestHeaders by default."""

_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (\S+) HTTP/1\.([01])")
_TARGET = re.compile(r"(?:https?://[^/?#]+(?=[/?#]|$)|(?=/))([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.IGNORECASE)
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_REQUEST_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
_VISITOR = re.compile(r"[0-9a-f]{16}")
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class Refusal(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: HTTPStatus, code: str, text: str, **fields: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        self.fields = {name.replace("_", "-"): value for name, value in fields.items()}


class ClientGone(Exception):
    """The client closed the connection, or stopped sending, before there was a request to answer."""


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request. Header names are in lower case; a repeated one is joined by commas (RFC 9110, 5.2)."""

    method: str
    target: str
    path: str
    query: str
    protocol: str
    headers: Mapping[str, str]
    request_id: str


def static_files() -> dict[str, tuple[str, bytes]]:
    """The page's files by path: (content type, content). They are packaged as forkd/htdocs."""
    files = {}
    for entry in resources.files("forkd").joinpath("htdocs").iterdir():
        content_type = _TYPES.get(os.path.splitext(entry.name)[1])
        if content_type:
            files[f"/{entry.name}"] = content_type, entry.read_bytes()
    files["/"] = files["/index.html"]
    return files


def parse_head(head: bytes) -> Request:
    """A request's head, blank line included. Raises Refusal with 400, 414 or 505 (RFC 9112, 2 to 5)."""
    first, *lines = head.decode("utf-8", "replace").removesuffix("\r\n\r\n").split("\r\n")
    if len(first) > MAX_LINE_BYTES:
        raise _uri_too_long()
    found = _REQUEST_LINE.fullmatch(first)
    if not found:
        if re.fullmatch(r"\S+ \S+ HTTP/(?!1\.)\d\.\d", first):
            raise Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "bad_request", "This server speaks HTTP/1")
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "The request line is not valid")
    headers: dict[str, str] = {}
    for line in lines:
        name_value = _FIELD.fullmatch(line)
        if not name_value:
            raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "A header line is not valid")
        name, value = name_value[1].lower(), name_value[2]
        if name in ("host", "content-length") and name in headers:
            raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", f"More than one {name}")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    method, target, minor = found.groups()
    place = _TARGET.fullmatch(target)
    if not place:
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "The request target is not valid")
    if minor == "1" and "host" not in headers:
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "The Host header is missing")
    offered = headers.get("x-request-id", "")
    request_id = offered if _REQUEST_ID.fullmatch(offered) else secrets.token_hex(8)
    return Request(method, target, unquote(place[1]) or "/", place[2] or "", f"HTTP/1.{minor}", headers, request_id)


def body_length(request: Request) -> int:
    """How long the body will be. Raises Refusal with 400, 411 or 413."""
    if "transfer-encoding" in request.headers:
        raise Refusal(HTTPStatus.LENGTH_REQUIRED, "length_required", "Send the body with a Content-Length")
    length = request.headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "The Content-Length is not valid")
    if int(length) > MAX_BODY_BYTES:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "payload_too_large", "The request is too large")
    return int(length)


def handoff_data(request: Request, body: bytes, user_id: str) -> bytes:
    """What apache/htdocs/stream.php makes of a request: the handoff data as JSON. Raises Refusal."""
    given = _input(request, body)
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise Refusal(HTTPStatus.BAD_REQUEST, "no_prompt", "Please enter a prompt")
    data: dict[str, Any] = {"prompt": prompt, "user_id": user_id}
    messages = _conversation(given.get("messages"))
    if messages:
        data["messages"] = messages
    encoded = msgspec.json.encode(data)
    if len(encoded) > MAX_DATA_BYTES:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "payload_too_large", "The handoff data is too large")
    return encoded


def _input(request: Request, body: bytes) -> dict[str, Any]:
    if request.method == "GET":
        return _form(request.query)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/x-www-form-urlencoded":
        return _form(body.decode("utf-8", "replace"))
    if content_type != "application/json":
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "bad_request", "Send a form (urlencoded) or JSON")
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "The body is not a JSON object") from error


def _form(text: str) -> dict[str, str]:
    """Of a repeated name the last, as PHP has it."""
    try:
        fields = parse_qs(text, keep_blank_values=True, errors="replace", max_num_fields=100)
    except ValueError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "The form is not valid") from error
    return {name: values[-1] for name, values in fields.items()}


def _conversation(messages: object) -> list[dict[str, str]]:
    """The conversation so far; in a form it is JSON. The page says who spoke, but never what the system prompt is."""
    if messages in (None, ""):
        return []
    if isinstance(messages, str):
        try:
            messages = msgspec.json.decode(messages)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            messages = None
    if not isinstance(messages, list):
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "The messages are not a list")
    checked = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ("user", "assistant") or not isinstance(content, str):
            raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "A message has no role or no content")
        checked.append({"role": role, "content": content})
    return checked


class Connection:
    """One client. Owns `sock` until `close` or `let_go`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._deadline = time.monotonic() + REQUEST_TIMEOUT_SECS

    def _receive(self, most: int, flags: int = 0) -> bytes:
        self.sock.settimeout(max(0.001, self._deadline - time.monotonic()))
        try:
            data = self.sock.recv(most, flags)
        except TimeoutError as error:
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "The request took too long") from error
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ClientGone
        return data

    def read_head(self) -> bytes:
        """Up to the blank line, which is looked for in a peek, so that nothing behind it is read."""
        head = b""
        while True:
            try:
                seen = head + self._receive(MAX_HEAD_BYTES, socket.MSG_PEEK)
            except Refusal as refusal:
                if not head:  # browsers open connections in advance and may never use them
                    raise ClientGone from refusal
                raise
            end = seen.find(b"\r\n\r\n")
            wanted = len(seen) if end < 0 else end + 4
            if wanted > MAX_HEAD_BYTES:
                if b"\r\n" not in seen[: MAX_LINE_BYTES + 2]:
                    raise _uri_too_long()
                raise Refusal(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", "The headers are too large"
                )
            while len(head) < wanted:
                head += self._receive(wanted - len(head))
            if end >= 0:
                return head

    def read_body(self, length: int) -> bytes:
        """Exactly `length` bytes."""
        body = bytearray()
        while len(body) < length:
            body += self._receive(min(length - len(body), 65536))
        return bytes(body)

    def send(self, data: bytes) -> None:
        """All of `data`; raises ClientGone."""
        try:
            self.sock.settimeout(REQUEST_TIMEOUT_SECS)
            self.sock.sendall(data)
        except OSError as error:
            raise ClientGone from error

    def let_go(self) -> None:
        """Close our copy of a socket that is forkd's now."""
        self.sock.close()

    def close(self) -> None:
        """Close in order: closing with bytes unread sends an RST, which can destroy the answer on its way."""
        deadline = time.monotonic() + LINGER_SECS
        try:
            self.sock.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.sock.settimeout(left)
                if not self.sock.recv(65536):
                    break
        except OSError:
            pass
        self.sock.close()


class FrontDoor:
    """The server. `start` serves until `close`; `url` says where, `is_local` whether to this machine alone."""

    def __init__(self, host: str, port: int, socket_path: str) -> None:
        """Binds and listens at once; port 0 takes a free one. Raises OSError (socket.gaierror for the host)."""
        self._socket_path = socket_path
        self._files = static_files()
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._room = threading.BoundedSemaphore(MAX_THREADS)
        self.port: int = self._listener.getsockname()[1]
        address = ipaddress.ip_address(self._listener.getsockname()[0])
        self.is_local = address.is_loopback
        if address.is_unspecified:
            host = "localhost"
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._thread = threading.Thread(target=self._accept, name="front door", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def close(self) -> None:
        """Accept no more. Requests that are being read are dropped with the process; handed-off streams go on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RD)  # wakes accept(2), which close alone does not
        if self._thread.is_alive():
            self._thread.join(1.0)  # it may be waiting for one of MAX_THREADS silent clients
        self._listener.close()

    def _accept(self) -> None:
        while True:
            self._room.acquire()
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                self._room.release()
                if error.errno in (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE):
                    time.sleep(0.05)  # the only thing to do about a lack of fds is to wait for some
                    continue
                return
            threading.Thread(target=self._serve, args=(sock, address[0]), daemon=True).start()

    def _serve(self, sock: socket.socket, remote: str) -> None:
        connection = Connection(sock)
        handed_off = False
        try:
            handed_off = self._converse(connection, remote)
        except ClientGone:
            pass
        finally:
            if handed_off:
                connection.let_go()
            else:
                connection.close()
            self._room.release()

    def _converse(self, connection: Connection, remote: str) -> bool:
        """Read and answer one request, whatever it is; True when the client was handed off. Raises ClientGone."""
        request_id = secrets.token_hex(8)
        try:
            request = parse_head(connection.read_head())
            request_id = request.request_id
            return self._answer(connection, request, remote)
        except Refusal as refusal:
            connection.send(_refuse(refusal, request_id))
            return False
        except ClientGone:
            raise
        except Exception:
            bug = Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "Internal error")
            connection.send(_refuse(bug, request_id))
            raise

    def _answer(self, connection: Connection, request: Request, remote: str) -> bool:
        """Answer a request; True when the client was handed off."""
        self._check_origin(request)
        if request.path == ENDPOINT:
            _allow(request, "GET", "POST")
            length = body_length(request)
            if request.headers.get("expect", "").lower() == "100-continue" and length:
                connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = connection.read_body(length)
            user_id, cookies = _visitor(request)
            self._hand_off(connection.sock, request, remote, handoff_data(request, body, user_id), cookies)
            return True
        if request.path not in self._files:
            raise Refusal(HTTPStatus.NOT_FOUND, "not_found", "There is nothing here")
        _allow(request, "GET", "HEAD")
        content_type, content = self._files[request.path]
        fields = {
            "Content-Type": content_type,
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
            "Referrer-Policy": "no-referrer",
        }
        response = _response(HTTPStatus.OK, fields, content)
        connection.send(response[: -len(content)] if request.method == "HEAD" else response)
        return False

    def _check_origin(self, request: Request) -> None:
        """A site the user visits must not reach a server on the user's own machine: it may have a paid model behind it.

        Neither by a request from its page, nor by a name of its own that leads here (DNS rebinding).
        """
        if request.path == ENDPOINT and request.headers.get("sec-fetch-site", "").lower() in (
            "cross-site",
            "same-site",
        ):
            raise Refusal(HTTPStatus.FORBIDDEN, "cross_site", "Requests from other sites are refused")
        if self.is_local and "host" in request.headers and not _is_local(request.headers["host"]):
            raise Refusal(HTTPStatus.MISDIRECTED_REQUEST, "wrong_host", f"Use {self.url}")

    def _hand_off(
        self, client: socket.socket, request: Request, remote: str, data: bytes, response_headers: list[list[str]]
    ) -> None:
        """Give `client` to forkd, whose it is on return; it is still ours when this raises Refusal."""
        envelope = {
            "request": {
                "method": request.method,
                "uri": request.target,
                "host": _host_name(request.headers.get("host", "")),
                "remote_addr": remote,
                "request_id": request.request_id,
                "protocol": request.protocol,
                "headers": {name: request.headers[name] for name in FORWARDED if name in request.headers},
            },
            "response_headers": response_headers,
        }
        try:
            sender.hand_over(self._socket_path, client, envelope, data, HANDOFF_TIMEOUT_SECS)
        except BlockingIOError as error:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "daemon_busy", "The streaming service is busy", Retry_After="1"
            ) from error
        except OSError as error:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "daemon_unavailable",
                "The streaming service is not available",
                Retry_After="2",
            ) from error


def _uri_too_long() -> Refusal:
    return Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "uri_too_long", "The address is too long")


def _allow(request: Request, *methods: str) -> None:
    if request.method not in methods:
        allowed = ", ".join(methods)
        raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed", f"Use {' or '.join(methods)}", Allow=allowed)


def _host_name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    found = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", host)
    return (found[1] or found[2] or "") if found else ""


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine without asking DNS: localhost, or an address."""
    name = _host_name(host).lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _visitor(request: Request) -> tuple[str, list[list[str]]]:
    """Who asks, by a cookie as stream.php's, and the response headers that set it."""
    try:
        cookie = SimpleCookie(request.headers.get("cookie", "")).get("visitor")
    except CookieError:
        cookie = None
    if cookie is not None and _VISITOR.fullmatch(cookie.value):
        return cookie.value, []
    user_id = secrets.token_hex(8)
    return user_id, [["Set-Cookie", f"visitor={user_id}; Path=/; HttpOnly; SameSite=Lax"]]


def _refuse(refusal: Refusal, request_id: str) -> bytes:
    body = msgspec.json.encode({"error": str(refusal), "code": refusal.code, "request_id": request_id})
    fields = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Request-Id": request_id}
    return _response(refusal.status, fields | refusal.fields, body + b"\n")


def _response(status: HTTPStatus, fields: Mapping[str, str], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    lines += ["X-Content-Type-Options: nosniff", f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
