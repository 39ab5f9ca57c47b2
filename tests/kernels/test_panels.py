"""How small integers are stored: panels, and rounding with scales."""

import itertools
import math
from typing import Any

import pytest
import torch

from surgeon.kernels import panels
from surgeon.kernels.experts import Experts
from surgeon.kernels.panels import (
    MOST_IN_GROUPS,
    MOST_TRUNK,
    Int8Experts,
    factors_shape,
    group_size,
    groups_of,
    halves_shape,
    pack,
    pack_factors,
    pack_halves,
    panels_shape,
    quantise,
    quantise_groups,
    quantise_trunk,
    unpack,
    unpack_halves,
)
from tests.kernels.int8_calls import int8_call


@pytest.mark.parametrize(("dtype", "depth"), [(torch.int8, 4), (torch.int16, 2)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 4), (17, 9), (40, 33)])
def test_every_number_has_its_place(dtype: torch.dtype, depth: int, rows: int, columns: int) -> None:
    matrix = torch.randint(-100, 100, (3, rows, columns)).to(dtype)
    panels = pack(matrix)
    assert panels.is_contiguous()
    assert panels.shape == (3, *panels_shape(rows, columns, dtype))
    for row in range(rows):
        for column in range(columns):
            there = panels[:, row // 16, column // depth, row % 16, column % depth]
            assert torch.equal(there, matrix[:, row, column])
    assert int(panels.long().abs().sum()) == int(matrix.long().abs().sum())  # zeros behind the end
    assert torch.equal(unpack(panels, rows, columns), matrix)


def test_rounding_is_off_by_half_a_step_at_most() -> None:
    matrix = torch.randn(5, 7, 30) * torch.logspace(-6, 6, 7)[:, None]
    matrix[2, 3] = 0
    whole, scale = quantise(matrix)
    assert (whole.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (5, 7))
    assert int(whole.amin()) >= -127
    assert bool(((whole * scale[..., None] - matrix).abs() <= scale[..., None] * 0.5001).all())
    assert bool((whole.abs().amax(-1) == 127).sum() == 34)  # of 35 rows: all but the zeros


@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 1, 8), (16, 8, 8), (17, 9, 8), (40, 33, 16), (40, 100, 64)])
def test_every_half_has_its_place(rows: int, columns: int, group: int) -> None:
    halves = torch.randint(-8, 8, (3, rows, columns)).to(torch.int8)
    groups = groups_of(columns, group)
    factors = torch.randint(1, 18, (3, rows, groups)).to(torch.uint8)
    stored, stored_factors = pack_halves(halves), pack_factors(factors)
    assert stored.shape == (3, *halves_shape(rows, columns))
    assert stored_factors.shape == (3, *factors_shape(rows, groups))
    assert stored.is_contiguous()
    assert stored_factors.is_contiguous()
    for row in range(rows):
        for column in range(columns):
            byte = stored[:, row // 16, column // 8, row % 16, column % 4]
            half = byte >> 4 if column % 8 >= 4 else byte & 15
            assert torch.equal(half.to(torch.int8) - 8, halves[:, row, column])
        assert torch.equal(stored_factors[:, row // 16, :, row % 16], factors[:, row])
    size = group_size(columns, groups)
    assert (size <= group, size % 8, groups_of(columns, size)) == (True, 0, groups)
    whole = halves * factors.to(torch.int8).repeat_interleave(size, -1)[..., :columns]
    assert torch.equal(unpack_halves(stored, stored_factors, columns), pack(whole))


def test_no_factor_near_the_largest_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_PART", 50)  # some rows at a time
    torch.manual_seed(0)
    matrix = torch.randn(2, 5, 20) * torch.logspace(0, 1, 20)
    matrix = matrix / matrix.abs().amax() * MOST_IN_GROUPS
    matrix[0, 0, :8], matrix[1, 2, 8:] = MOST_IN_GROUPS, 0
    halves, factors = quantise_groups(matrix, 8)
    assert (halves.shape, factors.shape) == ((2, 5, 20), (2, 5, 3))
    assert (int(factors.amin()), int(factors.amax())) == (1, 17)

    def error(numbers: torch.Tensor, factor: int) -> float:
        rounded = (numbers / factor).round().clamp(-8 if factor < 16 else -7, 7)
        return float((rounded * factor - numbers).square().sum())

    for place, row, group in itertools.product(range(2), range(5), range(3)):
        some = slice(group * 8, group * 8 + 8)
        numbers, factor = matrix[place, row, some], int(factors[place, row, group])
        found = halves[place, row, some].float() * factor
        assert float(found.abs().amax()) <= 127
        assert float((found - numbers).square().sum()) == pytest.approx(error(numbers, factor))
        largest = min(17, max(1, math.ceil(float(numbers.abs().amax()) / 7)))
        for other in range(max(1, largest - 2), largest + 1):
            assert error(numbers, factor) <= error(numbers, other) * 1.0001


@pytest.mark.parametrize("inputs", [30, 5000])
def test_sums_of_a_trunk_stay_in_32_bits(inputs: int) -> None:
    matrix = torch.randn(4, inputs)
    matrix[1] = 1.0  # every weight is as large as the largest
    whole, scale = quantise_trunk(matrix)
    assert int(whole.long().abs().sum(-1).amax()) * MOST_TRUNK < 2**31
    assert bool(((whole * scale[:, None] - matrix).abs() <= scale[:, None] * 0.5001).all())
    assert float(scale[0] / matrix[0].abs().amax()) < 1 / (2000 if inputs == 30 else 500)


@pytest.mark.parametrize(("weights", "accepted"), [({}, 0.01), ({"group": 8}, 0.1), ({"float8": True}, 0.03)], ids=str)
def test_one_output_with_large_weights_leaves_the_others_exact(weights: dict[str, Any], accepted: float) -> None:
    torch.manual_seed(0)
    experts = Experts(torch.randn(3, 8, 12), None, torch.randn(3, 8, 12), torch.randn(3, 8), torch.randn(3, 8, 10))
    experts.w2[..., 4] *= 1000
    x_scale = torch.rand(12) + 0.5
    stored = Int8Experts.of(experts, x_scale, **weights)
    assert (stored.group(12), stored.float8) == (weights.get("group"), "float8" in weights)
    for got, want in zip(stored.floats(x_scale, 12), experts, strict=True):
        if want is None:
            assert got is None
            continue
        assert got is not None
        apart = torch.arange(want.shape[-1]) != 4
        assert float((got - want).norm() / want.norm()) < accepted
        assert float((got - want)[..., apart].norm() / want[..., apart].norm()) < accepted


def test_float8_keeps_three_digits_of_every_weight() -> None:
    """Relative to the weight itself, down to a 2¹⁴th of the largest of its neuron; below that as fine as there."""
    matrix = torch.logspace(0, -6, 64).repeat(3, 16, 1) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    experts = Experts(matrix, None, None, None, torch.rand(3, 16, 5) + 0.1)
    stored = Int8Experts.of(experts, float8=True)
    assert stored.w1.dtype == stored.w2.dtype == torch.float8_e4m3fn
    got, want = stored.floats(None, 64).w1, matrix
    step = torch.maximum(want / 16, want.amax(-1, keepdim=True) / 448 / 1024)
    assert bool(((got - want).abs() <= step * 1.001).all())


def test_smaller_groups_are_more_exact_and_take_more_memory() -> None:
    torch.manual_seed(0)
    experts = Experts(torch.randn(2, 64, 96), None, None, None, torch.randn(2, 64, 96))
    found = [Int8Experts.of(experts, None, group) for group in (None, 8, 32, 64)]
    sizes = [sum(tensor.numel() * tensor.element_size() for tensor in stored if tensor is not None) for stored in found]
    errors = [float((stored.floats(None, 96).w1 - experts.w1).norm() / experts.w1.norm()) for stored in found]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < errors[1] < errors[3] < 0.15
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("weights", "accepted"), [({}, 0.02), ({"group": 8}, 0.1), ({"float8": True}, 0.05)], ids=str)
def test_neurons_that_no_output_reads_leave_the_others_exact(weights: dict[str, Any], accepted: float) -> None:
    """Their hidden values are rounded together with those of the others, and must not be the largest."""
    call = int8_call((4,), 2, 16, 8, 5, width=None, tau=0.0, activation="relu", bias=False)
    floats = call.experts.floats(call.x_scale, 8)
    floats.w2[:, ::3] = 0
    given = call._replace(**Int8Experts.of(floats, **weights)._asdict())
    hidden = (call.x @ floats.w1.transpose(-2, -1)).relu()
    want = (hidden @ floats.w2).sum(0)
    got = torch.ops.surgeon.routed_ffn_int8_torch(*given)
    assert float((got - want).norm() / want.norm()) < accepted
