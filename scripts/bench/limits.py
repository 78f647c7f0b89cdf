"""What forkd has to reach, and whether it did."""

from collections.abc import Mapping
from dataclasses import dataclass

from results import Comparison, figure
from subjects import Forkd


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is allowed, of medians over the runs. None: no limit is set for such a configuration."""

    cpu_ratio: float | None  # CPU per stream, floor = 1
    memory_kb: float | None  # per live stream
    ttfb_over_floor_ms: float | None  # time to first byte, p99
    connections: float | None  # to the upstream, opened in a run


@dataclass(frozen=True, slots=True)
class Check:
    """One limit held against one figure."""

    what: str
    value: float
    limit: float
    at_least: bool = False  # the limit is the least, not the most

    @property
    def ok(self) -> bool:
        """A figure equal to its limit is within it."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        limit, missed = ("at least", "MISSED") if self.at_least else ("limit", "EXCEEDED")
        return f"{self.what}: {round(self.value, 2):g}, {limit} {self.limit:g}: {'ok' if self.ok else missed}"


# By `Forkd.kind`, and for CPU by the number of workers too.
_CPU_RATIOS: Mapping[tuple[str, int], float] = {
    ("mock", 1): 4.0,
    ("mock", 2): 5.0,
    ("http1", 1): 6.5,
    ("h2-tls", 1): 9.5,
}
_MEMORY_KB: Mapping[str, float] = {"mock": 1.5, "http1": 4.0, "h2": 10.0, "h2-tls": 10.0}
_TTFB_OVER_FLOOR_MS: Mapping[str, float] = {"mock": 3.0, "http1": 5.0, "h2": 5.0, "h2-tls": 5.0}
_CONNECTIONS: Mapping[str, float] = {"h2": 60, "h2-tls": 60}
MASTER_SAVING_PERCENT = 25.0  # with one connection for all handoffs, against one for each
# A rival's CPU per stream, forkd = 1: the least that forkd's lead has to be.
_LEAD: Mapping[str, float] = {"aiohttp": 3.0, "FastAPI+httpx": 25.0}


def limits_for(subject: Forkd) -> Limits:
    """The limits of a configuration, which are set for the default load, `shape.DEFAULT`."""
    return Limits(
        cpu_ratio=_CPU_RATIOS.get((subject.kind, subject.workers)),
        memory_kb=_MEMORY_KB.get(subject.kind),
        ttfb_over_floor_ms=_TTFB_OVER_FLOOR_MS.get(subject.kind),
        connections=_CONNECTIONS.get(subject.kind),
    )


def check(comparison: Comparison) -> list[Check]:
    """Every limit that the comparison's figures can be held against."""
    limits = limits_for(comparison.subject)
    streams = comparison.shape.streams
    measured = (
        ("CPU per stream, floor = 1", comparison.cpu_ratio, limits.cpu_ratio),
        ("memory per live stream, KB", comparison.memory_kb, limits.memory_kb),
        ("time to first byte p99 above floor's, ms", comparison.ttfb_over_floor_ms, limits.ttfb_over_floor_ms),
        ("connections to the upstream", figure(comparison.forkd_runs, "api_connections"), limits.connections),
    )
    checks = [Check(what, spread.median, limit) for what, spread, limit in measured if spread and limit is not None]
    checks.append(Check("streams lost", sum(run.lost for run in comparison.forkd_runs), 0))
    if comparison.master_saving_percent:
        saving = comparison.master_saving_percent.median
        checks.append(Check("master's CPU saved by one connection, %", saving, MASTER_SAVING_PERCENT, at_least=True))
    for name in comparison.rivals:
        lead = comparison.rival_over_forkd(name)
        if lead and name in _LEAD:
            checks.append(Check(f"CPU per stream of {name}, forkd = 1", lead.median, _LEAD[name], at_least=True))
    if comparison.all_at_once:
        missing = max((streams - run.live_peak for run in comparison.forkd_runs), default=0)
        checks.append(Check(f"streams missing from {streams} live at once", missing, 0))
    return checks
