"""`make install-module` and `make uninstall-module`, into a directory of the test's."""

import subprocess
from pathlib import Path

from harness import ROOT, build_module


def make(target: str, directory: Path, *arguments: str) -> None:
    command = ["make", "-s", "-C", str(ROOT / "apache"), target, f"DESTDIR={directory}", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def test_what_is_installed_can_be_removed(tmp_path: Path) -> None:
    build_module()
    make("install-module", tmp_path)
    (conf,) = tmp_path.rglob("socket_handoff.conf")
    conf.write_text("# the operator's own\n")
    make("install-module", tmp_path)
    assert files(tmp_path) == {"mod_socket_handoff.so", "socket_handoff.load", "socket_handoff.conf"}
    assert conf.read_text() == "# the operator's own\n"
    make("uninstall-module", tmp_path)
    assert files(tmp_path) == {"socket_handoff.conf"}
    make("uninstall-module", tmp_path, "PURGE=1")
    assert files(tmp_path) == set()
