"""Random arguments for the dynamic-k operators, and a way to force how the torch backend computes them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from surgeon.kernels.torch import backend as torch_backend
from surgeon.kernels.torch import plan as torch_plan

# Costs that make `torch_plan.plan` take the way named unless every pair is selected, which is always dense; "in runs"
# is dense as well unless all tokens selected the same.
_COSTS = {"by expert": "_EXPERT_COST", "copies": "_COPY_COST", "in runs": "_RUN_COST", "by neuron": "_SPARSE_COST"}
_MUCH = 1e15


def _only(way: str) -> dict[str, float]:
    return {cost: -_MUCH if other == way else _MUCH for other, cost in _COSTS.items()} | {"_FEW_TOKENS": 10**9}


WAYS: dict[str, dict[str, float]] = {
    "as planned": {},
    **{way: _only(way) for way in ("dense", *_COSTS)},
    "by expert in parts": _only("by expert") | {"_CACHED_BYTES": 0, "_LEAST_ROWS": 2},
}


@contextmanager
def forced(way: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in WAYS[way].items():
            stack.enter_context(patch.object(torch_plan if hasattr(torch_plan, name) else torch_backend, name, value))
        yield


class Arguments(NamedTuple):
    x: Tensor
    scores: Tensor
    threshold: Tensor
    w1: Tensor
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str

    def require_grad(self) -> "Arguments":
        """Leaves that require gradients, except scores and threshold."""
        named = self._asdict()
        for name, value in named.items():
            if isinstance(value, Tensor) and name not in ("scores", "threshold"):
                named[name] = value.detach().clone().requires_grad_()
        return Arguments(**named)

    def leaves(self) -> list[Tensor]:
        return [value for value in self if isinstance(value, Tensor) and value.requires_grad]


def arguments(
    lead: tuple[int, ...] = (3, 5),
    experts: int = 6,
    neurons: int = 4,
    d_in: int = 5,
    d_out: int = 7,
    *,
    gated: bool = False,
    bias: bool = True,
    activation: str = "gelu",
    share: float = 0.4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Arguments:
    """About `share` of the pairs are selected: exactly none for 0 and all for 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    scores = torch.rand(*lead, experts, generator=generator)
    return Arguments(
        x=draw(*lead, d_in),
        scores=scores,
        threshold=torch.full(lead, 1.0 - share if share else 2.0),
        w1=draw(experts, neurons, d_in),
        b1=draw(experts, neurons) if bias else None,
        gate=draw(experts, neurons, d_in) if gated else None,
        b_gate=draw(experts, neurons) if gated and bias else None,
        w2=draw(experts, neurons, d_out),
        b2=draw(d_out) if bias else None,
        activation=activation,
    )
