"""Attachments: which files are read, deleted and swept, and that no path or race leads out of data_dir."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.reasons import REASONS
from workers import attachments
from workers.attachments import MAX_ATTACHMENTS, MAX_DEPTH, Attachment, AttachmentError, Attachments

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
SECRET = b"the secret outside"
MB = 1 << 20


@pytest.fixture(autouse=True)
def _no_fd_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """data_dir, and beside it what must stay out of reach."""
    inside = tmp_path / "uploads"
    (inside / "sub" / "deeper").mkdir(parents=True)
    (inside / "a.txt").write_bytes(b"hello")
    (inside / "sub" / "b.txt").write_bytes(b"below")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_bytes(SECRET)
    (tmp_path / "uploads-too").mkdir()
    (tmp_path / "uploads-too" / "secret.txt").write_bytes(SECRET)
    return inside


@pytest.fixture
def store(data_dir: Path) -> Attachments:
    return Attachments(str(data_dir))


def load(store: Attachments, path: str, most: int = MB) -> Attachment:
    return store.load({"it": path}, ["*/*"], most)["it"]


def refused(call: Callable[[], object]) -> tuple[str, str]:
    """The code and the text of the AttachmentError that it raises."""
    with pytest.raises(AttachmentError) as caught:
        call()
    assert caught.value.code in REASONS
    return caught.value.code, str(caught.value)


# What is read.


def test_files_by_relative_and_absolute_path(store: Attachments, data_dir: Path) -> None:
    wanted = {
        "a": "a.txt",
        "b": "sub/b.txt",
        "c": f"{data_dir}/a.txt",
        "d": f"{data_dir}//./sub///b.txt",
        "e": "./a.txt",
    }
    loaded = store.load(wanted, ["text/plain"], MB)
    assert list(loaded) == list(wanted)
    assert loaded["a"] == Attachment("a", "text/plain", b"hello")
    assert [loaded[name].data for name in "bcde"] == [b"below", b"hello", b"below", b"hello"]
    assert store.load({}, [], 0) == {}


def test_data_dir_itself_may_be_a_link(data_dir: Path, tmp_path: Path) -> None:
    """An absolute path may be written either way: PHP's realpath() gives the other one."""
    (tmp_path / "link").symlink_to("uploads")
    store = Attachments(str(tmp_path / "link"))
    for path in ("a.txt", f"{tmp_path}/link/a.txt", f"{data_dir}/a.txt"):
        assert load(store, path).data == b"hello"
    assert refused(lambda: load(store, f"{tmp_path}/outside/secret.txt"))[0] == "bad_attachment"


def test_a_relative_data_dir(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_dir.parent)
    store = Attachments("uploads/")
    monkeypatch.chdir("/")
    assert load(store, "a.txt").data == b"hello"
    assert load(store, f"{data_dir}/a.txt").data == b"hello"


@pytest.mark.parametrize("leaf", ["größe 日本.txt", "nai\u0308ve.txt", "-rf", "a\nb", "{x}", "%00", "a..b", "x.."])
def test_odd_file_names(store: Attachments, data_dir: Path, leaf: str) -> None:
    (data_dir / "ünder").mkdir()
    with open(os.fsencode(data_dir / "ünder") + b"/" + leaf.encode(), "wb") as file:
        file.write(b"odd")
    assert load(store, f"ünder/{leaf}").data == b"odd"
    assert store.delete({"it": f"ünder/{leaf}"}) == []
    assert os.listdir(data_dir / "ünder") == []


def test_file_names_are_utf8_in_any_locale(data_dir: Path) -> None:
    (data_dir / "größe.txt").write_bytes(b"found")
    program = (
        "import sys; from workers.attachments import Attachments as A;"
        "assert sys.getfilesystemencoding() != 'utf-8', 'this locale proves nothing';"
        r"print(A(sys.argv[1]).load({'x': 'gr\xf6\xdfe.txt'}, ['text/*'], 9)['x'].data)"
    )
    made = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", program, str(data_dir)],
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (made.stdout, made.stderr) == ("b'found'\n", "")


