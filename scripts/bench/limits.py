"""What forkd has to reach, and whether it did."""

from collections.abc import Mapping
from dataclasses import dataclass

from results import Comparison
from subjects import Forkd


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is allowed, of medians over the runs. None: no limit is set for such a configuration."""

    cpu_ratio: float | None  # CPU per stream, floor = 1
    memory_kb: float | None  # per live stream
    ttfb_over_floor_ms: float | None  # time to first byte, p99


@dataclass(frozen=True, slots=True)
class Check:
    """One limit held against one figure."""

    what: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        """A figure equal to its limit is within it."""
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.what}: {round(self.value, 2):g}, limit {self.limit:g}: {'ok' if self.ok else 'EXCEEDED'}"


_CPU_RATIOS: Mapping[tuple[str, int], float] = {("mock", 1): 4.0, ("mock", 2): 5.0}
_MEMORY_KB: Mapping[str, float] = {"mock": 1.5}
_TTFB_OVER_FLOOR_MS: Mapping[str, float] = {"mock": 3.0}


def limits_for(subject: Forkd) -> Limits:
    """The limits of a configuration, which are set for the default load, `shape.DEFAULT`."""
    return Limits(
        cpu_ratio=_CPU_RATIOS.get((subject.backend, subject.workers)),
        memory_kb=_MEMORY_KB.get(subject.backend),
        ttfb_over_floor_ms=_TTFB_OVER_FLOOR_MS.get(subject.backend),
    )


def check(comparison: Comparison) -> list[Check]:
    """Every limit that the comparison's figures can be held against."""
    limits = limits_for(comparison.subject)
    streams = comparison.shape.streams
    measured = (
        ("CPU per stream, floor = 1", comparison.cpu_ratio, limits.cpu_ratio),
        ("memory per live stream, KB", comparison.memory_kb, limits.memory_kb),
        ("time to first byte p99 above floor's, ms", comparison.ttfb_over_floor_ms, limits.ttfb_over_floor_ms),
    )
    checks = [Check(what, spread.median, limit) for what, spread, limit in measured if spread and limit is not None]
    checks.append(Check("streams lost", sum(run.lost for run in comparison.forkd_runs), 0))
    if comparison.all_at_once:
        missing = max((streams - run.live_peak for run in comparison.forkd_runs), default=0)
        checks.append(Check(f"streams missing from {streams} live at once", missing, 0))
    return checks
