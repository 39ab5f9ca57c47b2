import pytest
import torch

from surgeon.errors import UsageError
from surgeon.kernels.activations import ACTIVATIONS, activation

from .oracle import FUNCTIONS

# Every kink of the table and points around it.
GRID = torch.cat(
    [torch.linspace(-8, 8, 321, dtype=torch.float64), torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 6.0]).double()]
)


def test_the_table_is_complete() -> None:
    assert set(ACTIVATIONS) == set(FUNCTIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_is_the_definition(name: str) -> None:
    expected = torch.tensor([FUNCTIONS[name](float(z)) for z in GRID], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name].fn(GRID), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_what_autograd_gives(name: str) -> None:
    z = GRID.clone().requires_grad_()
    grad = torch.linspace(0.5, 2, len(z), dtype=torch.float64)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].fn(z), z, grad)
    torch.testing.assert_close(ACTIVATIONS[name].backward(grad, GRID), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_leaves_zeros_is_true(name: str) -> None:
    zeros = (ACTIVATIONS[name].fn(torch.linspace(-20, -4, 50)) == 0).all()
    assert bool(zeros) == ACTIVATIONS[name].leaves_zeros


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place_it_is_the_same(name: str) -> None:
    z = GRID.clone()
    assert ACTIVATIONS[name].in_place(z) is z
    torch.testing.assert_close(z, ACTIVATIONS[name].fn(GRID), rtol=0, atol=0)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"unknown activation 'gelu_new'; known: relu, gelu, gelu_tanh"):
        activation("gelu_new")
