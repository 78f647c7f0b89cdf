"""`forkd send`: one handoff from the terminal, and its answer, printed as it streams.

It does Apache's part and the browser's: hands one end of a socket pair over, as the module does, and reads the other.
What comes is one of three things, told apart by its first bytes: an event stream, another HTTP answer, or the output of
a program that speaks no HTTP.
"""

import argparse
import codecs
import contextlib
import grp
import http.client
import os
import pwd
import re
import secrets
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from forkd import config, lookout, sender
from workers import sse

WHOLE: Final = 0
FAILED: Final = 1
WRONG: Final = 2
UNREACHABLE: Final = 3
INTERRUPTED: Final = 128 + signal.SIGINT
PIPE_BROKEN: Final = 128 + signal.SIGPIPE

PATIENCE_SECS: Final = 2.0
"""For the daemon to take the handoff; its answer may take as long as it likes."""
HEAD_MAX_BYTES: Final = 262144
SYSTEM_SOCKET: Final = "/run/forkd/forkd.sock"
_STATUS_LINE: Final = re.compile(r"HTTP/\S+ (\d{3})(?: .*)?")
REPLACED: Final = "\N{REPLACEMENT CHARACTER}"
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_EPILOG: Final = """\
JSON is the handoff's data, as an application would send it; "-" reads it from the standard input. The socket is
server.socket_path of the configuration or of the environment, as for the daemon, or --socket. Its answer may take as
long as it likes; put timeout(1) in front where that is too long.

exit status:
  0    the whole answer was printed
  1    it failed (the reason is on the standard error), or ended before its end
  2    the command line, the data or the configuration is wrong
  3    no daemon took the handoff
  130  you pressed Ctrl-C, 141 whoever read the output has gone; forkd is told, and ends the stream

examples:
  forkd send '{"prompt": "Hello"}'
  forkd send -c /etc/forkd.yaml '{"prompt": "Hello", "backend": "openai", "max_tokens": 50}'
  jq -n --rawfile text report.txt '{prompt: ("Sum up: " + $text)}' | forkd send -
  forkd send --raw '{"prompt": "Hello"}'
"""


class Unreachable(Exception):
    """No daemon took the handoff; the message says why, and what to do."""


class BadAnswer(Exception):
    """The answer is an error, or not whole."""


def main(argv: Sequence[str]) -> int:
    """`forkd send ARGUMENTS`; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except config.ConfigError as error:
        _complain("the configuration is not valid (with --socket none is read):")
        for fault in error.faults:
            print(f"  {fault}", file=sys.stderr)
        return WRONG
    except Unreachable as error:
        _complain(str(error))
        return UNREACHABLE
    except BadAnswer as error:
        _complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_BROKEN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forkd send",
        description="Hands one request over to forkd, as Apache would, and prints the answer as it streams.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="JSON", help='the handoff\'s data, such as {"prompt": "Hello"}; -: from stdin')
    place = parser.add_mutually_exclusive_group()
    place.add_argument("-s", "--socket", metavar="PATH", help="the daemon's socket")
    place.add_argument("-c", "--config", metavar="FILE", help="the daemon's configuration, which names its socket")
    parser.add_argument("--raw", action="store_true", help="print every byte of the answer as it comes, head included")
    parser.add_argument("--no-envelope", action="store_true", help="send the data alone, as SocketHandoffFormat raw")
    return parser


def _run(options: argparse.Namespace) -> int:
    try:
        data = _data(options.data)
    except ValueError as error:
        _complain(str(error))
        return WRONG
    path = options.socket or config.load(options.config, os.environ).settings.server.socket_path
    request: dict[str, Any] = {"method": "GET", "uri": "", "request_id": f"send-{secrets.token_hex(6)}", "headers": {}}
    envelope = None if options.no_envelope else {"request": request, "response_headers": []}
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            try:
                sender.hand_over(path, theirs, envelope, data, PATIENCE_SECS)
            except OSError as error:
                raise Unreachable(_why(path, error, named=bool(options.socket or options.config))) from None
        if options.raw:
            _print_bytes(ours)
        else:
            _print_text(ours)
    return WHOLE


def _data(written: str) -> bytes:
    """The data to hand over. Raises ValueError if no application would send it."""
    data = sys.stdin.buffer.read() if written == "-" else os.fsencode(written)
    try:
        parsed = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        hint = ""
        if data.strip()[:1] not in (b"{", b"[", b'"', b""):
            prompt = data.decode(errors="replace").strip()
            hint = f"; did you mean '{msgspec.json.encode({'prompt': prompt[:60]}).decode()}'?"
        raise ValueError(f"the data is not JSON ({str(error)[:200]}){hint}") from None
    if not isinstance(parsed, dict):
        raise ValueError('the data is not a JSON object, such as \'{"prompt": "Hello"}\'')
    return data


def _why(path: str, error: OSError, *, named: bool) -> str:
    """What to say when the daemon did not take the handoff."""
    if isinstance(error, BlockingIOError):
        return f"{path}: the daemon accepts nothing; it is very busy, or hangs (forkd status)"
    if isinstance(error, PermissionError):
        return f"{path}: you may not write to this socket{_owner(path)}"
    if isinstance(error, BrokenPipeError | ConnectionResetError):
        return f"{path}: the daemon closed the connection; it is shutting down, or refuses senders such as you"
    if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return f"{path}: {error.strerror or error}"
    if not _may_be_socket(path):
        return f"{path}: this is no socket"
    what = "there is no such socket" if isinstance(error, FileNotFoundError) else "whoever listened there is gone"
    hint = "Is forkd running? 'forkd' starts it; -s names another socket, -c the daemon's configuration"
    if not named and path != SYSTEM_SOCKET and lookout.listens(SYSTEM_SOCKET):
        hint = f"But {lookout.described(SYSTEM_SOCKET)} listens on {SYSTEM_SOCKET}: -s {SYSTEM_SOCKET}"
    return f"{path}: {what}.\n{hint}"


def _owner(path: str) -> str:
    """Who may: for somebody who may not."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    user, group = str(found.st_uid), str(found.st_gid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(found.st_uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    return f" (mode {stat.S_IMODE(found.st_mode):04o}, user {user}, group {group}); see socket_group"


