"""Order statistics of small lists."""

from collections.abc import Sequence
from math import ceil


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile: the smallest value that `percent` % of all do not exceed. None if there are none."""
    if not values:
        return None
    return sorted(values)[max(0, ceil(len(values) * percent / 100) - 1)]
