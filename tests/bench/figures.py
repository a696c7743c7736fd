"""The arithmetic of the benchmark: medians, spreads, percentiles, ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    """The median; raises `StatisticsError` where there is nothing."""
    return float(statistics.median(values))


def spread(values: Sequence[float]) -> float:
    """How far the values lie apart, as a share of their median: (highest - lowest) / median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def ratio(one: float | None, other: float | None) -> float | None:
    """one / other; None where either is unknown or there is nothing to divide by."""
    return one / other if one is not None and other else None
