"""What a worker says of itself once a second."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers import figures
from workers.figures import Measure


class Time:
    """Stands in for the clock and for the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.cpu = 5.0
        monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: self.now))
        usage = SimpleNamespace(cpu_secs=lambda: self.cpu, rss_bytes=lambda: 40 << 20)
        monkeypatch.setattr(figures, "Usage", lambda: usage)


def streams(*started_at: float) -> Any:
    return [SimpleNamespace(started_at=at) for at in started_at]


def test_rates_are_of_the_time_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    measure = Measure()
    clock.now, clock.cpu = 1002.0, 5.5
    taken = measure.take(300, streams())
    assert (taken.cpu_percent, taken.streams_per_sec) == (25.0, 150.0)
    assert (taken.cpu_ms, taken.rss_bytes) == (5500, 40 << 20)
    clock.now, clock.cpu = 1003.0, 5.5
    taken = measure.take(310, streams())
    assert (taken.cpu_percent, taken.streams_per_sec) == (0.0, 10.0)


def test_a_look_right_after_the_start_says_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    measure = Measure()
    clock.now, clock.cpu = 1000.001, 5.001
    taken = measure.take(1, streams())
    assert (taken.cpu_percent, taken.streams_per_sec) == (0.0, 0.0)


def test_the_oldest_stream_is_the_one_handed_over_first(monkeypatch: pytest.MonkeyPatch) -> None:
    Time(monkeypatch)
    measure = Measure()
    assert measure.take(0, streams()).oldest_ms == 0
    assert measure.take(3, streams(990.5, 970.25, 999.0)).oldest_ms == 970_250


def test_the_process_is_this_one() -> None:
    measure = Measure()
    small = measure.take(0, streams())
    ballast = bytearray(b"x" * (64 << 20))
    large = measure.take(0, streams())
    assert 4 << 20 < small.rss_bytes < large.rss_bytes - len(ballast) // 2
    assert 0 < small.cpu_ms <= large.cpu_ms
