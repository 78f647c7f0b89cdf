"""Drives load.c, the generator, through one run, and reads what it recorded."""

import json
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from daemon import Daemon
from shape import Shape

RECORD = struct.Struct("=qqqqii")  # as struct record in load.c
FATES = ("whole", "refused", "wrong", "truncated", "reset", "timed out", "unsent")  # as enum fate in load.c

# How long after the last handoff's natural end the generator waits for stragglers before it calls them lost.
GRACE_SECS = 30


class LoadError(Exception):
    """The generator itself failed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the clients saw. Times in ms; the lists have one entry per stream that got so far."""

    ttfb_ms: list[float]
    gap_ms: list[float]
    tail_ms: list[float]  # last byte to EOF
    late_ms: list[float]  # behind the schedule when handed over: a generator that cannot keep up shows here
    fates: dict[str, int]
    live_peak: int
    connect_retries: int
    secs: float  # from the first handoff to the last stream's end
    generator_cpu_secs: float
    explanation: str  # the first stream that went wrong

    @property
    def lost(self) -> int:
        """Streams that did not come whole and in order."""
        return sum(count for fate, count in self.fates.items() if fate != "whole")


class Generator:
    """One run of load.c, from "ready" to "done"."""

    def __init__(self, program: Path, shape: Shape, daemon: Daemon, directory: Path) -> None:
        """Start it; it waits. `directory` receives its files."""
        self._result, self._stderr = directory / "records", directory / "load.err"
        body_path = directory / "body"
        body_path.write_bytes(daemon.body)
        timeout_ms = (shape.stream_secs + GRACE_SECS) * 1000
        command = [
            *(str(program), *_switches(shape, daemon), str(daemon.socket_path), str(shape.streams)),
            *(f"{shape.over_secs * 1000:.3f}", f"{timeout_ms:.3f}", daemon.data, str(body_path), str(self._result)),
        ]
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        try:
            self._expect("ready")
        except LoadError:
            self.close()
            raise

    def run(self, when_live: Callable[[int], None]) -> Outcome:
        """Begin, call `when_live(count)` once all streams have their first byte, and wait for the end.

        Between these moments this process sleeps in a read: the two CPUs belong to the daemon and the generator.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        when_live(int(self._expect("live")))
        summary = json.loads(self._expect("done"))
        records = list(RECORD.iter_unpack(self._result.read_bytes()))
        return Outcome(
            ttfb_ms=[record[1] / 1e6 for record in records if record[1] >= 0],
            gap_ms=[record[2] / 1e6 for record in records if record[1] >= 0],
            tail_ms=[record[3] / 1e6 for record in records if record[3] >= 0],
            late_ms=[record[0] / 1e6 for record in records],
            fates=dict(Counter(FATES[record[5]] for record in records)),
            live_peak=summary["live_peak"],
            connect_retries=summary["connect_retries"],
            secs=summary["secs"],
            generator_cpu_secs=summary["cpu_secs"],
            explanation=self._stderr.read_text(errors="replace").strip(),
        )

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def _expect(self, word: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(word):
            raise LoadError(f"expected {word!r}, got {line!r}: {self._stderr.read_text(errors='replace').strip()}")
        return line.removeprefix(word).strip()


def _switches(shape: Shape, daemon: Daemon) -> tuple[str, ...]:
    if daemon.over_http:
        return ("-u",)
    return (*(("-t",) if shape.tcp else ()), *(("-p",) if shape.persistent else ()))
