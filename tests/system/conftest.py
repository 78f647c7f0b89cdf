"""What every whole-system test has."""

import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def many_fds() -> None:
    """Room for thousands of clients in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """As tmp_path, for a daemon that root starts and that becomes `nobody`, who may not enter the tests' own one."""
    with tempfile.TemporaryDirectory(prefix="forkd-test-") as name:
        shutil.chown(name, "nobody")
        yield Path(name)
