"""`make install`, whole, into a DESTDIR. What pip would fetch, scripts/bootstrap has fetched before (build/wheels)."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forkd
from forkd import compiled

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = compiled.file_of(compiled.LIBRARY)

Install = Callable[..., str]


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    path = tmp_path / "dest dir"
    path.mkdir()
    return path


@pytest.fixture
def install(dest: Path) -> Install:
    """Installs; returns what that said. With the Python that it chooses by itself."""
    unwanted = ("PREFIX", "PYTHON", "COMPILE", "PYTHONPATH")
    clean = {key: value for key, value in os.environ.items() if key not in unwanted}
    clean |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(ROOT / "build/wheels")}

    def install(**environ: str) -> str:
        done = subprocess.run(
            [ROOT / "scripts/install"],
            env={**clean, "DESTDIR": str(dest), **environ},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return install


def python(dest: Path, *arguments: str | Path) -> "subprocess.Popen[str]":
    """What is installed, run where it is: its `forkd` says /opt/forkd/bin/python, which is not there."""
    command = [dest / "opt/forkd/bin/python", "-I", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")


def version(dest: Path) -> str:
    process = python(dest, dest / "opt/forkd/bin/forkd", "-V")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return said.strip()


@pytest.fixture
def running(dest: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Starts a process that runs on what is compiled, and imports one module more when it gets a line."""
    program = (
        "from forkd import compiled; print(compiled.prefer(), flush=True); input();"
        "from workers import sse; print(sse.__file__)"
    )
    started = []

    def running() -> "subprocess.Popen[str]":
        process = python(dest, "-c", program)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        return process

    yield running
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.timeout(900)
def test_it_is_installed_compiled_and_updated_under_a_running_one(
    dest: Path, install: Install, running: Callable[[], "subprocess.Popen[str]"]
) -> None:
    install()
    assert version(dest) == f"forkd {forkd.__version__} (compiled)"
    (library,) = dest.glob(f"opt/forkd/lib/*/site-packages/forkd/_compiled/{LIBRARY}")
    assert not list(dest.rglob("mypy*"))
    assert list((library.parents[1] / "htdocs").glob("*.js"))

    # The same again: other files, never the same ones written over, which would kill whoever runs on them.
    process = running()
    with library.open("rb") as old:
        install()
        assert os.fstat(old.fileno()).st_nlink == 0
    assert f"/_compiled/{LIBRARY} (deleted)\n" in Path(f"/proc/{process.pid}/maps").read_text()
    said, _ = process.communicate("\n", timeout=60)
    assert (process.returncode, said) == (0, f"{library.with_name(compiled.file_of('workers.sse'))}\n")
    assert version(dest) == f"forkd {forkd.__version__} (compiled)"

    # By request, or for want of a compiler: without, and it says so.
    (said,) = [line for line in install(COMPILE="0").splitlines() if "uncompiled" in line]
    assert "apt-get install gcc libc6-dev python3-dev" in said
    assert version(dest) == f"forkd {forkd.__version__} (sources: {compiled.NEVER})"
    assert not library.parent.exists()
