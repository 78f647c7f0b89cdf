"""What every test shares."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Examples may take long on a machine that is busy with other things; that is no fault of theirs.
settings.register_profile("forkd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("forkd")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """As tmp_path, for a daemon that root starts and that becomes `nobody`, who may not enter the tests' own one."""
    with tempfile.TemporaryDirectory(prefix="forkd-test-") as name:
        shutil.chown(name, "nobody")
        yield Path(name)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A copy of forkd's packages, compiled, for a test to damage."""
    path = tmp_path / "packages"
    for name in ("forkd", "workers"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__", "htdocs"))
    return path
