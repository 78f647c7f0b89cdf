"""How soon the API sees that a client is gone: `python -m tests.system.cancellation` measures it in every way.

The time is from just before the client's RST until the fake API, in a thread of this process, was told of the reset of
its stream or connection.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.harness import reset
from tests.system.relaying import relaying, way

TIMES: Final = 20
MOMENTS: Final = {"before the head": "gate-headers", "before the first token": "gate-body", "after it": "gate-tokens"}


def measured(name: str, pattern: str) -> list[float]:
    """So many cancellations, in milliseconds."""
    found = []
    with tempfile.TemporaryDirectory() as directory, relaying(Path(directory), **way(name, Path(directory))) as relay:
        for number in range(TIMES):
            client = relay.forkd.hand_over(b'{"prompt":"Hello","test_pattern":"%s"}' % pattern.encode(), tcp=True)
            seen = relay.api.wait_for(lambda api, at=number: api.requests[at:], "the request")[0]
            relay.api.wait_for(lambda api: api.gate.waiting, "the answer at the gate")
            if pattern == "gate-tokens":
                relay.api.gate.let(2)
                while b"data: " not in client.recv(4096):
                    pass
                relay.api.wait_for(lambda api: api.gate.waiting, "the answer at the gate")
            gone = time.monotonic()
            reset(client)
            relay.api.wait_for(lambda api, seen=seen: seen.cancelled_at, "the cancellation")
            assert seen.cancelled_at is not None
            found.append((seen.cancelled_at - gone) * 1000)
    return found


def main() -> None:
    """A row of the table in docs/performance.md for each."""
    for name in ("http1", "h2", "h2-tls"):
        for moment, pattern in MOMENTS.items():
            times = measured(name, pattern)
            print(f"| {name} | {moment} | {statistics.median(times):.1f} | {max(times):.1f} |", flush=True)


if __name__ == "__main__":
    main()
