"""What several tests of upstreams need."""

from pathlib import Path

import pytest

from tests.fake_api.certificates import Certificates


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """An authority of the test's own, and what it signed."""
    return Certificates(tmp_path)
