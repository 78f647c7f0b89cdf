"""Hands a few streams over before the run, to see that the daemon is up and says what it should.

The load generator compares every stream with one body, byte for byte. Where that body comes from a daemon, it comes
from here, read as a browser would read it and checked word by word.
"""

import json
import socket
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path


class TrialError(Exception):
    """The daemon does not come up, or does not say what it was told to."""


def wait_for_listener(path: Path, timeout_secs: float = 15, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> None:
    """Return once something accepts connections at `path`; the daemon is being started, nothing is measured yet."""
    deadline = time.monotonic() + timeout_secs
    while True:
        with socket.socket(socket.AF_UNIX, kind) as probe:
            try:
                probe.connect(str(path))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TrialError(f"{path}: nobody listens: {error}") from error
        time.sleep(0.02)


def hand_over(path: Path, data: bytes) -> socket.socket:
    """Hand one end of a socketpair over; the other, the client's, is the caller's to close."""
    ours, theirs = socket.socketpair()
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(str(path))
            socket.send_fds(connection, [data], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise TrialError(f"{path}: the handoff failed: {error}") from error
    return ours


def read_whole(client: socket.socket, timeout_secs: float) -> bytes:
    """The answer up to EOF, without its head. Closes `client`."""
    with client:
        client.settimeout(timeout_secs)
        answer = bytearray()
        try:
            while chunk := client.recv(65536):
                answer += chunk
        except OSError as error:
            raise TrialError(f"a trial stream broke after {bytes(answer)!r}: {error}") from error
    head, separator, body = bytes(answer).partition(b"\r\n\r\n")
    if not separator or not head.startswith(b"HTTP/1.1 200 "):
        raise TrialError(f"a trial stream is not a 200: {bytes(answer)!r}")
    return body


def try_streams(path: Path, data: bytes, words: list[str], count: int, timeout_secs: float = 30) -> bytes:
    """Hand over `count` streams at once, read them all, and return the body they share.

    Raises TrialError if one differs from another or does not say `words`, one event each, and then `[DONE]`.
    """
    clients = [hand_over(path, data) for _ in range(count)]
    return _common(words, {read_whole(client, timeout_secs) for client in clients})


def try_requests(path: Path, request: bytes, words: list[str], count: int, timeout_secs: float = 30) -> bytes:
    """The same with `request`s of HTTP to a server on a Unix stream socket; the body without its transfer coding."""
    clients = [_ask(path, request, timeout_secs) for _ in range(count)]
    return _common(words, {_read_response(client) for client in clients})


def _ask(path: Path, request: bytes, timeout_secs: float) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(timeout_secs)
    try:
        client.connect(str(path))
        client.sendall(request)
    except OSError as error:
        client.close()
        raise TrialError(f"{path}: cannot ask: {error}") from error
    return client


def _read_response(client: socket.socket) -> bytes:
    with client:
        response = HTTPResponse(client)
        try:
            response.begin()
            body = response.read()
        except (OSError, HTTPException) as error:
            raise TrialError(f"a trial stream broke: {error}") from error
    if response.status != 200:
        raise TrialError(f"a trial stream is not a 200 but {response.status}: {body!r}")
    return body


def _common(words: list[str], bodies: set[bytes]) -> bytes:
    if len(bodies) != 1:
        raise TrialError(f"trial streams differ: {sorted(bodies)!r}")
    body = bodies.pop()
    check_body(body, words)
    return body


def check_body(body: bytes, words: list[str]) -> None:
    """Raise TrialError unless the body is one `content` event per word, in order, then `[DONE]`."""
    events = [event for event in body.decode().split("\n\n") if event]
    said = [event.removeprefix("data: ") for event in events[: len(words) + 1]]
    try:
        contents = [json.loads(event)["content"].strip() for event in said[:-1]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrialError(f"a trial stream has other events: {body!r}") from error
    if contents != words or said[-1] != "[DONE]":
        raise TrialError(f"a trial stream says something else: {body!r}")
