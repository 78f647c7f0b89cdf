"""What forkd runs on: the compiled modules or their sources. Each case asks a child process what it chose.

The compiled ones are those of this checkout: `make test` and `make compile` make them.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import forkd
from forkd import cli, compiled

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = compiled.file_of(compiled.LIBRARY)


def run(packages: Path, *arguments: str, before: tuple[str, ...] = (), **environ: str) -> str:
    """What Python with these arguments prints, if all is well, when these packages are its forkd."""
    done = subprocess.run(
        [*before, sys.executable, "-P", *arguments],
        env={**os.environ, "PYTHONPATH": str(packages), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def chosen(packages: Path, **environ: str) -> str:
    """What `forkd -V` says that it runs on."""
    begin = f"forkd {forkd.__version__} ("
    said = run(packages, "-m", "forkd", "-V", **environ)
    assert said.startswith(begin)
    return said[len(begin) : -1]


def directory(packages: Path) -> Path:
    return packages / "forkd/_compiled"


def edit(packages: Path, module: str) -> None:
    with compiled.source_of(module, packages).open("a") as source:
        source.write("# another comment\n")


def rewrite(packages: Path, **changes: str) -> None:
    """Have the manifest say something else."""
    file = directory(packages) / compiled.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# The choice.


def test_the_same_sources_are_run_compiled(packages: Path) -> None:
    assert chosen(packages) == "compiled"


def test_one_edited_source_has_all_run_as_sources(packages: Path) -> None:
    edit(packages, "workers.sse")
    assert chosen(packages) == "sources: changed since it was compiled: workers.sse"


def test_of_many_edited_sources_some_are_named(packages: Path) -> None:
    for name in compiled.MODULES[:5]:
        edit(packages, name)
    named = ", ".join(compiled.MODULES[:3])
    assert chosen(packages) == f"sources: changed since it was compiled: {named} and 2 more"


def test_a_source_that_is_not_compiled_may_be_edited(packages: Path) -> None:
    edit(packages, "forkd.status")
    assert chosen(packages) == "compiled"


def test_another_version_of_python(packages: Path) -> None:
    rewrite(packages, python=".cpython-310-x86_64-linux-gnu.so")
    assert chosen(packages) == "sources: compiled for another Python"


def test_the_switch(packages: Path) -> None:
    assert chosen(packages, FORKD_COMPILED="0") == f"sources: {compiled.SWITCHED_OFF}"
    assert chosen(packages, FORKD_COMPILED="1") == "compiled"


def test_never_compiled(packages: Path) -> None:
    shutil.rmtree(directory(packages))
    assert chosen(packages) == f"sources: {compiled.NEVER}"


def test_a_module_that_is_imported_already(packages: Path) -> None:
    said = run(packages, "-c", "import workers.sse; from forkd import compiled; print(compiled.prefer())")
    assert said == "workers.sse is imported already"


# Damage. None may cost more than the compilation.


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b'{"python": 3}', b"{}"])
def test_a_manifest_of_garbage(packages: Path, content: bytes) -> None:
    (directory(packages) / compiled.MANIFEST).write_bytes(content)
    assert chosen(packages).startswith("sources: ")


def no_directory(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file")


@pytest.mark.parametrize("damage", [lambda path: (path / compiled.MANIFEST).unlink(), no_directory])
def test_no_manifest(packages: Path, damage: Callable[[Path], None]) -> None:
    damage(directory(packages))
    assert "manifest.json cannot be read" in chosen(packages)


def test_a_directory_that_may_not_be_read(packages: Path) -> None:
    directory(packages).chmod(0)
    # Root without the right to read everything all the same.
    mortal = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    said = run(packages, "-m", "forkd", "-V", before=mortal)
    directory(packages).chmod(0o755)
    assert "manifest.json cannot be read: [Errno 13] Permission denied" in said


@pytest.mark.parametrize("name", [compiled.LIBRARY, "workers.sse"])
def test_a_library_that_is_not_the_one_that_was_made(packages: Path, name: str) -> None:
    """Cut short, it may kill the process that loads it; so it is not even tried."""
    file = directory(packages) / compiled.file_of(name)
    os.truncate(file, file.stat().st_size // 2)
    assert chosen(packages) == f"sources: changed since it was compiled: {file.name}"
    file.unlink()
    assert chosen(packages) == f"sources: changed since it was compiled: {file.name}"


def test_a_library_that_this_machine_cannot_load(packages: Path) -> None:
    (directory(packages) / LIBRARY).write_bytes(b"made for another machine")
    rewrite(packages, **{LIBRARY: compiled.manifest(packages, directory(packages))[LIBRARY]})
    assert chosen(packages).startswith("sources: cannot be loaded: ")
    program = "from forkd import compiled; compiled.prefer(); import workers.sse; print(workers.sse.__file__)"
    assert run(packages, "-c", program) == str(compiled.source_of("workers.sse", packages))


# What was compiled.


def test_every_module_can_be_the_first_to_be_imported_and_is_compiled() -> None:
    program = """
import importlib, os
from forkd import compiled
assert compiled.prefer() == "", compiled.mismatch()
for name in compiled.MODULES:
    if os.fork() == 0:
        file = importlib.import_module(name).__file__
        assert file == str(compiled.COMPILED / compiled.file_of(name)), file
        os._exit(0)
    assert os.wait()[1] == 0, name
"""
    run(ROOT, "-c", program)


def test_nothing_that_compiles_is_needed_to_run() -> None:
    program = """
import importlib, sys
from forkd import compiled
compiled.prefer()
for name in ("forkd.cli", *compiled.MODULES):
    importlib.import_module(name)
print({name.partition(".")[0] for name in sys.modules} & {"librt", "mypy", "mypyc", "mypy_extensions", "setuptools"})
"""
    assert run(ROOT, "-c", program) == "set()"


def test_who_imports_forkd_has_the_sources() -> None:
    """As these tests do, and the handlers' authors."""
    modules = [sys.modules[name] for name in compiled.MODULES if name in sys.modules]
    assert modules
    assert cli.__name__ in sys.modules
    assert {Path(module.__file__ or "").suffix for module in modules} == {".py"}


def test_only_what_nobody_asked_for_is_a_surprise() -> None:
    expected = ("", compiled.UNASKED, compiled.SWITCHED_OFF, compiled.NEVER)
    assert [compiled.is_a_surprise(why_not) for why_not in (*expected, "compiled for another Python")] == [
        *[False] * 4,
        True,
    ]
