"""What a file may be, and all that it may not."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkd import strictyaml
from forkd.strictyaml import Unreadable


def read(tmp_path: Path, content: str | bytes) -> object:
    path = tmp_path / "file.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return strictyaml.read(str(path))[0]


@pytest.mark.parametrize(
    ("content", "data"),
    [
        ("", None),
        ("# nothing but a comment\n", None),
        ("---\n", None),
        (b"\xef\xbb\xbfa: 1\n", {"a": 1}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a:\nb: ~\nc: null\n", {"a": None, "b": None, "c": None}),
        ("a: [1, -3, 1_000, 0x1f, 0]", {"a": [1, -3, 1000, 31, 0]}),
        ("a: [0660, 0o660, 1:30, 2026-01-01, '1']", {"a": ["0660", "0o660", "1:30", "2026-01-01", "1"]}),
        ("a: [1.5, .5, 1e3, -.inf]", {"a": [1.5, 0.5, 1000.0, float("-inf")]}),
        ("a: [yes, No, on, OFF, true]", {"a": [True, False, True, False, True]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_good(tmp_path: Path, content: str | bytes, data: object) -> None:
    assert read(tmp_path, content) == data


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x00\x01\x02", "is not text: it holds control characters"),
        (b"\xff\xfea\x00", "is not text in UTF-8 (byte 0)"),
        (b"ok: \xe4\xf6", "is not text in UTF-8 (byte 4)"),
        (b"\x7fELF\x02\x01\x01\x00", "is not text: it holds control characters"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: 'open", "line 1, column 9: found unexpected end of stream"),
        ("a: 1\n\tb: 2", "line 2, column 1: a tab, where YAML takes spaces only"),
        ("--- a\n--- b\n", "line 2, column 1: but found another document"),
        ("a: &x 1\nb: *x\n", "line 2: aliases (*name) are not accepted"),
        ("? [a, b]\n: c", "line 1, column 3: found unhashable key"),
        ("a: !!int many", "has a value that does not fit its tag (ValueError)"),
        ("a: !!bool many", "has a value that does not fit its tag (KeyError)"),
        ("a: !!timestamp many", "has a value that does not fit its tag (AttributeError)"),
        ("a: " + "9" * 5000, "has a value that does not fit its tag (ValueError)"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ("- " * 100_000, "line 1: nested too deeply"),
        ("{a: " * 17 + "1" + "}" * 17, "line 1: nested too deeply"),
        ("- 1\n" * 6000, "line 5000: more than 5000 values"),
        ("#" * (1 << 20) + "\n", "is larger than 1048576 bytes"),
    ],
)
def test_refused(tmp_path: Path, content: str | bytes, why: str) -> None:
    with pytest.raises(Unreadable) as refusal:
        read(tmp_path, content)
    assert str(refusal.value) == why


def test_nothing_is_run(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="could not determine a constructor for the tag"):
        read(tmp_path, f"a: !!python/object/apply:os.mkdir [{tmp_path}/evil]")
    assert not (tmp_path / "evil").exists()


def test_anchors_that_explode_are_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    before = time.monotonic()
    with pytest.raises(Unreadable, match="line 2: aliases"):
        read(tmp_path, bomb)
    assert time.monotonic() - before < 1


def test_duplicate_keys_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1\nb: {c: 1, d: 2, c: 3}\na: 2\n'a': 3\n")
    assert strictyaml.read(str(path)) == (
        {"a": 3, "b": {"c": 3, "d": 2}},
        [
            "line 3: the key 'a' was written before, on line 1",
            "line 4: the key 'a' was written before, on line 1",
            "line 2: the key 'c' was written before, on line 2",
        ],
    )


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # nobody writes: a blocking open would hang here
    cases = {
        str(tmp_path): "is a directory",
        str(tmp_path / "missing"): "no such file or directory",
        str(tmp_path / "fifo"): "is not a regular file",
        "/dev/zero": "is larger than 1048576 bytes",
        "": "no such file or directory",
        "a\0b": "is not a file name",
        "\ud800": "is not a file name",
        "x/" * 4000: "file name too long",
    }
    fds = len(os.listdir("/proc/self/fd"))
    for path, why in cases.items():
        with pytest.raises(Unreadable) as refusal:
            strictyaml.read(path)
        assert str(refusal.value).lower() == why
    assert len(os.listdir("/proc/self/fd")) == fds
    assert strictyaml.read("/dev/null") == (None, [])


def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    us = os.geteuid()
    try:
        if us == 0:
            os.seteuid(65534)  # root may read everything, nobody may not
        with pytest.raises(Unreadable, match="Permission denied"):
            strictyaml.read(str(path))
    finally:
        os.seteuid(us)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(alphabet="abx:- \n\t'\"[]{}#&*!|>%@?,0123456789.~<=", max_size=120).map(str.encode),
    )
)
def test_whatever_the_bytes_only_unreadable_comes_out(tmp_path: Path, content: bytes) -> None:
    why = ""
    try:
        read(tmp_path, content)
    except Unreadable as refusal:
        why = str(refusal)
    assert why.isprintable()
