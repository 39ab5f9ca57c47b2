"""A linear layer that skips inputs, as a module of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon.kernels.sparse_linear import add_low_rank, sparse_linear

# Score quantiles that a layer keeps: of 0, 1/256, ... 1.
LEVELS = 257


@dataclass(frozen=True)
class SparseLinearShape:
    """Everything about a `SparseLinear` but the values of its tensors. rank: 0 if it has no low rank."""

    d_in: int
    d_out: int
    bias: bool
    scale: bool
    centre: bool
    rank: int = 0

    @property
    def describe(self) -> str:
        """`768 inputs → 3072, rank 48`."""
        return f"{self.d_in} inputs → {self.d_out}" + (f", rank {self.rank}" if self.rank else "")


class SparseLinear(nn.Module):
    """A linear layer that reads only the inputs that are far from their usual value: x [..., d_in] → [..., d_out].

    `surgeon.kernels.sparse_linear` defines what it computes. Parameters: weight [d_in, d_out], bias [d_out], low_in
    [rank, d_in], low_out [d_out, rank]. Buffers: scale [d_in], centre [d_in], levels [257], all float32, and tau, a
    float32 scalar in [0, 1]. Those that the layer does not have are None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    low_in: nn.Parameter | None
    low_out: nn.Parameter | None
    scale: Tensor | None
    centre: Tensor | None
    levels: Tensor
    tau: Tensor

    def __init__(
        self, shape: SparseLinearShape, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.shape = shape

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        def buffer(*size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=torch.float32)

        self.weight = parameter(shape.d_in, shape.d_out)
        self.register_parameter("bias", parameter(shape.d_out) if shape.bias else None)
        low = {"low_in": (shape.rank, shape.d_in), "low_out": (shape.d_out, shape.rank)}
        for name, size in low.items():
            self.register_parameter(name, parameter(*size) if shape.rank else None)
        for name, there in (("scale", shape.scale), ("centre", shape.centre)):
            self.register_buffer(name, buffer(shape.d_in) if there else None)
        self.register_buffer("levels", buffer(LEVELS))
        self.register_buffer("tau", buffer())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        y: Tensor = sparse_linear(x, self.weight, self.bias, self.scale, self.centre, self.levels, self.tau)
        if self.low_in is None:
            return y
        with_low: Tensor = add_low_rank(y, x, self.low_in, self.low_out)
        return with_low

    def extra_repr(self) -> str:
        """`768 inputs → 3072, rank 48`."""
        return self.shape.describe
