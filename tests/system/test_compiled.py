"""A daemon on the compiled modules, and on their sources where somebody edited one."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from forkd import compiled
from tests.harness import Forkd, running, wait_for
from tests.system.succession import family, upgrade

EDITED = "workers.sse"


@contextlib.contextmanager
def daemon(packages: Path, directory: Path, **environ: str) -> Iterator[Forkd]:
    """A daemon of these packages, of which no master is left at the end."""
    popen = {"env": {**os.environ, "PYTHONPATH": str(packages), **environ}, "cwd": packages}
    command = (sys.executable, "-m", "forkd")
    try:
        with running(directory, popen=popen, command=command, config={"workers": {"count": 1}}) as forkd:
            yield forkd
    finally:
        for process in family(directory):
            with contextlib.suppress(psutil.Error):
                process.kill()


def on_compiled(forkd: Forkd) -> bool:
    """Whether the master and its workers have the library of these packages in their memory, all or none."""
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (forkd.pid, *forkd.workers())]
    (found,) = {f"packages/forkd/_compiled/{compiled.file_of(compiled.LIBRARY)}" in text for text in maps}
    return found


def surprises(forkd: Forkd) -> list[str]:
    """The warnings that it runs on the sources."""
    return [line for line in forkd.log().splitlines() if " WARNING master: running on the sources" in line]


def edit(packages: Path) -> None:
    with compiled.source_of(EDITED, packages).open("a") as source:
        source.write("# another comment\n")


def test_edited_sources_are_what_runs(packages: Path, tmp_path: Path) -> None:
    edit(packages)
    with daemon(packages, tmp_path) as forkd:
        assert not on_compiled(forkd)
        assert forkd.ask().complete
        (warning,) = surprises(forkd)
        assert warning.endswith(f"which takes more CPU: changed since it was compiled: {EDITED}")


def test_sources_that_were_asked_for_are_no_surprise(packages: Path, tmp_path: Path) -> None:
    with daemon(packages, tmp_path, FORKD_COMPILED="0") as forkd:
        assert not on_compiled(forkd)
        assert forkd.ask().complete
        assert surprises(forkd) == []


def test_each_upgrade_chooses_again(packages: Path, tmp_path: Path) -> None:
    with daemon(packages, tmp_path) as forkd:
        assert on_compiled(forkd)
        assert forkd.ask().complete
        upgrade(forkd)
        assert on_compiled(forkd)
        assert forkd.ask().complete
        assert surprises(forkd) == []
        source = compiled.source_of(EDITED, packages)
        before = source.read_bytes()
        edit(packages)
        upgrade(forkd)
        assert not on_compiled(forkd)
        assert forkd.ask().complete
        assert len(surprises(forkd)) == 1
        source.write_bytes(before)
        upgrade(forkd)
        assert on_compiled(forkd)
        assert forkd.ask().complete
        assert len(surprises(forkd)) == 1


def test_a_daemon_outlives_what_it_was_compiled_to(packages: Path, tmp_path: Path) -> None:
    """As when another is installed in its place: its workers go on, and so do those that replace them."""
    with daemon(packages, tmp_path) as forkd:
        shutil.rmtree(packages / "forkd/_compiled")
        (worker,) = forkd.workers()
        assert forkd.ask().complete
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: forkd.workers() not in ([], [worker]), "another worker")
        assert forkd.ask().complete
