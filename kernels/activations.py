"""The table of the activation functions that an FFN may have. All code that names an activation uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import UsageError

_aten = torch.ops.aten
_QUICK_GELU_SLOPE = 1.702
_LEAKY_RELU_SLOPE = 0.01
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


@dataclass(frozen=True)
class Activation:
    """An elementwise function without parameters.

    Attributes:
        fn: `fn(z) -> a`, same shape and dtype; differentiable. It may return `z` itself, so never write into `a`.
        backward: `backward(grad_a, z) -> grad_z`, the vector-Jacobian product PyTorch's autograd gives for `fn`. The
            kernels call it because autograd records nothing inside an operator.
        leaves_zeros: whether the function is exactly zero on a whole half-line, as ReLU is, so that counting zeros
            measures sparsity.
        fn_: `fn` in place, written over `z`, if PyTorch has that.
        up: the activation of the other linear of a gated FFN; None if it has none. Without a gate it means nothing.
    """

    fn: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    leaves_zeros: bool = False
    fn_: Callable[[Tensor], Tensor] | None = None
    up: Activation | None = None

    def in_place(self, z: Tensor) -> Tensor:
        """Return `fn(z)`, written over `z`. That memory is in the cache; a new result's would not be."""
        return z.copy_(self.fn(z)) if self.fn_ is None else self.fn_(z)


def activation(name: str) -> Activation:
    """Return the activation called `name`; raise `UsageError` listing the known names if there is none."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise UsageError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}") from None


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(_QUICK_GELU_SLOPE * z)


def _quick_gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK_GELU_SLOPE * z)
    return grad * (s + _QUICK_GELU_SLOPE * z * s * (1 - s))


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda g, z: _aten.threshold_backward(g, z, 0), leaves_zeros=True, fn_=torch.relu_),
    "gelu": Activation(F.gelu, lambda g, z: _aten.gelu_backward(g, z), fn_=lambda z: _aten.gelu_(z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda g, z: _aten.gelu_backward(g, z, approximate="tanh"),
        fn_=lambda z: _aten.gelu_(z, approximate="tanh"),
    ),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
    "silu": Activation(F.silu, lambda g, z: _aten.silu_backward(g, z), fn_=lambda z: F.silu(z, inplace=True)),
    "relu2": Activation(lambda z: F.relu(z).square(), lambda g, z: 2 * g * F.relu(z), leaves_zeros=True),
    "identity": Activation(lambda z: z, lambda g, z: g),
    "tanh": Activation(torch.tanh, lambda g, z: _aten.tanh_backward(g, torch.tanh(z))),
    "sigmoid": Activation(torch.sigmoid, lambda g, z: _aten.sigmoid_backward(g, torch.sigmoid(z))),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, _LEAKY_RELU_SLOPE),
        lambda g, z: _aten.leaky_relu_backward(g, z, _LEAKY_RELU_SLOPE, False),
    ),
    "elu": Activation(F.elu, lambda g, z: _aten.elu_backward(g, 1.0, 1.0, 1.0, False, z)),
    "selu": Activation(F.selu, lambda g, z: _aten.elu_backward(g, _SELU_ALPHA, _SELU_SCALE, 1.0, False, z)),
    "mish": Activation(F.mish, lambda g, z: _aten.mish_backward(g, z)),
    "relu6": Activation(F.relu6, lambda g, z: _aten.hardtanh_backward(g, z, 0.0, 6.0), leaves_zeros=True),
    "softplus": Activation(F.softplus, lambda g, z: _aten.softplus_backward(g, z, 1.0, 20.0)),
    "hardswish": Activation(F.hardswish, lambda g, z: _aten.hardswish_backward(g, z), leaves_zeros=True),
    "hardtanh": Activation(F.hardtanh, lambda g, z: _aten.hardtanh_backward(g, z, -1.0, 1.0)),
    "softsign": Activation(F.softsign, lambda g, z: g / (1 + z.abs()).square()),
}
ACTIVATIONS["relu_relu"] = replace(ACTIVATIONS["relu"], up=ACTIVATIONS["relu"])
"""Name → function. `gelu` is the exact one (erf), `gelu_tanh` its tanh approximation, `relu2` is ReLU squared.

`relu_relu` has a ReLU on both sides of a gated FFN: relu(gate) · relu(up).
"""


def active_share(a: Tensor) -> Tensor:
    """Return the share of neurons above a hundredth of the token's largest activation: [..., h] → [...]."""
    size = a.abs()
    return (size > 0.01 * size.amax(-1, keepdim=True)).float().mean(-1)
