"""Files that the application leaves under `server.data_dir` for a request: found, checked, read, deleted, swept.

The promise: whatever the handoff data says, no file outside data_dir is opened, and none inside but regular files.

Theory of operation. A path is never given to the kernel as a whole. It is split, and anything but plain names refused
(`..`, a NUL, a name that begins with a dot); then each directory is opened from the one before it (openat(2), O_PATH,
O_NOFOLLOW), and the file from the last of them. So it makes no difference what somebody renames or links meanwhile:
what was opened is what is walked on from. A symbolic link is refused even if it stays inside: to follow one safely
takes openat2(2), which Python does not have, and nobody needs one here. data_dir itself is the operator's word, and may
be a link. The file is looked at before it is opened, since opening a device or a fifo does something to it, and again
after, since it may be another by then; O_NONBLOCK is for that other one.

A hidden file is no attachment: it is neither read nor deleted nor swept, so whoever keeps one here keeps it.

Everything here blocks and is run by `Offload`. It shares the GIL with the loop, so what computes does it in small
pieces and gives way in between.
"""

import codecs
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import EACCES, ELOOP, EMFILE, ENAMETOOLONG, ENFILE, ENOENT, ENOTDIR, EPERM
from typing import Final, NamedTuple

MAX_ATTACHMENTS: Final = 32
MAX_NAME_CHARS: Final = 64
MAX_DEPTH: Final = 16
"""Names in a path, the file's own included: neither reading nor sweeping goes deeper."""
MAX_PATH_BYTES: Final = 4096
LOOKS_PER_SWEEP: Final = 10_000

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LISTABLE: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PIECE_BYTES: Final = 1 << 18
_STEPS: Final = 50
_WAY_SECS: Final = 0.0001

_BOM: Final = b"\xef\xbb\xbf"
_BEGINNINGS: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"%PDF-", "application/pdf"),
)
_TEXT_ENDINGS: Final = {
    b".md": "text/markdown",
    b".markdown": "text/markdown",
    b".csv": "text/csv",
    b".htm": "text/html",
    b".html": "text/html",
    b".json": "application/json",
}
_FAULTS: Final = {
    ENOENT: "does not exist",
    ELOOP: "is a symbolic link",
    ENOTDIR: "is inside of something that is no directory, or a symbolic link",
    EACCES: "may not be read by forkd's user",
    EPERM: "may not be read by forkd's user",
    ENAMETOOLONG: "has a path that is too long",
}


class Attachment(NamedTuple):
    """One file of a handoff, read."""

    name: str
    """Its key in the handoff data, and its placeholder in the prompt."""
    media_type: str
    data: bytes
    """Never empty. Of a text: UTF-8 without NULs and without a byte order mark."""

    @property
    def is_text(self) -> bool:
        """Whether it can be put into a prompt as it is."""
        return _is_text_type(self.media_type)


class AttachmentError(Exception):
    """An attachment cannot be had. `code` is one of `forkd.reasons`; the text names it by its name, never by a path."""

    def __init__(self, code: str, fault: str) -> None:
        super().__init__(fault)
        self.code = code


