"""What every whole-system test has."""

import resource

import pytest


@pytest.fixture(scope="session", autouse=True)
def many_fds() -> None:
    """Room for thousands of clients in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