def _may_be_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True


def _print_bytes(sock: socket.socket) -> None:
    """Every byte as it comes. Raises BadAnswer if there is none."""
    out = sys.stdout.buffer
    got = False
    while piece := _receive(sock):
        got = True
        out.write(piece)
        out.flush()
    if not got:
        raise _nothing()


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionError:
        raise BadAnswer("the connection was reset; forkd's log says why") from None


def _nothing() -> BadAnswer:
    return BadAnswer("the connection ended without an answer; forkd's log says why")


def _print_text(sock: socket.socket) -> None:
    """The text of the answer. Raises BadAnswer."""
    head = _receive(sock)
    while not head.startswith(b"HTTP/"[: len(head)]) or b"\r\n\r\n" not in head:
        if not head:
            raise _nothing()
        if not head.startswith(b"HTTP/"[: len(head)]):  # a program's own words
            _Page().print(sock, head)
            return
        more = _receive(sock)
        if not more or len(head) > HEAD_MAX_BYTES:
            raise BadAnswer("the answer ended in its head; forkd's log says why")
        head += more
    head, _, body = head.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    found = _STATUS_LINE.fullmatch(lines[0])
    if not found:
        raise BadAnswer(f"the answer begins with no status line: {lines[0][:80]!r}")
    status = int(found[1])
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    kind = fields.get("content-type", "").partition(";")[0].lower()
    if not 200 <= status < 300:
        while more := _receive(sock):
            body += more
        raise BadAnswer(f"{status} {_told(body) or http.client.responses.get(status, '')}")
    if kind == "text/event-stream":
        _Events().print(sock, body)
    else:
        _Page().print(sock, body)


def _told(body: bytes) -> str:
    """What an error says, for a person: its code and its text."""
    try:
        error = msgspec.json.decode(body)
        return f"{error['code']}: {error['error']} (request id {error['request_id'] or 'unknown'})"
    except (msgspec.MsgspecError, UnicodeError, RecursionError, KeyError, TypeError):
        return ""


class _Page:
    """An answer that is printed as it is."""

    def __init__(self) -> None:
        self._out = sys.stdout.buffer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace") if sys.stdout.isatty() else None
        self._at_line_start = True

    def print(self, sock: socket.socket, first: bytes) -> None:
        """Print up to the end. Raises BadAnswer."""
        try:
            self.feed(first)
            while data := _receive(sock):
                self.feed(data)
            self.end()
        finally:
            if not self._at_line_start:  # whoever comes next on this terminal, or in this log
                self.say(b"\n")

    def feed(self, data: bytes) -> None:
        """A piece of the body."""
        self.say(data)

    def end(self) -> None:
        """The body has ended. Raises BadAnswer if it should not have."""

    def say(self, data: bytes) -> None:
        """Print, now. A terminal gets no control characters from a model."""
        if self._decoder is not None:
            data = _CONTROL.sub(REPLACED, self._decoder.decode(data)).encode()
        if data:
            self._at_line_start = data.endswith(b"\n")
            self._out.write(data)
            self._out.flush()


class _Events(_Page):
    """An event stream, of which the text is printed."""

    def __init__(self) -> None:
        super().__init__()
        self._parser = sse.Parser()
        self._texts = 0
        self._others = 0
        self._ended = False

    def feed(self, data: bytes) -> None:
        try:
            events = self._parser.feed(data)
        except sse.EventTooLarge:
            raise BadAnswer(f"an event is larger than {sse.MAX_EVENT_BYTES} bytes") from None
        for event in events:
            self._event(event)

    def end(self) -> None:
        if self._texts and not self._ended:
            raise BadAnswer("the answer broke off; forkd's log says why")
        if self._others and not self._texts:
            _complain(f"none of the {self._others} events has text in it; --raw shows them")

    def _event(self, event: sse.Event) -> None:
        if event.name == "error":
            raise BadAnswer(_told(event.data) or event.data.decode(errors="replace"))
        if event.data == b"[DONE]":
            self._ended = True
        elif (text := None if event.name else _text_of(event.data)) is not None:
            self._texts += 1
            self.say(text)
        elif event.name != "done":
            self._others += 1


def _text_of(data: bytes) -> bytes | None:
    """The text of an event: `{"content": …}`, or (`format: text`) the data itself. None: it is an API's own event."""
    try:
        piece = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return data
    if not isinstance(piece, dict):
        return data
    content = piece.get("content")
    return content.encode(errors="replace") if isinstance(content, str) else None


def _complain(text: str) -> None:
    print(f"forkd send: {_CONTROL.sub(REPLACED, text)}", file=sys.stderr)