class Attachments:
    """The files of one `server.data_dir` (null: there is none, and every attachment is refused)."""

    def __init__(self, data_dir: str | None) -> None:
        self._dir = None if data_dir is None else os.path.abspath(data_dir)
        self._walk: Iterator[_Seen] | None = None
        """A sweep that was not finished in its call: it holds the fds of the directories it is in."""

    def load(self, wanted: Mapping[str, str], allowed_types: Sequence[str], max_bytes: int) -> dict[str, Attachment]:
        """Read the files of `wanted`, a map of names (placeholders) to paths in data_dir, at most `max_bytes` in all.

        `allowed_types` are media types or patterns such as `text/*`. Raises AttachmentError.
        """
        if len(wanted) > MAX_ATTACHMENTS:
            raise AttachmentError("bad_attachment", f"{len(wanted)} attachments: more than {MAX_ATTACHMENTS}")
        loaded = {}
        left = max_bytes
        for name, path in wanted.items():
            if not _is_name(name):
                raise AttachmentError("bad_attachment", f"attachment {name[:MAX_NAME_CHARS]!a}: no name for one")
            try:
                parts = self._parts(path)
                data = self._read(parts, left)
                left -= len(data)
                if data.startswith(_BOM):
                    data = data[len(_BOM) :]
                if not data:
                    raise _Fault("is empty")
                media_type = _media_type(data, parts[-1])
                if not _is_allowed(media_type, allowed_types):
                    raise _Fault(f"is {media_type}, which is not allowed")
            except _TooLarge:
                fault = f"attachment {name}: more than {max_bytes} bytes in all"
                raise AttachmentError("attachment_too_large", fault) from None
            except _Fault as error:
                raise AttachmentError("bad_attachment", f"attachment {name}: {error}") from None
            except OSError as error:
                code = "out_of_fds" if error.errno in (EMFILE, ENFILE) else "bad_attachment"
                raise AttachmentError(code, f"attachment {name}: {_said(error)}") from None
            loaded[name] = Attachment(name, media_type, data)
        return loaded

    def delete(self, wanted: Mapping[str, str]) -> list[str]:
        """Delete the files of `wanted`, those that `load` refused for what they are too; returns what went wrong.

        A file that is not there is no fault: a handoff may have been answered twice. Of too many, the first go.
        """
        faults = []
        for name, path in list(wanted.items())[:MAX_ATTACHMENTS]:
            try:
                parts = self._parts(path)
                with self._parent(parts) as parent:
                    if not stat.S_ISREG(os.stat(parts[-1], dir_fd=parent, follow_symlinks=False).st_mode):
                        raise _Fault("is no regular file")
                    # Should it be another by now: unlink(2) follows no link and takes no directory.
                    os.unlink(parts[-1], dir_fd=parent)
            except _Fault as error:
                faults.append(f"attachment {name[:MAX_NAME_CHARS]!a}: {error}")
            except OSError as error:
                if error.errno != ENOENT:
                    faults.append(f"attachment {name[:MAX_NAME_CHARS]!a}: not deleted: {error.strerror}")
        return faults

    def sweep(self, max_age_secs: float) -> int:
        """Delete regular files last written more than `max_age_secs` ago; returns how many. One call at a time.

        A call looks at LOOKS_PER_SWEEP entries at most, and the next one goes on from there: a directory of any size is
        seen to its end. Directories stay, as do links, hidden files, and other filesystems that are mounted inside.
        The age must be beyond any stream's, or it takes files that are still to be read. Raises OSError if data_dir
        cannot be listed; that it does not exist (yet) is no fault.
        """
        if self._dir is None:
            return 0
        before = time.time() - max_age_secs
        deleted = 0
        walk, self._walk = self._walk, None
        try:
            if walk is None:
                walk = _walk(os.open(self._dir, _LISTABLE & ~os.O_NOFOLLOW))
            for step in range(LOOKS_PER_SWEEP):
                seen = next(walk, None)
                if seen is None:
                    return deleted
                deleted += _delete_if_old(seen, before)
                if step % _STEPS == 0:
                    time.sleep(_WAY_SECS)
        except FileNotFoundError:
            return deleted
        self._walk = walk
        return deleted

    def _parts(self, path: str) -> list[bytes]:
        """The names that lead from data_dir to a file. Raises _Fault."""
        if self._dir is None:
            raise _Fault("no data_dir is configured")
        try:
            # PHP's file names are bytes, and what it writes into JSON is UTF-8: no locale has a say in this.
            raw = path.encode()
        except UnicodeEncodeError:
            raise _Fault("has a path that is no UTF-8") from None
        if b"\0" in raw:
            raise _Fault("has a path with a NUL byte")
        if len(raw) > MAX_PATH_BYTES:
            raise _Fault("has a path that is too long")
        parts = _split(raw)
        if b".." in parts:
            raise _Fault("leaves data_dir")
        if raw.startswith(b"/"):
            for root in (_split(os.fsencode(self._dir)), _split(os.fsencode(os.path.realpath(self._dir)))):
                if parts[: len(root)] == root:
                    parts = parts[len(root) :]
                    break
            else:
                raise _Fault("is not in data_dir")
        if not parts:
            raise _Fault("has a path that names no file")
        if len(parts) > MAX_DEPTH:
            raise _Fault(f"is more than {MAX_DEPTH} directories deep")
        if any(part.startswith(b".") for part in parts):
            raise _Fault("is a hidden file, or in a hidden directory")
        return parts

    @contextmanager
    def _parent(self, parts: list[bytes]) -> Iterator[int]:
        """The directory that holds the file, as an fd for the `*at` calls. Raises OSError, or _Fault for data_dir."""
        assert self._dir is not None
        try:
            fd = os.open(self._dir, _DIRECTORY)
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                raise
            raise _Fault(f"server.data_dir cannot be opened: {error.strerror}") from None
        try:
            for part in parts[:-1]:
                below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _read(self, parts: list[bytes], most: int) -> bytes:
        """The contents of a regular file of at most `most` bytes. Raises OSError, _Fault, _TooLarge."""
        with self._parent(parts) as parent:
            _size_of_regular(os.stat(parts[-1], dir_fd=parent, follow_symlinks=False))
            fd = os.open(parts[-1], _FILE, dir_fd=parent)
        try:
            size = _size_of_regular(os.fstat(fd))
            if size > most:
                raise _TooLarge
            # As a rule the first read has it all, in the very bytes that are handed on; the next one finds the end.
            # But a file may grow or shrink under us.
            pieces = []
            got = 0
            while piece := os.read(fd, min(most, size if got < size else got + _PIECE_BYTES) - got + 1):
                pieces.append(piece)
                got += len(piece)
                if got > most:
                    raise _TooLarge
        finally:
            os.close(fd)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _Fault(Exception):
    """What is wrong with an attachment, as the end of a sentence that begins with its name."""


