"""What repeated times say: their median, how sure of it we are, and whether the machine drifted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["CONFIDENCE", "Drift", "Summary", "drift_of", "summarize"]

CONFIDENCE = 0.95
_DRIFT_REPEATS = 8
"""Fewer repeats than this cannot tell a drift from noise."""
_DRIFT_LEVEL = 0.01
_DRIFT_CHANGE = 0.02
_SHUFFLES = 4000


@dataclass(frozen=True)
class Summary:
    """Seconds of repeated runs, without any assumption about how they are distributed."""

    count: int
    median: float
    p10: float
    p90: float
    low: float
    """Lower end of the median's confidence interval."""
    high: float
    coverage: float
    """Probability that (low, high) holds the median: 0.95 or a little more, less if there are
    fewer than six repeats, when the interval is all that was seen."""


@dataclass(frozen=True)
class Drift:
    """The last third of the repeats against the first: a machine that heats up gets slower."""

    change: float
    """Relative: 0.1 is 10% slower at the end."""
    flagged: bool
    """Beyond the noise: at most one shuffled order in a hundred changes as much."""


def summarize(seconds: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile, and the median's interval by order statistics.

    The k-th smallest and the k-th largest of n enclose the median with the probability that a
    fair coin shows heads at least k and at most n - k times in n throws.
    """
    ordered = np.sort(np.asarray(seconds, np.float64))
    n = len(ordered)
    if n == 0:
        raise ValueError("no times to summarize")
    k = max((k for k in range(1, n // 2 + 1) if _coverage(n, k) >= CONFIDENCE), default=1)
    p10, median, p90 = (float(q) for q in np.quantile(ordered, (0.1, 0.5, 0.9)))
    low, high = float(ordered[k - 1]), float(ordered[n - k])
    return Summary(n, median, p10, p90, low, high, max(0.0, _coverage(n, k)))


def _coverage(n: int, k: int) -> float:
    return 1 - 2 * sum(math.comb(n, j) for j in range(k)) / float(2**n)


def drift_of(seconds: Sequence[float]) -> Drift | None:
    """The change from the first third to the last; None if there are too few repeats to tell."""
    n = len(seconds)
    if n < _DRIFT_REPEATS:
        return None
    logs = np.log(np.asarray(seconds, np.float64))
    third = n // 3
    shuffled = np.random.default_rng(0).permuted(np.tile(logs, (_SHUFFLES, 1)), axis=1)

    def change(rows: np.ndarray) -> np.ndarray:
        difference: np.ndarray = rows[..., -third:].mean(-1) - rows[..., :third].mean(-1)
        return difference

    seen = float(change(logs))
    by_chance = (np.count_nonzero(np.abs(change(shuffled)) >= abs(seen) - 1e-12) + 1) / (
        _SHUFFLES + 1
    )
    relative = math.expm1(seen)
    return Drift(relative, bool(by_chance < _DRIFT_LEVEL and abs(relative) > _DRIFT_CHANGE))
