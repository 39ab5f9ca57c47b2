"""Choose how much of each layer runs, so that the damage is least at a total cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, permutations

import numpy as np

Option = tuple[float, float, float]
"""A choice for a layer: its cost, its damage, and the share of its experts or inputs that run."""

# Between two shares, damage is interpolated at this many steps.
_STEPS = 4


def interpolated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return (share, damage) at more shares. Between two of them the root of the damage is taken as linear."""
    shares, damages = monotone(points)
    grid = np.interp(np.arange((len(shares) - 1) * _STEPS + 1) / _STEPS, np.arange(len(shares)), shares)
    return [(float(share), float(np.interp(share, shares, damages**0.5)) ** 2) for share in grid]


def allocate(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, float]:
    """Choose the share of each layer that minimises total damage with a total cost of at most `limit`.

    The choice is made with a price on cost (a Lagrange multiplier): at each price, every layer takes its best option.
    The options change at only a few prices, so it is enough to try one price between each two of them.

    options: (cost, damage, share) of the choices of each layer. Costs may have any unit.
    """

    def best(price: float) -> dict[str, Option]:
        return {
            path: min(choices, key=lambda choice: (choice[1] + price * choice[0], choice[0]))
            for path, choices in options.items()
        }

    # Prices at which a layer has two equally good options.
    turns = sorted(
        {
            (less[1] - more[1]) / (more[0] - less[0])
            for choices in options.values()
            for less, more in permutations(choices, 2)
            if less[0] < more[0] and less[1] > more[1]
        }
    )
    # Zero, the middle of each two of them, and more than the highest. A higher price gives a lower total cost.
    prices = [0.0, *(0.5 * (low + high) for low, high in pairwise(turns)), 2.0 * turns[-1]] if turns else [0.0]
    place = bisect_left(prices, True, key=lambda price: sum(cost for cost, _, _ in best(price).values()) <= limit)
    return {path: choice[2] for path, choice in best(prices[min(place, len(prices) - 1)]).items()}


def monotone(points: Iterable[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sort points (x, y) into arrays with x strictly increasing, for interpolation."""
    ordered: dict[float, float] = {}
    for x, y in sorted(points):
        ordered.setdefault(x, y)
    return np.array(list(ordered)), np.array(list(ordered.values()))