# What is refused.


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "names no file"),
        (".", "names no file"),
        ("/", "not in data_dir"),
        ("./.", "names no file"),
        ("{dir}", "names no file"),
        ("{dir}/", "names no file"),
        ("..", "leaves data_dir"),
        ("../outside/secret.txt", "leaves data_dir"),
        ("sub/../a.txt", "leaves data_dir"),
        ("sub/../../outside/secret.txt", "leaves data_dir"),
        ("{dir}/../outside/secret.txt", "leaves data_dir"),
        ("/../{dir}/a.txt", "leaves data_dir"),
        ("/etc/passwd", "not in data_dir"),
        ("//etc/passwd", "not in data_dir"),
        ("/a.txt", "not in data_dir"),
        ("{dir}-too/secret.txt", "not in data_dir"),
        ("a.txt\0", "NUL byte"),
        ("\0", "NUL byte"),
        ("a.txt\0/../../outside/secret.txt", "NUL byte"),
        ("\ud800", "no UTF-8"),
        ("\udcff.txt", "no UTF-8"),
        ("missing.txt", "does not exist"),
        ("missing/a.txt", "does not exist"),
        ("a.txt/b.txt", "no directory"),
        ("sub", "no regular file"),
        ("sub/", "no regular file"),
        ("sub/deeper", "no regular file"),
        ("A.TXT", "does not exist"),
        (".hidden", "hidden"),
        (".git/config", "hidden"),
        ("sub/.hidden", "hidden"),
        ("...", "hidden"),
        ("x" * 256, "too long"),
        ("x/" * 3000, "too long"),
        ("é" * 3000, "too long"),
        ("x/" * MAX_DEPTH + "x", "deep"),
        ("empty.txt", "is empty"),
        ("bom.txt", "is empty"),
        ("file:///etc/passwd", "does not exist"),
        ("http://127.0.0.1/", "does not exist"),
        ("%2e%2e/outside/secret.txt", "does not exist"),
        ("..\\outside\\secret.txt", "hidden"),
        ("~/x", "does not exist"),
    ],
)
def test_refused_paths(store: Attachments, data_dir: Path, path: str, why: str) -> None:
    for name in (".hidden", "sub/.hidden", "...", "..\\outside\\secret.txt"):
        (data_dir / name).write_bytes(SECRET)
    (data_dir / ".git").mkdir()
    (data_dir / ".git" / "config").write_bytes(SECRET)
    (data_dir / "empty.txt").touch()
    (data_dir / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    code, fault = refused(lambda: load(store, path.replace("{dir}", str(data_dir))))
    assert code == "bad_attachment"
    assert fault.startswith("attachment it: ")
    assert why in fault
    assert "/" not in fault, "a path in an error"
    assert "secret" not in fault


@pytest.mark.parametrize(
    ("link", "target", "path"),
    [
        ("link", "../outside/secret.txt", "link"),
        ("link", "{outside}/secret.txt", "link"),
        ("link", "a.txt", "link"),
        ("link", "link", "link"),
        ("link", "nowhere", "link"),
        ("link", "../outside", "link/secret.txt"),
        ("link", "{outside}", "link/secret.txt"),
        ("link", "sub", "link/b.txt"),
        ("link", ".", "link/a.txt"),
        ("link", "/", "link/etc/passwd"),
        ("sub/link", "../../outside", "sub/link/secret.txt"),
        ("sub/link", "/proc/self/root", "sub/link/etc/passwd"),
        ("link", "/proc/self/fd", "link/0"),
    ],
)
def test_symbolic_links(store: Attachments, data_dir: Path, link: str, target: str, path: str) -> None:
    outside = data_dir.parent / "outside"
    (data_dir / link).symlink_to(target.replace("{outside}", str(outside)))
    for way in (path, f"{data_dir}/{path}"):
        code, fault = refused(lambda way=way: load(store, way))  # type: ignore[misc]
        assert code == "bad_attachment"
        assert "symbolic link" in fault
        assert len(store.delete({"it": way})) == 1
    assert (data_dir / link).is_symlink()
    assert (outside / "secret.txt").read_bytes() == SECRET
    assert (data_dir / "a.txt").exists()
    assert (data_dir / "sub" / "b.txt").exists()


@pytest.mark.timeout(30)
def test_what_is_no_file(store: Attachments, data_dir: Path) -> None:
    os.mkfifo(data_dir / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(data_dir / "socket"))
    names = ["fifo", "socket", "sub"]
    if os.geteuid() == 0:
        os.mknod(data_dir / "zero", 0o20666, os.makedev(1, 5))
        names.append("zero")
    for name in names:
        code, fault = refused(lambda name=name: load(store, name))  # type: ignore[misc]
        assert (code, fault) == ("bad_attachment", "attachment it: is no regular file")
        assert store.delete({"it": name}) == ["attachment 'it': is no regular file"]
    assert set(names) <= set(os.listdir(data_dir))


def test_a_fifo_is_not_even_opened(store: Attachments, data_dir: Path) -> None:
    """A reader, however short, would wake who waits for one."""
    os.mkfifo(data_dir / "fifo")
    opened = threading.Event()

    def write() -> None:
        os.close(os.open(data_dir / "fifo", os.O_WRONLY))
        opened.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    time.sleep(0.05)
    for _ in range(50):
        refused(lambda: load(store, "fifo"))
    assert not opened.is_set()
    os.close(os.open(data_dir / "fifo", os.O_RDONLY))
    writer.join(20)
    assert opened.is_set()


def test_an_unreadable_file() -> None:
    """Directories that may be searched but not listed are enough on the way."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        for path, mode in (("locked/x", 0o644), ("searchable/x", 0o644), ("unreadable", 0)):
            (base / path).parent.mkdir(exist_ok=True)
            (base / path).write_bytes(b"x")
            (base / path).chmod(mode)
        (base / "locked").chmod(0)
        (base / "searchable").chmod(0o111)
        base.chmod(0o111)
        store = Attachments(name)
        if root:
            os.seteuid(65534)
        try:
            said = [refused(lambda path=path: load(store, path)) for path in ("locked/x", "unreadable")]  # type: ignore[misc]
            found = load(store, "searchable/x").data
            faults = store.delete({"it": "searchable/x"})
            with pytest.raises(PermissionError):
                store.sweep(0)
        finally:
            if root:
                os.seteuid(0)
            base.chmod(0o755)
            (base / "searchable").chmod(0o755)
            (base / "locked").chmod(0o755)
    assert said == [("bad_attachment", "attachment it: may not be read by forkd's user")] * 2
    assert found == b"x"
    assert faults == ["attachment 'it': not deleted: Permission denied"]


def test_no_data_dir(tmp_path: Path) -> None:
    none = Attachments(None)
    assert refused(lambda: load(none, "a.txt")) == ("bad_attachment", "attachment it: no data_dir is configured")
    assert none.delete({"it": "a.txt"}) == ["attachment 'it': no data_dir is configured"]
    assert none.sweep(0) == 0
    (tmp_path / "file").touch()
    missing, file = Attachments(str(tmp_path / "missing")), Attachments(str(tmp_path / "file"))
    assert refused(lambda: load(missing, "a")) == (
        "bad_attachment",
        "attachment it: server.data_dir cannot be opened: No such file or directory",
    )
    assert refused(lambda: load(file, "a"))[1].endswith("server.data_dir cannot be opened: Not a directory")
    assert missing.sweep(0) == 0
    with pytest.raises(NotADirectoryError):
        file.sweep(0)
    assert (tmp_path / "file").exists()


def test_out_of_fds_is_not_the_applications_fault(store: Attachments, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    for which in range(3):  # data_dir, the directory in it, the file
        opened: list[int] = []

        def run_out(*args: Any, which: int = which, opened: list[int] = opened, **more: Any) -> int:
            if len(opened) == which:
                raise OSError(24, "Too many open files")
            opened.append(real(*args, **more))
            return opened[-1]

        with monkeypatch.context() as patch:
            patch.setattr("os.open", run_out)
            code, _ = refused(lambda: load(store, "sub/b.txt"))
        assert code == "out_of_fds"


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("photo", True),
        ("0", True),
        ("_", True),
        ("photo-1", True),
        ("photo.png", True),
        ("größe", True),
        ("写真", True),
        ("हिन्दी", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        ("a b", False),
        ("{a}", False),
        ("a}", False),
        ("a\nb", False),
        ("a\n", False),
        ("a/b", False),
        ("a:b", False),
        ("a[0]", False),
        ("a!r", False),
        ("\0", False),
        ("\ud800", False),
        ("a\u202eb", False),
        ("😀", False),
    ],
)
def test_names(store: Attachments, name: str, fine: bool) -> None:
    def load_it() -> dict[str, Attachment]:
        return store.load({name: "a.txt"}, ["text/plain"], MB)

    if fine:
        assert load_it()[name] == (name, "text/plain", b"hello")
    else:
        code, fault = refused(load_it)
        assert code == "bad_attachment"
        assert fault.isascii()
        assert fault.isprintable()
        assert len(fault) < 500


def test_too_many(store: Attachments) -> None:
    wanted = {f"n{number}": "a.txt" for number in range(MAX_ATTACHMENTS + 1)}
    code, fault = refused(lambda: store.load(wanted, ["text/plain"], MB))
    assert code == "bad_attachment"
    assert str(MAX_ATTACHMENTS) in fault
    del wanted["n0"]
    assert len(store.load(wanted, ["text/plain"], MB)) == MAX_ATTACHMENTS


# Sizes.


def test_the_limit_is_for_all_together_and_to_the_byte(store: Attachments) -> None:
    wanted = {"a": "a.txt", "b": "sub/b.txt"}  # five bytes each
    assert len(store.load(wanted, ["text/plain"], 10)) == 2
    assert refused(lambda: store.load(wanted, ["text/plain"], 9)) == (
        "attachment_too_large",
        "attachment b: more than 9 bytes in all",
    )
    assert refused(lambda: store.load(wanted, ["text/plain"], 0))[0] == "attachment_too_large"


def test_a_huge_sparse_file_is_refused_without_reading(
    store: Attachments, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(data_dir / "huge", "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr("os.read", lambda *_: pytest.fail("it was read"))
    assert refused(lambda: load(store, "huge", 1 << 30))[0] == "attachment_too_large"


def test_a_large_file_comes_whole(store: Attachments, data_dir: Path) -> None:
    text = ("0123456789abcde" * 2 + "ü") * 65536  # a character across every border between pieces, sooner or later
    data = (b"x" + text.encode()) * 2
    (data_dir / "large").write_bytes(data)
    assert load(store, "large", len(data)).data == data
    assert refused(lambda: load(store, "large", len(data) - 1))[0] == "attachment_too_large"


@pytest.mark.parametrize(
    ("change", "most", "expected"),
    [
        (5, 10, b"hello" + b"x" * 5),
        (5, 9, None),
        (3_000_000, 1 << 30, b"hello" + b"x" * 3_000_000),
        (3_000_000, 3_000_004, None),
        (-3, 10, b"he"),
        (-5, 10, None),
    ],
)
def test_a_file_that_changes_while_it_is_read(
    store: Attachments,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: int,
    most: int,
    expected: bytes | None,
) -> None:
    """fstat said five bytes."""
    file = data_dir / "a.txt"
    real = os.read

    def read(fd: int, count: int) -> bytes:
        assert count <= most + 1
        if file.stat().st_size == 5:
            if change < 0:
                os.truncate(file, 5 + change)
            else:
                with open(file, "ab") as more:
                    more.write(b"x" * change)
        return real(fd, count)

    monkeypatch.setattr("os.read", read)
    if expected is not None:
        assert load(store, "a.txt", most).data == expected
    else:
        code, _ = refused(lambda: load(store, "a.txt", most))
        assert code == ("bad_attachment" if change < 0 else "attachment_too_large")


def test_reads_that_come_in_bits(store: Attachments, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data_dir / "file").write_bytes(bytes(range(1, 128)) * 100)
    real = os.read
    monkeypatch.setattr("os.read", lambda fd, count: real(fd, min(count, 1000)))
    assert load(store, "file", 12_700).data == bytes(range(1, 128)) * 100


def test_a_large_text_leaves_the_loop_its_turns(store: Attachments, data_dir: Path) -> None:
    """Checked in one call, this one keeps the GIL for 0.1 to 0.5 s, in pieces for 5 ms. The best of a few counts."""
    (data_dir / "large").write_bytes("zwölf Boxkämpfer jagen ".encode() * 2_600_000)
    worst = []
    for _ in range(5):
        reader = threading.Thread(target=lambda: load(store, "large", 1 << 30))
        gap, last = 0.0, time.monotonic()
        reader.start()
        while reader.is_alive():
            time.sleep(0.001)
            now = time.monotonic()
            gap, last = max(gap, now - last), now
        worst.append(gap)
        if gap < 0.05:
            return
    pytest.fail(f"nobody else ran for {min(worst)} s")


# Races.


def to_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent.parent / "outside" / "secret.txt")


def to_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def to_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("swap", "why"),
    [
        (to_link, "is a symbolic link"),
        (to_fifo, "is no regular file"),
        (to_directory, "is no regular file"),
        (Path.unlink, "does not exist"),
    ],
)
def test_a_file_swapped_between_the_look_and_the_open(
    store: Attachments, data_dir: Path, monkeypatch: pytest.MonkeyPatch, swap: Callable[[Path], None], why: str
) -> None:
    real = os.open
    swapped = []

    def open_(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if path == b"a.txt":
            swap(data_dir / "a.txt")
            swapped.append(path)
        return real(path, flags, *args, **more)

    monkeypatch.setattr("os.open", open_)
    assert refused(lambda: load(store, "a.txt")) == ("bad_attachment", f"attachment it: {why}")
    assert swapped


def test_a_directory_swapped_under_way(store: Attachments, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is open it may go wherever it likes."""
    (data_dir.parent / "outside" / "b.txt").write_bytes(SECRET)
    real = os.open

    def open_(path: Any, flags: int, *args: Any, **more: Any) -> int:
        fd = real(path, flags, *args, **more)
        if path == b"sub":
            (data_dir / "sub").rename(data_dir / "moved")
            (data_dir / "sub").symlink_to("../outside")
        return fd

    monkeypatch.setattr("os.open", open_)
    assert load(store, "sub/b.txt").data == b"below"


def test_a_file_swapped_before_its_deletion(
    store: Attachments, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink

    def unlink(path: Any, **more: Any) -> None:
        if path == b"a.txt" and not (data_dir / "a.txt").is_symlink():
            to_link(data_dir / "a.txt")
        real(path, **more)

    monkeypatch.setattr("os.unlink", unlink)
    store.delete({"it": "a.txt"})
    assert not (data_dir / "a.txt").is_symlink()
    assert (data_dir.parent / "outside" / "secret.txt").read_bytes() == SECRET


def test_a_directory_swapped_before_the_sweep_enters_it(
    store: Attachments, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(data_dir.parent / "outside" / "secret.txt", 7200)
    real = os.open

    def open_(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if path == "sub":
            (data_dir / "sub").rename(data_dir / ".moved")
            (data_dir / "sub").symlink_to("../outside")
        return real(path, flags, *args, **more)

    monkeypatch.setattr("os.open", open_)
    assert store.sweep(3600) == 0
    assert (data_dir / "sub").is_symlink()
    assert (data_dir.parent / "outside" / "secret.txt").exists()


def test_a_live_race(store: Attachments, data_dir: Path) -> None:
    """Somebody swaps a directory for a link to the outside, and back, as fast as can be."""
    outside = data_dir.parent / "outside"
    (outside / "b.txt").write_bytes(SECRET)
    sub, aside = data_dir / "sub", data_dir / "aside"
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            sub.rename(aside)
            sub.symlink_to(outside)
            sub.unlink()
            aside.rename(sub)

    swapper = threading.Thread(target=swap)
    swapper.start()
    read, kept_out = 0, 0
    try:
        end = time.monotonic() + 20
        while (read < 200 or kept_out < 200) and time.monotonic() < end:
            try:
                assert load(store, "sub/b.txt").data == b"below"
                read += 1
            except AttachmentError:
                kept_out += 1
            store.delete({"it": "sub/missing"})
            store.sweep(3600)
    finally:
        stop.set()
        swapper.join()
        store._walk = None
    assert read
    assert kept_out
    assert (outside / "b.txt").exists()


# Types.


@pytest.mark.parametrize(
    ("leaf", "data", "media_type"),
    [
        ("x.png", PNG, "image/png"),
        ("x.txt", PNG, "image/png"),
        ("x", b"\xff\xd8\xff\xe0\x00\x10JFIF", "image/jpeg"),
        ("x", b"GIF87a\x01\0", "image/gif"),
        ("x", b"GIF89a\x01\0", "image/gif"),
        ("x", b"RIFF\x24\0\0\0WEBPVP8 ", "image/webp"),
        ("x", b"RIFF\x24\0\0\0WAVEfmt ", None),
        ("x.md", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "application/pdf"),
        ("x.txt", b"hello", "text/plain"),
        ("x", "grüße 😀".encode(), "text/plain"),
        ("x.png", b"not a png", "text/plain"),
        ("x.exe", b"MZ\x90\0\x03", None),
        ("x.txt", b"a NUL\0", None),
        ("x.txt", b"\xff\xfeh\0i\0", None),
        ("x.txt", b"latin \xe9t\xe9", None),
        ("x.txt", b"cut in a character \xc3", None),
        ("x.txt", b"a surrogate \xed\xa0\x80", None),
        ("x.txt", b"x" * (1 << 18) + b"\xc3", None),
        ("x.txt", b"x" * ((1 << 18) - 1) + b"\xc3\xbc", "text/plain"),
        ("x.txt", b"x" * (1 << 18) + b"\0", None),
        ("x.txt", b"x" * (1 << 19), "text/plain"),
        ("x.md", b"# hi", "text/markdown"),
        ("x.MarkDown", b"# hi", "text/markdown"),
        ("x.csv", b"a;b", "text/csv"),
        ("x.html", b"<p>", "text/html"),
        ("x.HTM", b"<p>", "text/html"),
        ("x.json", b"{}", "application/json"),
        ("x.json.txt", b"{}", "text/plain"),
        ("json", b"{}", "text/plain"),
        ("x.svg", b"<svg/>", "text/plain"),
        ("x.json", b"\0\1\2", None),
        ("x.pdf", b"\0\1\2", None),
        ("x.zip", b"PK\x03\x04", "text/plain"),  # without the rest of an archive
        ("x", b"PN", "text/plain"),
    ],
)
def test_the_type_is_what_the_contents_are(
    store: Attachments, data_dir: Path, leaf: str, data: bytes, media_type: str | None
) -> None:
    (data_dir / leaf).write_bytes(data)
    if media_type is not None:
        loaded = load(store, leaf)
        assert (loaded.media_type, loaded.data) == (media_type, data)
        assert loaded.is_text == (not media_type.startswith("image/") and media_type != "application/pdf")
    else:
        code, fault = refused(lambda: load(store, leaf))
        assert code == "bad_attachment"
        assert "neither UTF-8 text" in fault


def test_a_byte_order_mark_is_taken_off(store: Attachments, data_dir: Path) -> None:
    (data_dir / "x.csv").write_bytes(b"\xef\xbb\xbfa;b")
    assert load(store, "x.csv", 6) == ("it", "text/csv", b"a;b")


@pytest.mark.parametrize(
    ("allowed", "taken"),
    [
        (["text/plain", "image/png"], {"txt", "png"}),
        (["TEXT/Plain "], {"txt"}),
        (["image/*"], {"png"}),
        (["text/*"], {"txt", "md", "json"}),
        (["application/*"], {"json", "pdf"}),
        (["application/json"], {"json"}),
        (["*/*"], {"txt", "png", "md", "json", "pdf"}),
        (["*"], {"txt", "png", "md", "json", "pdf"}),
        ([], set()),
        (["text", "image", "text/", "/*", "", "image/pn", "image/pngx", "ima*/png"], set()),
    ],
)
def test_allowed_types(store: Attachments, data_dir: Path, allowed: list[str], taken: set[str]) -> None:
    files = {"txt": b"x", "md": b"x", "json": b"{}", "png": PNG, "pdf": b"%PDF-"}
    for ending, data in files.items():
        (data_dir / f"x.{ending}").write_bytes(data)
        wanted = {"it": f"x.{ending}"}
        if ending in taken:
            assert store.load(wanted, allowed, MB)["it"].data == data
        else:
            code, fault = refused(lambda wanted=wanted: store.load(wanted, allowed, MB))  # type: ignore[misc]
            assert code == "bad_attachment"
            assert "which is not allowed" in fault


def test_one_bad_file_refuses_all_and_says_nothing_of_what_is_in_it(store: Attachments, data_dir: Path) -> None:
    (data_dir / "bad").write_bytes(b"sesame\0")
    code, fault = refused(lambda: store.load({"a": "a.txt", "bad": "bad"}, ["*"], MB))
    assert code == "bad_attachment"
    assert fault.startswith("attachment bad: ")
    assert "sesame" not in fault


# Deletion.


def test_delete(store: Attachments, data_dir: Path) -> None:
    (data_dir / "unloadable").write_bytes(b"\0")
    (data_dir / "huge").touch()
    os.truncate(data_dir / "huge", 1 << 40)
    faults = store.delete(
        {
            "a": "a.txt",
            "b": f"{data_dir}/sub/b.txt",
            "not a name": "unloadable",
            "h": "huge",
            "gone": "a.txt",
            "gone2": "never/was",
            "out": "../outside/secret.txt",
            "abs": f"{data_dir.parent}/outside/secret.txt",
            "dir": "sub/deeper",
            "\n": "\0",
        }
    )
    assert [fault.partition(":")[0] for fault in faults] == [
        "attachment 'out'",
        "attachment 'abs'",
        "attachment 'dir'",
        "attachment '\\n'",
    ]
    assert sorted(path.name for path in data_dir.rglob("*")) == ["deeper", "sub"]
    assert (data_dir.parent / "outside" / "secret.txt").read_bytes() == SECRET
    assert store.delete({}) == []


def test_delete_takes_no_more_than_a_handoff_may_have(store: Attachments, data_dir: Path) -> None:
    for number in range(MAX_ATTACHMENTS + 3):
        (data_dir / f"n{number:02}").touch()
    store.delete({f"n{number}": f"n{number:02}" for number in range(MAX_ATTACHMENTS + 3)})
    assert sorted(os.listdir(data_dir)) == ["a.txt", "n32", "n33", "n34", "sub"]


# The sweep.


def age(path: Path, secs: float) -> None:
    then = time.time() - secs
    os.utime(path, (time.time(), then), follow_symlinks=False)


def test_sweep(store: Attachments, data_dir: Path) -> None:
    outside = data_dir.parent / "outside"
    (data_dir / ".keep").touch()
    (data_dir / ".dir").mkdir()
    (data_dir / ".dir" / "x").touch()
    (data_dir / "young").touch()
    (data_dir / "future").touch()
    (data_dir / "link").symlink_to("../outside/secret.txt")
    (data_dir / "linked").symlink_to("../outside")
    os.mkfifo(data_dir / "fifo")
    for path in [*data_dir.rglob("*"), *outside.rglob("*"), outside]:
        if path.name not in ("young", "future"):
            age(path, 7200)
    age(data_dir / "future", -7200)
    assert store.sweep(7300) == 0
    assert store.sweep(7100) == 2  # a.txt, sub/b.txt
    left = {str(path.relative_to(data_dir)) for path in data_dir.rglob("*")}
    assert left == {".keep", ".dir", ".dir/x", "young", "future", "link", "linked", "fifo", "sub", "sub/deeper"}
    assert (outside / "secret.txt").read_bytes() == SECRET
    assert store.sweep(7100) == 0


def test_sweep_of_a_linked_data_dir(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("uploads")
    age(data_dir / "a.txt", 100)
    assert Attachments(str(tmp_path / "link")).sweep(50) == 1


def test_a_sweep_is_bounded_and_comes_round_to_everything(
    store: Attachments, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many young files lie before the old ones, and however many directories are empty."""
    monkeypatch.setattr(attachments, "LOOKS_PER_SWEEP", 10)
    shutil.rmtree(data_dir / "sub")
    (data_dir / "a.txt").unlink()
    for number in range(20):
        (data_dir / f"dir{number}").mkdir()
        (data_dir / f"dir{number}" / "young").touch()
        (data_dir / f"dir{number}" / "old").touch()
        age(data_dir / f"dir{number}" / "old", 7200)
    looked = 0
    real = os.scandir

    class Counting:
        def __init__(self, fd: int) -> None:
            self.entries = real(fd)

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self.entries.close()

        def __iter__(self) -> Iterator[Any]:
            nonlocal looked
            for entry in self.entries:
                looked += 1
                yield entry

    monkeypatch.setattr("os.scandir", Counting)
    deleted = []
    for _ in range(7):
        looked = 0
        deleted.append(store.sweep(3600))
        assert looked <= 10
    assert sum(deleted) == 20
    assert max(deleted) <= 10
    assert store._walk is None
    assert sorted({path.name for path in data_dir.rglob("*") if path.is_file()}) == ["young"]
    (data_dir / "dir0" / "young").rename(data_dir / "dir0" / "old")
    age(data_dir / "dir0" / "old", 7200)
    assert sum(store.sweep(3600) for _ in range(6)) == 1
    store._walk = None


def test_a_store_that_goes_closes_what_its_sweep_had_open(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "LOOKS_PER_SWEEP", 1)
    before = len(os.listdir("/proc/self/fd"))
    store = Attachments(str(data_dir))
    store.sweep(3600)
    assert len(os.listdir("/proc/self/fd")) > before
    del store
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_and_sweeping_reach_equally_deep(store: Attachments, data_dir: Path) -> None:
    deep = data_dir.joinpath(*["d"] * (MAX_DEPTH - 1))
    (deep / "d").mkdir(parents=True)
    for file in (deep / "x", deep / "d" / "x"):
        file.write_bytes(b"x")
        age(file, 100)
    assert load(store, "d/" * (MAX_DEPTH - 1) + "x").data == b"x"
    assert "deep" in refused(lambda: load(store, "d/" * MAX_DEPTH + "x"))[1]
    assert store.sweep(50) == 1
    assert not (deep / "x").exists()


def test_a_sweep_amid_deletions(store: Attachments, data_dir: Path) -> None:
    """Every worker sweeps, and streams end meanwhile."""
    for number in range(2000):
        (data_dir / f"n{number}").touch()
        age(data_dir / f"n{number}", 7200)
    others = [Attachments(str(data_dir)) for _ in range(3)]
    counts: list[int] = []
    threads = [threading.Thread(target=lambda o=other: counts.append(o.sweep(3600))) for other in others]
    for thread in threads:
        thread.start()
    for number in range(0, 2000, 2):
        store.delete({"it": f"n{number}"})
    for thread in threads:
        thread.join()
    assert sorted(os.listdir(data_dir)) == ["a.txt", "sub"]
    assert sum(counts) <= 2000


def test_a_sweep_stays_on_its_filesystem(data_dir: Path) -> None:
    """In a mount namespace of its own, where it may be made."""
    (data_dir / "mounted").mkdir()
    program = (
        "import os, sys; from workers.attachments import Attachments as A;"
        "d = sys.argv[1]; open(d + '/mounted/x', 'w').close(); os.utime(d + '/mounted/x', (1, 1));"
        "os.utime(d + '/a.txt', (1, 1)); print(A(d).sweep(9), os.listdir(d + '/mounted'))"
    )
    script = 'mount -t tmpfs none "$1/mounted" || exit 77; exec "$2" -c "$3" "$1"'
    made = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(data_dir), sys.executable, program],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if made.returncode in (1, 77) and ("unshare" in made.stderr or "mount" in made.stderr):
        pytest.skip(f"no mount namespace: {made.stderr.strip()}")
    assert (made.stdout, made.stderr) == ("1 ['x']\n", "")
