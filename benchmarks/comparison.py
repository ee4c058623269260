"""Two records side by side: which medians differ by more than the noise of their runs.

Per measurement a two-sided rank test (Mann-Whitney, its distribution from shuffles), corrected for
the number of measurements (Holm), and the ratio of medians with its bootstrap interval. All random
numbers have a fixed seed: the same files always give the same answer.

Repeats share the luck of their process: where its memory lies, what the machine does just then.
Several pairs of records tell that from a change, which every one of them shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from statistics import geometric_mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .record import Measurement, Operation, Record
from .summary import CONFIDENCE

__all__ = ["Change", "Comparison", "compare_pairs", "compare_records", "compare_times"]

Floats = NDArray[np.float64]

_LEVEL = 0.05
_NEGLIGIBLE = 0.02
"""Runs of the same program differ by as much: where its memory lies is chosen at every start."""
_SHUFFLES = 20_000
_RESAMPLES = 4_000
_CONDITIONS = ("power_source", "low_power_mode")


@dataclass(frozen=True)
class Change:
    """One part of one measurement in both records."""

    kind: str
    implementation: str
    image_size: int | None
    prompt_tokens: int | None
    part: str
    before: float
    """Median seconds."""
    after: float
    ratio: float
    """after / before: above 1 is slower."""
    low: float
    high: float
    p: float
    """Of a difference this large between two runs of the same thing, corrected."""

    @property
    def verdict(self) -> str:
        """One of "slower", "faster", "no difference"."""
        if self.p >= _LEVEL or abs(np.log(self.ratio)) < np.log1p(_NEGLIGIBLE):
            return "no difference"
        return "slower" if self.ratio > 1 else "faster"


@dataclass(frozen=True)
class Comparison:
    """What two records say about each other."""

    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    """Machine, software and subject, where they are not the same."""
    unmatched: tuple[str, ...]
    """Measurements that only one of them has."""
    too_few: bool
    """Some have so few repeats that no difference could be found."""
    pairs: int = 1
    """Of records, each with starts of its own."""


def compare_records(before: Record, after: Record) -> Comparison:
    """Compare the headline part of every measurement in both, and the paper's TTFT."""
    first, second = _by_key(before), _by_key(after)
    shared = [key for key in first if key in second]
    raw = []
    for key in shared:
        for part in ("paper", first[key].headline):
            if part in first[key].seconds and part in second[key].seconds:
                raw.append((key, str(part), first[key].seconds[part], second[key].seconds[part]))
    tests = [compare_times(a, b) for *_, a, b in raw]
    corrected = _holm([p for *_, p in tests])
    changes = tuple(
        Change(*key, part, float(np.median(a)), float(np.median(b)), *test[:3], p)
        for (key, part, a, b), test, p in zip(raw, tests, corrected, strict=True)
    )
    return Comparison(
        changes,
        tuple(_differences(before, after)),
        tuple(
            f"{_name(key)} only in the {which}"
            for which, mine, other in (("first", first, second), ("second", second, first))
            for key in mine
            if key not in other
        ),
        any(_least_p(len(a), len(b)) * len(raw) >= _LEVEL for *_, a, b in raw),
    )


