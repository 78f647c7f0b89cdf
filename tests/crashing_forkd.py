"""forkd whose mock backend misbehaves on demand, so that the product needs no hooks for the tests of death and
recovery.

A prompt of the form ACT@WHERE makes the worker that streams it do ACT. WHERE is a number: before the answer's n-th step
(0: as soon as the backend is asked); or `write`: instead of the stream's first write, `written`: right after it,
`done`: right after the write that ends the answer. Any other prompt is answered as always, and `flood` without end.

It runs on the sources, whose insides it replaces; compiled modules call each other without looking for replacements.

While the file named by FORKD_TEST_BROKEN exists, workers die before they are ready; while that of FORKD_TEST_HUNG does,
they do not get ready.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

real_write = os.write


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spin() -> NoReturn:
    while True:
        pass


def fail() -> NoReturn:
    raise RuntimeError("the backend is broken")


ACTS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "stop": stop,
    "spin": spin,
    "fail": fail,
    "exit": lambda: os._exit(3),
}

marked: set[int] = set()


def write(fd: int, data: bytes) -> int:
    """os.write, with the acts that belong around it. The stream's text is its prompt, which is how it is known here."""
    if b'{"content":"kill@write"' in data:
        kill()
    if b'{"content":"kill@done"' in data:
        marked.add(fd)
    sent = real_write(fd, data)
    if b'{"content":"kill@written"' in data or (fd in marked and b"[DONE]" in data):
        kill()
    return sent


os.write = write  # before anything of forkd is imported

from forkd import cli  # noqa: E402
from forkd.settings import MockBackend as MockSettings  # noqa: E402
from workers.backends import registry  # noqa: E402
from workers.backends.mock import MockBackend  # noqa: E402
from workers.request import HandoffData  # noqa: E402


class MisbehavingBackend(MockBackend):
    """The mock backend, but for the prompts of this module's docstring."""

    def steps(self, data: HandoffData) -> Iterator[tuple[float, str]]:
        act, _, where = (data.prompt or "").partition("@")
        if act == "flood":
            return itertools.repeat((0.01, "~" * 65536))
        if act not in ACTS:
            return super().steps(data)
        if where == "0":
            ACTS[act]()
        if not where.isdigit():
            return iter([(0.0, f"{act}@{where}"), (0.0, "")])
        return self._until(int(where), ACTS[act], super().steps(data))

    @staticmethod
    def _until(count: int, act: Callable[[], None], steps: Iterator[tuple[float, str]]) -> Iterator[tuple[float, str]]:
        for number, step in enumerate(steps, 1):
            if number == count:
                act()
            yield step


def build(name: str, own: MockSettings) -> MisbehavingBackend:
    """What the registry calls, in each worker, before it is ready."""
    broken = os.environ.get("FORKD_TEST_BROKEN")
    if broken and os.path.exists(broken):
        os._exit(7)
    hung = os.environ.get("FORKD_TEST_HUNG")
    while hung and os.path.exists(hung):
        time.sleep(0.01)
    return MisbehavingBackend(name, own.text, own.token_delay_ms / 1000)


registry.FACTORIES[MockSettings] = build

if __name__ == "__main__":
    sys.exit(cli.main())
