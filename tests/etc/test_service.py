"""The service's files: what is installed where, what stays, and that systemd understands them. Nothing is started.

Into a DESTDIR, so without root. What scripts/install does besides is in test_install.py.
"""

import os
import re
import stat
import subprocess
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import pytest

from forkd.settings import Server

ROOT = Path(__file__).resolve().parents[2]
ETC = ROOT / "etc"

Run = Callable[..., str]


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    path = tmp_path / "dest dir"
    path.mkdir()
    return path


@pytest.fixture
def run(dest: Path) -> Run:
    def run(script: str, **environ: str) -> str:
        clean = {key: value for key, value in os.environ.items() if key not in ("PREFIX", "PURGE")}
        done = subprocess.run(
            [ROOT / "scripts" / script],
            env={**clean, "DESTDIR": str(dest), **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def environment(dest: Path) -> None:
    """What scripts/install makes, as far as scripts/uninstall looks at it."""
    binaries = dest / "opt/forkd/bin"
    binaries.mkdir(parents=True)
    (binaries / "forkd").touch(mode=0o755)
    (dest / "opt/forkd/pyvenv.cfg").touch()
    (dest / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    (dest / "usr/local/bin/forkd").symlink_to("/opt/forkd/bin/forkd")


def files(dest: Path) -> set[str]:
    return {str(path.relative_to(dest)) for path in dest.rglob("*") if not path.is_dir() or path.is_symlink()}


# Installing.


def test_everything_has_its_place(dest: Path, run: Run) -> None:
    run("install-service")
    there = files(dest)
    assert {path for path in there if "/doc/" not in path} == {
        "etc/forkd.yaml",
        "etc/logrotate.d/forkd",
        "usr/local/lib/systemd/system/forkd.service",
        "usr/local/lib/systemd/system/forkd.socket",
        "usr/local/lib/tmpfiles.d/forkd.conf",
        "usr/local/share/forkd/forkd.yaml",
        "usr/local/share/forkd/grafana/forkd.json",
        "usr/local/share/forkd/prometheus/forkd.rules.yml",
        "usr/local/share/forkd/prometheus/forkd.yml",
    }
    assert "usr/local/share/doc/forkd/systemd.md" in there
    assert stat.S_IMODE((dest / "etc/forkd.yaml").stat().st_mode) == 0o640
    assert stat.S_IMODE((dest / "var/log/forkd").stat().st_mode) == 0o750


def test_the_pages_links_lead_somewhere(dest: Path, run: Run) -> None:
    run("install-service")
    doc = dest / "usr/local/share/doc/forkd"
    links = {
        (page.name, target.partition("#")[0])
        for page in doc.glob("*.md")
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not target.startswith(("https:", "http:", "#"))
    }
    assert {("README.md", "operations.md"), ("any-language.md", "apache/htdocs/stream.php")} <= links
    dead = {(page, to) for page, to in links if not (dest / to[1:] if to.startswith("/") else doc / to).exists()}
    assert not dead
    assert os.access(doc / "apache/examples/stream.cgi", os.X_OK)


def test_what_an_operator_edited_stays(dest: Path, run: Run) -> None:
    run("install-service")
    edited = [dest / "etc/forkd.yaml", dest / "etc/logrotate.d/forkd"]
    for file in edited:
        file.write_text("mine\n")
    unit = dest / "usr/local/lib/systemd/system/forkd.service"
    unit.write_text("[Unit]\n")
    said = run("install-service")
    assert "kept your" in said
    assert [file.read_text() for file in edited] == ["mine\n", "mine\n"]
    assert unit.read_text() == (ETC / "systemd/forkd.service").read_text()


def test_removing_keeps_what_is_the_operators(dest: Path, run: Run) -> None:
    environment(dest)
    run("install-service")
    said = run("uninstall")
    assert files(dest) == {"etc/forkd.yaml"}
    assert (dest / "var/lib/forkd").is_dir()
    assert f"kept {dest}/etc/forkd.yaml" in said
    run("uninstall")  # twice does no harm


def test_removing_keeps_an_edited_rotation(dest: Path, run: Run) -> None:
    run("install-service")
    (dest / "etc/logrotate.d/forkd").write_text("mine\n")
    assert f"kept {dest}/etc/logrotate.d/forkd" in run("uninstall")


def test_purging_leaves_nothing(dest: Path, run: Run) -> None:
    environment(dest)
    run("install-service")
    run("uninstall", PURGE="1")
    assert files(dest) == set()
    assert not (dest / "var/lib/forkd").exists()
    assert not (dest / "var/log/forkd").exists()


def test_what_is_not_forkds_is_not_removed(dest: Path, run: Run) -> None:
    own = dest / "opt/other"
    own.mkdir(parents=True)
    (own / "file").touch()
    (dest / "usr/local/bin").mkdir(parents=True)
    (dest / "usr/local/bin/forkd").symlink_to("/somewhere/else")
    with pytest.raises(AssertionError, match="is no virtual environment with forkd in it"):
        run("uninstall", PREFIX="/opt/other")
    run("uninstall")
    assert files(dest) == {"opt/other/file", "usr/local/bin/forkd"}


# The units.


def service() -> dict[str, str]:
    """The last value of each key of [Service]."""
    parser = ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ETC / "systemd/forkd.service")
    return dict(parser["Service"])


def test_systemd_understands_the_units(dest: Path, run: Run) -> None:
    environment(dest)
    run("install-service")
    # Only the programs and the targets that the units refer to are missing under DESTDIR.
    (dest / "bin").mkdir()
    (dest / "bin/kill").touch(mode=0o755)
    (dest / "usr/local/bin/forkd").unlink()
    (dest / "usr/local/bin/forkd").touch(mode=0o755)
    units = dest / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for target in ("sysinit", "basic", "shutdown", "network", "sockets", "nss-lookup", "multi-user"):
        (units / f"{target}.target").write_text("[Unit]\nDescription=x\nDefaultDependencies=no\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={dest}", "forkd.service", "forkd.socket"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_exposure_is_low() -> None:
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            "--no-pager",
            "--threshold=19",
            ETC / "systemd/forkd.service",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_tells_the_true_exposure() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", ETC / "systemd/forkd.service"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = re.search(r"exposure level for forkd.service: ([0-9.]+)", done.stdout)
    assert found
    # Other versions of systemd may count a little more or less.
    said = re.search(r"`systemd-analyze security forkd` says ([0-9.]+)", (ROOT / "docs/systemd.md").read_text())
    assert said
    assert abs(float(said[1]) - float(found[1])) < 0.2


def test_streams_have_time_to_finish() -> None:
    assert float(service()["TimeoutStopSec"]) > Server().shutdown_timeout_secs + 10


def test_there_are_enough_fds() -> None:
    assert int(service()["LimitNOFILE"]) > Server().max_connections + Server().max_pending_handoffs


def test_the_socket_is_the_daemons() -> None:
    socket = (ETC / "systemd/forkd.socket").read_text()
    assert "ListenSequentialPacket=/run/forkd/forkd.sock\n" in socket
    assert "SocketMode=0660\n" in socket
    example = (ETC / "forkd.yaml").read_text()
    assert re.search(r"^  socket_group: www-data\b", example, re.MULTILINE)
    assert "SocketGroup=www-data\n" in socket
    assert re.search(rf"^  user: {service()['User']}\b", example, re.MULTILINE)
    assert f"SocketUser={service()['User']}\n" in socket