def compare_pairs(pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    """Several pairs (before, after) as one: a change is one that every pair shows.

    Ratio and medians are the pairs' geometric means; the interval holds all of theirs; p is the
    largest, and 1 where the verdicts are not the same.
    """
    found = [compare_records(*pair) for pair in pairs]
    if len(found) == 1:
        return found[0]
    by_key = [{_key(change): change for change in one.changes} for one in found]
    changes = []
    for key in by_key[0]:
        if all(key in one for one in by_key):
            same = [one[key] for one in by_key]
            agreed = len({change.verdict for change in same}) == 1
            changes.append(
                replace(
                    same[0],
                    before=geometric_mean([change.before for change in same]),
                    after=geometric_mean([change.after for change in same]),
                    ratio=geometric_mean([change.ratio for change in same]),
                    low=min(change.low for change in same),
                    high=max(change.high for change in same),
                    p=max(change.p for change in same) if agreed else 1.0,
                )
            )
    return Comparison(
        tuple(changes),
        tuple(dict.fromkeys(line for one in found for line in one.differences)),
        tuple(dict.fromkeys(line for one in found for line in one.unmatched)),
        any(one.too_few for one in found),
        len(found),
    )


def _key(change: Change) -> tuple[Any, ...]:
    where = (change.kind, change.implementation, change.image_size, change.prompt_tokens)
    return (*where, change.part)


def compare_times(
    before: Sequence[float], after: Sequence[float]
) -> tuple[float, float, float, float]:
    """Ratio of medians, its 95% bootstrap interval, and the rank test's p (not corrected)."""
    a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
    ratios = np.median(b[_draws(len(b), 1)], axis=1) / np.median(a[_draws(len(a), 0)], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(q) for q in np.quantile(ratios, (tail, 1 - tail)))
    return float(np.median(b) / np.median(a)), low, high, _rank_test(a, b)


@lru_cache
def _draws(count: int, seed: int) -> NDArray[np.int64]:
    """Resamples: (_RESAMPLES, count) positions, with repetition."""
    return np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))


@lru_cache
def _choices(count: int, of: int) -> NDArray[np.int64]:
    """Shuffles: (_SHUFFLES, count) different positions out of `of`."""
    drawn: NDArray[np.int64] = np.random.default_rng(2).random((_SHUFFLES, of)).argsort(axis=1)
    return drawn[:, :count]


def _rank_test(a: Floats, b: Floats) -> float:
    both = np.concatenate([a, b])
    _, place, count = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # ties share their mean rank
    middle = len(a) * (len(both) + 1) / 2
    seen = abs(ranks[: len(a)].sum() - middle)
    shuffled = ranks[_choices(len(a), len(both))].sum(axis=1)
    return float(np.count_nonzero(np.abs(shuffled - middle) >= seen - 1e-9) + 1) / (_SHUFFLES + 1)


def _holm(values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of any false finding among all stays below the level."""
    corrected = [1.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def _least_p(n: int, m: int) -> float:
    """The smallest p that two samples of these sizes can give."""
    ways = 1.0
    for k in range(1, min(n, m) + 1):
        ways *= (max(n, m) + k) / k
    return max(2 / ways, 1 / (_SHUFFLES + 1))


_Key = tuple[str, str, int | None, int | None]


def _by_key(record: Record) -> dict[_Key, Measurement]:
    return {
        (m.kind, m.implementation, m.image_size, m.prompt_tokens): m for m in record.measurements
    }


def _name(key: _Key) -> str:
    kind, implementation, size, tokens = key
    at = f" at {size}" if size else f" after {tokens} tokens" if tokens else ""
    return f"{kind}{at} ({implementation})"


def _forms(these: Sequence[Operation], others: Sequence[Operation]) -> str:
    own = [f"{o.op} {o.form}" for o in dict.fromkeys(these) if o not in others]
    return ", ".join(own) or "those of the other"


def _differences(before: Record, after: Record) -> list[str]:
    found = []
    for group in ("machine", "software", "subject", "conditions"):
        first, second = getattr(before, group), getattr(after, group)
        for field in fields(first):
            a: Any = getattr(first, field.name)
            b: Any = getattr(second, field.name)
            if a == b or (group == "conditions" and field.name not in _CONDITIONS):
                continue
            name = f"{group} {field.name.replace('_', ' ')}"
            if field.name == "parameters":
                a, b = (f"{sum(x.values()) / 1e6:.1f} M" for x in (a, b))
            elif field.name == "operations":
                if set(a) == set(b):
                    continue
                a, b = (_forms(a, b), _forms(b, a))
            found.append(f"{name}: {a} | {b}")
    return found
