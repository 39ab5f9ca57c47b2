"""What is allocated: no other choice of that cost does less damage."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.measure.allocation import Option, allocate, interpolated

choices = st.lists(st.tuples(st.integers(0, 20), st.integers(-5, 20)), min_size=1, max_size=4)


def total(options: dict[str, list[Option]], shares: dict[str, float], part: int) -> float:
    return sum(next(choice[part] for choice in options[path] if choice[2] == share) for path, share in shares.items())


@given(made=st.lists(choices, min_size=1, max_size=4), limit=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_no_other_shares_of_that_cost_do_less_damage(made: list[list[tuple[int, int]]], limit: int) -> None:
    options = {
        str(layer): [(float(cost), float(damage), float(index)) for index, (cost, damage) in enumerate(one)]
        for layer, one in enumerate(made)
    }
    found = allocate(options, limit)
    cost, damage = total(options, found, 0), total(options, found, 1)
    picks = product(*([choice[2] for choice in one] for one in options.values()))
    every = [dict(zip(options, shares, strict=True)) for shares in picks]
    cheapest = min(total(options, one, 0) for one in every)
    assert cost <= limit or cost == cheapest
    assert damage <= min(total(options, one, 1) for one in every if total(options, one, 0) <= cost) + 1e-9


def test_costs_may_be_of_any_size() -> None:
    for scale in (1e-6, 1.0, 1e12):
        options = {
            "a": [(4 * scale, 0.0, 1.0), (2 * scale, 1e-4, 0.5), (scale, 1.0, 0.25)],
            "b": [(4 * scale, 0.0, 1.0), (2 * scale, 0.5, 0.5)],
        }
        assert allocate(options, 6.5 * scale) == {"a": 0.5, "b": 1.0}
        assert allocate(options, 8 * scale) == {"a": 1.0, "b": 1.0}
        assert allocate(options, scale) == {"a": 0.25, "b": 0.5}
        one = {"a": [(4 * scale, 0.0, 1.0), (2 * scale, 1e-7, 0.5), (scale, 1e-4, 0.25)]}
        shares = [allocate(one, limit * scale)["a"] for limit in (4, 3.9, 2, 1.9, 1, 0.5)]
        assert shares == [1.0, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_between_two_shares_the_root_of_the_damage_is_linear() -> None:
    points = interpolated([(1.0, 0.0), (0.2, 4.0), (0.6, 1.0)])
    assert [share for share, _ in points] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert [damage for _, damage in points] == pytest.approx(
        [(2 - 0.25 * n) ** 2 for n in range(5)] + [0.5625, 0.25, 0.0625, 0.0]
    )
