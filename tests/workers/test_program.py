"""A program, once it runs."""

import errno
import fcntl
import os

import pytest

from tests.harness import own_fds
from tests.workers.kit import World
from workers.program import Program, Unwatched, launch
from workers.spawn import Command


class Owner:
    """Who is told."""

    slot = 3
    request_id = "r-1"

    def program_ended(self, code: int) -> None:
        raise AssertionError(code)

    def crashed(self, error: Exception) -> None:
        raise error


@pytest.mark.parametrize("watched", [0, 1])
def test_one_that_cannot_be_watched_is_no_more(world: World, watched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own_fds()
    null = os.open(os.devnull, os.O_RDWR)
    launched = launch(Command("/bin/sleep", ("sleep", "1000"), {}, None), null)
    os.close(null)
    high = fcntl.fcntl(launched.pidfd, fcntl.F_DUPFD_CLOEXEC, 900)  # above all that the selector has seen
    os.close(launched.pidfd)
    left = [None] * watched
    register = world.loop.selector.register

    def reluctant(*arguments: object) -> None:
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        register(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(world.loop.selector, "register", reluctant, raising=False)
    with pytest.raises(Unwatched):
        Program(world.context, Owner(), launched._replace(pidfd=high))
    assert own_fds() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(launched.pid, os.WNOHANG)
