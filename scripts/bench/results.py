"""The runs of one configuration, and what follows from them together."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from measure import Run
from shape import Shape
from subjects import Forkd


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that counts."""
        return median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest; the distance to `low` is the noise."""
        return max(self.values)


def spread(values: Iterable[float | None]) -> Spread | None:
    """What there is of the values; None if there is nothing."""
    there = tuple(value for value in values if value is not None)
    return Spread(there) if there else None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs, one right after the other; one of them with --only. After them, those of rivals, by name."""

    floor: Run | None
    forkd: Run | None
    rivals: dict[str, Run] = field(default_factory=dict)


KEPT: Final = "forkd, kept connection"
"""The name of the run with one connection for all handoffs, among a pair's rivals."""
FIGURES: Final = (
    "cpu_us",
    "master_cpu_us",
    "memory_kb",
    "memory_unfiled_kb",
    "ttfb_p50_ms",
    "ttfb_p99_ms",
    "gap_p50_ms",
    "gap_p99_ms",
    "eof_p99_ms",
    "lost",
    "idle_cpu_ms",
    "generator_cpu_percent",
    "generator_late_p99_ms",
    "other_cpu_percent",
    "api_cpu_percent",
    "api_late_p50_ms",
    "api_late_p99_ms",
    "api_first_p99_ms",
    "api_connections",
    "api_connections_peak",
)


@dataclass(slots=True)
class Comparison:
    """forkd in one configuration, beside floor, pair by pair."""

    subject: Forkd
    shape: Shape
    all_at_once: bool  # every stream has to be alive at the same time
    pairs: list[Pair] = field(default_factory=list)

    @property
    def floor_runs(self) -> list[Run]:
        """floor's side of the pairs."""
        return [pair.floor for pair in self.pairs if pair.floor]

    @property
    def forkd_runs(self) -> list[Run]:
        """forkd's side of the pairs."""
        return [pair.forkd for pair in self.pairs if pair.forkd]

    @property
    def rivals(self) -> list[str]:
        """Who else was measured."""
        return list(dict.fromkeys(name for pair in self.pairs for name in pair.rivals))

    def rival_runs(self, name: str) -> list[Run]:
        """A rival's runs."""
        return [pair.rivals[name] for pair in self.pairs if name in pair.rivals]

    def rival_cpu_ratio(self, name: str) -> Spread | None:
        """CPU per stream of a rival, floor = 1."""
        return spread(
            pair.rivals[name].cpu_us / pair.floor.cpu_us for pair in self.pairs if pair.floor and name in pair.rivals
        )

    def rival_over_forkd(self, name: str) -> Spread | None:
        """CPU per stream of a rival, forkd = 1."""
        return spread(
            pair.rivals[name].cpu_us / pair.forkd.cpu_us for pair in self.pairs if pair.forkd and name in pair.rivals
        )

    @property
    def master_saving_percent(self) -> Spread | None:
        """By how much less CPU the master needs for a handoff with one connection for all."""
        return spread(
            100 * (1 - pair.rivals[KEPT].master_cpu_us / pair.forkd.master_cpu_us)
            for pair in self.pairs
            if pair.forkd and KEPT in pair.rivals
        )

    @property
    def cpu_ratio(self) -> Spread | None:
        """CPU per stream of forkd, divided by floor's of the same pair."""
        return self._paired(lambda floor, forkd: forkd.cpu_us / floor.cpu_us)

    @property
    def memory_kb(self) -> Spread | None:
        """Memory per live stream."""
        return spread(run.memory_kb for run in self.forkd_runs)

    @property
    def ttfb_over_floor_ms(self) -> Spread | None:
        """Time to first byte p99, less floor's of the same pair."""

        def over(floor: Run, forkd: Run) -> float | None:
            if floor.ttfb_p99_ms is None or forkd.ttfb_p99_ms is None:
                return None
            return forkd.ttfb_p99_ms - floor.ttfb_p99_ms

        return self._paired(over)

    def as_json(self) -> dict[str, Any]:
        """Every run and every median."""
        return {
            "subject": self.subject.name,
            "workers": self.subject.workers,
            "backend": self.subject.backend,
            "upstream": self.subject.upstream,
            "pause_ms": self.subject.pause_ms,
            "ledger": self.subject.ledger,
            "benchmark_flag": self.subject.benchmark,
            "scrape": self.subject.scrape,
            "cpu_ratio": _spread_json(self.cpu_ratio),
            "ttfb_p99_over_floor_ms": _spread_json(self.ttfb_over_floor_ms),
            "master_saving_percent": _spread_json(self.master_saving_percent),
            "floor": _figures_json(self.floor_runs),
            "forkd": _figures_json(self.forkd_runs),
            "rivals": {
                name: _figures_json(self.rival_runs(name))
                | {
                    "cpu_ratio": _spread_json(self.rival_cpu_ratio(name)),
                    "cpu_over_forkd": _spread_json(self.rival_over_forkd(name)),
                }
                for name in self.rivals
            },
            "pairs": [
                {
                    "floor": pair.floor and pair.floor.as_json(),
                    "forkd": pair.forkd and pair.forkd.as_json(),
                    "rivals": {name: run.as_json() for name, run in pair.rivals.items()},
                }
                for pair in self.pairs
            ],
        }

    def _paired(self, figure: Callable[[Run, Run], float | None]) -> Spread | None:
        return spread(figure(pair.floor, pair.forkd) for pair in self.pairs if pair.floor and pair.forkd)


def figure(runs: Iterable[Run], name: str) -> Spread | None:
    """One of `FIGURES` over the runs."""
    return spread(getattr(run, name) for run in runs)


def _figures_json(runs: list[Run]) -> dict[str, Any]:
    return {name: _spread_json(figure(runs, name)) for name in FIGURES}


def _spread_json(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else {"median": spread.median, "min": spread.low, "max": spread.high}
