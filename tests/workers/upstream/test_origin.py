"""Where an API is: what is loaded for it, and when."""

from typing import Any

from forkd.settings import OpenAiBackend
from tests.harness import wait_for
from workers.loop import Loop
from workers.offload import Offload
from workers.upstream.exchange import Failure
from workers.upstream.origin import Origin
from workers.upstream.transport import Route


class World:
    """An origin beside which jobs run; its name needs no lookup."""

    def __init__(self, api_base: str, **own: Any) -> None:
        self.loop = Loop()
        self.threads = Offload(self.loop)
        settings = OpenAiBackend(api_base=api_base, api_socket="/unused", **own)
        self.origin = Origin(settings, None, self.threads)  # type: ignore[arg-type]

    def loaded(self) -> None:
        def turned() -> bool:
            self.loop.turn()
            return not self.threads.pending

        wait_for(turned, "the certificates are loaded")

    def close(self) -> None:
        self.threads.close()
        self.loop.close()


def test_what_was_prepared_needs_no_waiting() -> None:
    world = World("https://api.test/v1")
    world.origin.prepare()
    world.origin.prepare()
    assert world.threads.pending == 1
    world.loaded()
    routes: list[Route | Failure] = []
    world.origin.reach(routes.append)
    (route,) = routes
    assert isinstance(route, Route)
    assert route.tls is not None
    world.origin.prepare()
    assert not world.threads.pending
    world.close()


def test_who_asks_meanwhile_is_answered_with_the_same() -> None:
    world = World("https://api.test/v1")
    world.origin.prepare()
    routes: list[Route | Failure] = []
    for _ in range(2):
        world.origin.reach(routes.append)
    assert world.threads.pending == 1
    assert not routes
    world.loaded()
    assert len(routes) == 2
    world.close()


def test_certificates_that_cannot_be_read_are_tried_again(tmp_path: Any) -> None:
    world = World("https://api.test/v1", ca_file=str(tmp_path / "none"))
    world.origin.prepare()
    world.loaded()
    for _ in range(2):
        failures: list[Route | Failure] = []
        world.origin.reach(failures.append)
        world.loaded()
        (failure,) = failures
        assert isinstance(failure, Failure)
        assert failure.code == "backend_untrusted"
    world.close()


def test_plain_http_needs_nothing() -> None:
    world = World("http://api.test/v1")
    world.origin.prepare()
    assert not world.threads.pending
    world.close()
