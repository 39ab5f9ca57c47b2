"""Weights are checked without copies of them, and those that nothing needs any more are freed."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgeon
from surgeon.graph.weights import _free, all_finite, free_unused


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(3, 5, dtype=dtype)
    assert all_finite(values)
    values[1, 2] = bad
    assert not all_finite(values)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_nan_in_float8_is_seen(dtype: torch.dtype) -> None:
    values = torch.full((3, 5), 448.0)
    assert all_finite(values.to(dtype))
    values[1, 2] = math.nan
    assert not all_finite(values.to(dtype))


@pytest.mark.parametrize(
    "values",
    [torch.full((9,), 3e38), torch.zeros(0), torch.tensor([1, 2]), torch.tensor([True]), torch.ones(2, device="meta")],
    ids=["large", "empty", "integers", "bools", "meta"],
)
def test_values_that_are_finite(values: torch.Tensor) -> None:
    assert all_finite(values)


class Two(nn.Module):
    """Two linear layers, the second of which shares its weights with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def test_what_no_node_needs_is_freed_for_all_that_hold_it() -> None:
    model = Two().eval()
    graph = surgeon.trace(model, torch.randn(2, 4))
    first, second, third = (node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default)
    held = list(graph.parameters())
    assert free_unused(graph, held) == held

    second.args[0].replace_all_uses_with(first.args[0])  # the first layer is left out
    second.replace_all_uses_with(first.args[0])  # the second, too: the third has the same weights
    third.args = (first.args[0], *third.args[1:])
    kept = free_unused(graph, held)
    assert [id(parameter) for parameter in kept] == [id(model.b.weight)]
    assert model.a.weight.numel() == 0
    assert model.c.weight.shape == (4, 4)


def test_a_neighbour_in_the_same_file_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(64, 64) for name in ("a.weight", "b.weight")}
    save_file(weights, tmp_path / "w.safetensors")
    model = nn.Sequential()
    model.a, model.b = (nn.Linear(64, 64, bias=False) for _ in "ab")
    model.load_state_dict(load_file(tmp_path / "w.safetensors"), assign=True)
    graph = surgeon.trace(model.eval(), torch.randn(2, 64))
    first, second = (node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default)
    second.args = (first.args[0], *second.args[1:])
    free_unused(graph, list(graph.parameters()))
    assert model.a.weight.numel() == 0
    assert torch.equal(model.b.weight, weights["b.weight"])


@pytest.mark.skipif(sys.platform != "linux", reason="pages of mapped files are dropped on Linux only")
def test_pages_of_a_mapped_file_are_given_back(tmp_path: Path) -> None:
    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    size = 1 << 25
    save_file({"a.weight": torch.zeros(size), "b.weight": torch.zeros(4)}, tmp_path / "w.safetensors")
    weights = load_file(tmp_path / "w.safetensors")
    parameter = nn.Parameter(weights["a.weight"])
    before = mapped()
    float(parameter.detach().sum())
    after = mapped()
    assert after - before > 3 * size
    _free(parameter)
    assert after - mapped() > 3 * size
    assert weights["b.weight"].tolist() == [0.0] * 4
