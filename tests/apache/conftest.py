"""Fixtures of the Apache tests: one server per MPM for each module, a daemon's socket directory per server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from handoff_site import Site, make_docroot, site_conf
from harness import Apache, public_dir

MPMS = ("prefork", "worker", "event")


@pytest.fixture(scope="module", params=MPMS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with public_dir() as docroot, public_dir() as prefix:
        make_docroot(docroot)
        conf = f"Define DOCROOT {docroot}\n" + site_conf(prefix)
        with Apache(request.param, docroot, prefix, conf, modules=("include", "cgi")) as apache:
            yield Site(apache, prefix, docroot)


@pytest.fixture
def small_site() -> Iterator[tuple[Path, Path]]:
    """A document root and a prefix for tests that start a server of their own."""
    with public_dir() as docroot, public_dir() as prefix:
        make_docroot(docroot)
        yield docroot, prefix
