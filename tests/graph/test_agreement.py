"""Comparing outputs: every tensor counts by itself, and the coarsest number format sets the tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgeon.graph import agreement
from surgeon.graph.agreement import relative_error, tolerance_for


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0.0),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.25),
        ({"a": torch.tensor([1.0]), "b": None}, {"a": torch.tensor([1.0])}, 0.0),
        (torch.tensor([1.0]), torch.tensor([1.0, 2.0]), float("inf")),
        ((torch.tensor([1.0]),), (torch.tensor([1.0]), torch.tensor([1.0])), float("inf")),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), 0.0),
        (torch.tensor([1.0, 1.0]), torch.tensor([float("nan"), 1.0]), float("inf")),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]), float("inf")),
        (torch.tensor([float("inf")]), torch.tensor([float("-inf")]), float("inf")),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), float("inf")),
        ("a", "b", float("inf")),
    ],
)
def test_relative_error(actual: Any, expected: Any, error: float) -> None:
    assert relative_error(actual, expected) == pytest.approx(error)


def test_large_outputs_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_PIECE", 4)
    expected = torch.arange(1.0, 12.0).reshape(1, 11)
    actual = expected.clone()
    assert relative_error(actual, expected) == 0.0
    actual[0, 1] = 13.0  # in the first piece; the largest value is in the last
    assert relative_error(actual, expected) == pytest.approx(1.0)
    actual[0, 9] = float("nan")
    assert relative_error(actual, expected) == float("inf")


def test_every_output_counts_by_itself() -> None:
    large, small = torch.tensor([1e6]), torch.tensor([1e-3])
    assert relative_error((large, small * 2), (large, small)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [([torch.float64], 1e-8), ([torch.float32], 1e-4), ([torch.bfloat16, torch.float32], 5e-2), ([torch.int64], 1e-4)],
)
def test_tolerance_of_the_coarsest_dtype(dtypes: list[torch.dtype], tolerance: float) -> None:
    assert tolerance_for([torch.zeros(1, dtype=dtype) for dtype in dtypes]) == tolerance
