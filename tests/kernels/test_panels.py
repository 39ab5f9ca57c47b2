"""How small integers are stored: panels, and rounding with scales."""

import pytest
import torch

from surgeon.kernels.experts import Experts
from surgeon.kernels.panels import MOST_TRUNK, Int8Experts, pack, panels_shape, quantise, quantise_trunk, unpack
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


@pytest.mark.parametrize("inputs", [30, 5000])
def test_sums_of_a_trunk_stay_in_32_bits(inputs: int) -> None:
    matrix = torch.randn(4, inputs)
    matrix[1] = 1.0  # every weight is as large as the largest
    whole, scale = quantise_trunk(matrix)
    assert int(whole.long().abs().sum(-1).amax()) * MOST_TRUNK < 2**31
    assert bool(((whole * scale[:, None] - matrix).abs() <= scale[:, None] * 0.5001).all())
    assert float(scale[0] / matrix[0].abs().amax()) < 1 / (2000 if inputs == 30 else 500)


def test_one_output_with_large_weights_leaves_the_others_exact() -> None:
    torch.manual_seed(0)
    experts = Experts(torch.randn(3, 8, 12), None, torch.randn(3, 8, 12), torch.randn(3, 8), torch.randn(3, 8, 10))
    experts.w2[..., 4] *= 1000
    x_scale = torch.rand(12) + 0.5
    stored = Int8Experts.of(experts, x_scale)
    for got, want in zip(stored.floats(x_scale, 12), experts, strict=True):
        if want is None:
            assert got is None
            continue
        assert got is not None
        apart = torch.arange(want.shape[-1]) != 4
        assert float((got - want).norm() / want.norm()) < 0.01
        assert float((got - want)[..., apart].norm() / want[..., apart].norm()) < 0.01


def test_neurons_that_no_output_reads_leave_the_others_exact() -> None:
    """Their hidden values are rounded together with those of the others, and must not be the largest."""
    call = int8_call((4,), 2, 16, 8, 5, width=None, tau=0.0, activation="relu", bias=False)
    floats = call.experts.floats(call.x_scale, 8)
    floats.w2[:, ::3] = 0
    given = call._replace(**Int8Experts.of(floats)._asdict())
    hidden = (call.x @ floats.w1.transpose(-2, -1)).relu()
    want = (hidden @ floats.w2).sum(0)
    got = torch.ops.surgeon.routed_ffn_int8_torch(*given)
    assert float((got - want).norm() / want.norm()) < 0.02