class _TooLarge(Exception):
    """More bytes than were left."""


class _Seen(NamedTuple):
    """One entry met by a sweep, in an open directory that is the walk's to close."""

    directory: int
    entry: os.DirEntry[str]


def _walk(fd: int, device: int = -1, depth: int = 1) -> Iterator[_Seen]:
    """Every entry under a directory that is not hidden, directories too. Owns `fd`, and closes it when it ends."""
    try:
        if device < 0:
            device = os.fstat(fd).st_dev
        elif os.fstat(fd).st_dev != device:
            return
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                yield _Seen(fd, entry)
                if depth < MAX_DEPTH and entry.is_dir(follow_symlinks=False):
                    try:
                        below = os.open(entry.name, _LISTABLE, dir_fd=fd)
                    except OSError:
                        continue
                    yield from _walk(below, device, depth + 1)
    except OSError:
        pass  # what cannot be listed is left alone
    finally:
        os.close(fd)


def _delete_if_old(seen: _Seen, before: float) -> bool:
    directory, entry = seen
    try:
        if not entry.is_file(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_mtime >= before:
            return False
        os.unlink(entry.name, dir_fd=directory)
    except OSError:
        return False
    return True


def _split(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _is_name(name: str) -> bool:
    """A word of any language's letters and digits, `_`, `-` and `.`: a file's plain name is one, too."""
    return 0 < len(name) <= MAX_NAME_CHARS and ("_" + name.replace("-", "_").replace(".", "_")).isidentifier()


def _size_of_regular(status: os.stat_result) -> int:
    if stat.S_ISLNK(status.st_mode):
        raise _Fault(_FAULTS[ELOOP])
    if not stat.S_ISREG(status.st_mode):
        raise _Fault("is no regular file")
    return status.st_size


def _media_type(data: bytes, leaf: bytes) -> str:
    """What the contents are; a file's name has a say only in which kind of text it is. Raises _Fault."""
    for beginning, media_type in _BEGINNINGS:
        if data.startswith(beginning):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if _is_text(data):
        return _TEXT_ENDINGS.get(os.path.splitext(leaf)[1].lower(), "text/plain")
    raise _Fault("is neither UTF-8 text nor PNG, JPEG, GIF, WebP or PDF")


def _is_text(data: bytes) -> bool:
    """Whether it is UTF-8 without NULs: found out piece by piece, since the loop wants the GIL too."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    view = memoryview(data)
    for start in range(0, len(data), _PIECE_BYTES):
        end = start + _PIECE_BYTES
        if start:
            time.sleep(_WAY_SECS)
        if data.find(b"\0", start, end) >= 0:
            return False
        try:
            decode(view[start:end], end >= len(data))
        except UnicodeDecodeError:
            return False
    return True


def _is_text_type(media_type: str) -> bool:
    return media_type.startswith("text/") or media_type == "application/json"


def _is_allowed(media_type: str, patterns: Sequence[str]) -> bool:
    """`text/*` is what can be put into a prompt as text: JSON too."""
    for written in patterns:
        pattern = written.strip().lower()
        if pattern in (media_type, "*", "*/*"):
            return True
        if pattern == "text/*" and _is_text_type(media_type):
            return True
        if pattern.endswith("/*") and media_type.startswith(pattern[:-1]):
            return True
    return False


def _said(error: OSError) -> str:
    return _FAULTS.get(error.errno or 0) or error.strerror or type(error).__name__
