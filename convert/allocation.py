"""Spending a budget of bits: one option per module, exactly those with the least total cost."""

from collections.abc import Sequence
from functools import reduce
from math import gcd

import numpy as np

__all__ = ["allocate"]

_MOST_UNITS = 1 << 18


def allocate(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """One option per module: `sizes[m][o]` adds up to at most `budget`, `costs[m][o]` to the least.

    A multiple-choice knapsack, solved by dynamic programming over the sizes' common unit, so the
    result is the optimum and depends on nothing else. Where that would take more than 2**18 units,
    sizes are rounded up to coarser ones: the budget still holds, the optimum is that of the rounded
    sizes. Raises ValueError if even the smallest options exceed the budget.
    """
    least = [min(options) for options in sizes]
    room = budget - sum(least)
    if room < 0:
        raise ValueError(f"the smallest options take {sum(least)}, the budget is {budget}")
    extras = [[size - low for size in options] for options, low in zip(sizes, least, strict=True)]
    unit = max(1, reduce(gcd, (extra for options in extras for extra in options), 0))
    unit *= max(1, -(-room // (unit * _MOST_UNITS)))
    units = room // unit
    # best[u]: least cost of the modules so far within u units.
    best = np.zeros(units + 1)
    taken: list[np.ndarray] = []
    for options, cost in zip(extras, costs, strict=True):
        total = np.full(units + 1, np.inf)
        choice = np.zeros(units + 1, dtype=np.int16)
        for index, (extra, price) in enumerate(zip(options, cost, strict=True)):
            needed = -(-extra // unit)
            if needed > units:
                continue
            candidate = np.full(units + 1, np.inf)
            candidate[needed:] = best[: units + 1 - needed] + price
            better = candidate < total
            total[better] = candidate[better]
            choice[better] = index
        best = total
        taken.append(choice)
    chosen: list[int] = []
    left = units
    for options, choice in zip(reversed(extras), reversed(taken), strict=True):
        index = int(choice[left])
        chosen.append(index)
        left -= -(-options[index] // unit)
    return chosen[::-1]
