"""Derivatives of every mode and order through the operator that skips experts are those of its reference twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn

from .ffn import arguments

Layer = Callable[[Tensor, Tensor], Tensor]
func = torch.func

# torch's own forward mode still scripts its decompositions, and its `linearize` builds a graph that reads constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def scalar(layer: Layer) -> Layer:
    return lambda x, w1: layer(x, w1).square().sum()


def dual(layer: Layer, x: Tensor, w1: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        tangents = torch.ones_like(x), torch.ones_like(w1)
        y = layer(*(forward_ad.make_dual(value, tangent) for value, tangent in zip((x, w1), tangents, strict=True)))
        return forward_ad.unpack_dual(y).tangent


def backward(layer: Layer, x: Tensor, w1: Tensor, order: int) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), w1.clone().requires_grad_()]
    found = [scalar(layer)(*leaves)]
    for _ in range(order):
        size = torch.stack([value.square().sum() for value in found]).sum()
        found = list(torch.autograd.grad(size, leaves, create_graph=True))
    return found


def one_direction(layer: Layer, x: Tensor, w1: Tensor) -> Tensor:
    return func.jvp(lambda x: layer(x, w1), (x,), (torch.ones_like(x),))[1]


DERIVATIVES: dict[str, Callable[[Layer, Tensor, Tensor], Any]] = {
    "jvp": one_direction,
    "linearize": lambda layer, x, w1: func.linearize(lambda x: layer(x, w1), x)[1](torch.ones_like(x)),
    "jacfwd": lambda layer, x, w1: func.jacfwd(layer, argnums=(0, 1))(x, w1),
    "jacrev": lambda layer, x, w1: func.jacrev(layer, argnums=(0, 1))(x, w1),
    "grad": lambda layer, x, w1: func.grad(scalar(layer))(x, w1),
    "hessian": lambda layer, x, w1: func.hessian(scalar(layer))(x, w1),
    "vmap": lambda layer, x, w1: func.vmap(layer, in_dims=(None, 0))(x, torch.stack([w1, -w1])),
    "dual": dual,
    "dual without gradients": lambda layer, x, w1: torch.no_grad()(dual)(layer, x, w1),
    "dual with gradients": lambda layer, x, w1: dual(layer, x.clone().requires_grad_(), w1),
    "second order": lambda layer, x, w1: backward(layer, x, w1, 2),
    "third order": lambda layer, x, w1: backward(layer, x, w1, 3),
}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_the_twin(name: str, gated: bool) -> None:
    args = arguments((3,), 3, 2, 4, 5, gated=gated, bias=gated, activation="silu", share=0.6)

    def at(op: Any) -> Layer:
        return lambda x, w1: op(*args._replace(x=x, w1=w1))

    # Small enough that third derivatives do not overflow.
    x, w1 = args.x * 0.3, args.w1 * 0.3
    found, expected = (DERIVATIVES[name](at(op), x, w1) for op in (dynamic_k_ffn, masked_ffn))
    torch.testing.assert_close(found, expected)
    flat = [value for value in torch.utils._pytree.tree_leaves(expected) if isinstance(value, Tensor)]
    assert any(bool(value.any()) for value in flat)
