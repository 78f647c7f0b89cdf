"""scripts/compile.py, on packages with one small module, which takes seconds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from forkd import compiled

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/compile.py"
SOURCE = "def twice(number: int) -> int:\n    return 2 * number\n"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A forkd whose only hot module is forkd.tiny."""
    path = tmp_path / "packages"
    (path / "forkd").mkdir(parents=True)
    (path / "forkd/__init__.py").touch()
    (path / "forkd/tiny.py").write_text(SOURCE)
    text, count = re.subn(
        r"^MODULES: Final = \(.*?^\)",
        'MODULES: Final = ("forkd.tiny",)',
        Path(compiled.__file__).read_text(),
        flags=re.M | re.S,
    )
    assert count == 1
    (path / "forkd/compiled.py").write_text(text)
    return path


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(packages: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments, packages],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def refused(packages: Path, **environ: str) -> str:
    """What it says when it does not compile."""
    done = run(packages, **environ)
    assert done.returncode == 1
    assert done.stderr.startswith("forkd: not compiled: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def chosen(packages: Path) -> str:
    """Where a child has forkd.tiny from, after its first answer."""
    program = (
        "from forkd import compiled; compiled.prefer(); from forkd import tiny; print(tiny.twice(2), tiny.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()} - {"__pycache__"}


def test_it_compiles_once_and_replaces_all_or_nothing(packages: Path) -> None:
    directory = packages / "forkd/_compiled"
    assert run(packages, "--check").returncode == 1
    assert not directory.exists()
    done = run(packages)
    assert (done.returncode, done.stderr) == (0, "")
    files = {compiled.file_of(name) for name in (compiled.LIBRARY, "forkd.tiny")}
    assert names(directory) == {*files, compiled.MANIFEST}
    assert names(packages / "forkd") == {"__init__.py", "tiny.py", "compiled.py", "_compiled"}
    assert chosen(packages) == f"4 {directory / compiled.file_of('forkd.tiny')}"

    # Nothing to do.
    before = directory.stat()
    done = run(packages)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run(packages, "--check").returncode == 0
    assert directory.stat() == before

    # What cannot be compiled leaves what there is, which is good again with the old source.
    (packages / "forkd/tiny.py").write_text(SOURCE.replace("2", "'two'"))
    assert "tiny.py:2" in refused(packages)
    assert directory.stat() == before
    (packages / "forkd/tiny.py").write_text(SOURCE)
    assert run(packages, "--check").returncode == 0

    # Replaced: another directory of other files, and nothing else is left.
    old = (directory / compiled.file_of(compiled.LIBRARY)).open("rb")
    with old:
        (packages / "forkd/tiny.py").write_text(SOURCE.replace("2", "3"))
        assert run(packages).returncode == 0
        assert os.fstat(old.fileno()).st_nlink == 0
    assert directory.stat().st_ino != before.st_ino
    assert names(packages / "forkd") == {"__init__.py", "tiny.py", "compiled.py", "_compiled"}
    assert chosen(packages) == f"6 {directory / compiled.file_of('forkd.tiny')}"


def test_what_is_missing_is_named_before_any_work(
    packages: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no C compiler, /nonexistent/cc (Debian: gcc libc6-dev)" in refused(
        packages, CC="/nonexistent/cc -O2"
    )
    with monkeypatch.context() as patch:
        patch.setattr(script.sysconfig, "get_path", lambda _: "/nonexistent")
        with pytest.raises(
            script.CompileError, match=r"^/nonexistent/Python.h is missing \(Debian: python3\.\d+-dev\)$"
        ):
            script.check_tools()
    with monkeypatch.context() as patch:
        patch.setattr(script.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(script.CompileError, match=r"^missing: mypyc and setuptools"):
            script.check_tools()


def test_a_compiler_that_fails(packages: Path) -> None:
    refused(packages, CC="/bin/false")
    assert names(packages / "forkd") == {"__init__.py", "tiny.py", "compiled.py"}


def test_a_source_that_is_edited_meanwhile(packages: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would be of one of both, and nobody knows of which."""

    def build(*_: object) -> None:
        (packages / "forkd/tiny.py").write_text(SOURCE + "# another comment\n")

    monkeypatch.setattr(script, "build", build)
    monkeypatch.chdir(packages)
    with pytest.raises(script.CompileError, match="a source was edited meanwhile"):
        script.compile_all(script.load(packages), packages)


@pytest.mark.parametrize("slice_of", ["f():", ":f()", "::f()", "1 : len(f())", "(n := 1) :", "i + f() : j"])
def test_calls_in_slices_are_refused(tmp_path: Path, script: ModuleType, slice_of: str) -> None:
    file = tmp_path / "module.py"
    file.write_text(f"a = 1\nb = x[{slice_of}]\n")
    with pytest.raises(ValueError, match=r"module\.py:2: mypyc would do twice what is called in a slice"):
        script.refuse_effects_in_slices([str(file)])


@pytest.mark.parametrize("subscript", ["f()", "i : j + 1", "len(y) :", "-len(y) : len(z)", "i.j : k[0]"])
def test_slices_without_effects_are_not(tmp_path: Path, script: ModuleType, subscript: str) -> None:
    file = tmp_path / "module.py"
    file.write_text(f"b = x[{subscript}]\n")
    script.refuse_effects_in_slices([str(file)])
