"""Random arguments for the operators of layers that skip neurons, and their definition written out in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.kernels.sparse_neurons import NeuronsCall

from .oracle import FUNCTIONS
from .sparse_linear import threshold


class Neurons(NeuronsCall):
    """The arguments of `surgeon::sparse_neurons` and `surgeon::masked_neurons`."""

    def to(self, dtype: torch.dtype) -> Neurons:
        """Input and weights in another dtype."""
        return Neurons(*(t if not isinstance(t, Tensor) else t.to(dtype) for t in self[:7]), *self[7:])

    def require_grad(self) -> Neurons:
        """Leaves that require gradients where there is one."""
        return Neurons(*(None if t is None else t.detach().clone().requires_grad_() for t in self[:7]), *self[7:])


def neurons(
    lead: tuple[int, ...] = (3, 5),
    d_in: int = 9,
    hidden: int = 12,
    d_out: int = 7,
    *,
    tau: float = 0.5,
    biases: tuple[bool, bool, bool] = (True, True, True),
    scale: bool = True,
    centre: bool = True,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Neurons:
    """Draw the arguments. About a share tau of the neurons is skipped."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    levels = torch.linspace(0, 1.5, 33) ** 1.5
    levels[0] = -1.0 if centre else 0.0
    return Neurons(
        x=draw(*lead, d_in),
        gate=draw(hidden, d_in) * d_in**-0.5,
        b_gate=draw(hidden) if biases[0] else None,
        w1=draw(hidden, d_in) * d_in**-0.5,
        b1=draw(hidden) if biases[1] else None,
        w2=draw(hidden, d_out) * hidden**-0.5,
        b2=draw(d_out) if biases[2] else None,
        scale=draw(hidden).abs().float() + 0.1 if scale else None,
        centre=draw(hidden).float() if centre else None,
        levels=levels,
        tau=torch.tensor(tau),
        activation=activation,
    ).to(dtype)


def oracle(args: Neurons) -> Tensor:
    """What the operators compute, in float64."""
    x, gate, b_gate, w1, b1, w2, b2 = (None if t is None else t.detach().double() for t in args[:7])
    assert x is not None
    assert gate is not None
    assert w1 is not None
    assert w2 is not None
    least = threshold(args.levels, float(args.tau))
    both = args.activation == "relu_relu"
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        y = torch.zeros(w2.shape[1], dtype=torch.float64) if b2 is None else b2.clone()
        for i in range(len(gate)):
            z = float(gate[i] @ token) + (0.0 if b_gate is None else float(b_gate[i]))
            a = FUNCTIONS[args.activation](z)
            if not abs(a) * (1.0 if args.scale is None else float(args.scale[i])) <= least:
                up = float(w1[i] @ token) + (0.0 if b1 is None else float(b1[i]))
                up = max(up, 0.0) if both else up
                y += (a * up - (0.0 if args.centre is None else float(args.centre[i]))) * w2[i]
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1) if rows else torch.zeros(*x.shape[:-1], w2.shape[1]).double()
