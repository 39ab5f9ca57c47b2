"""A linear layer that skips inputs, as a module of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon.kernels.sparse_linear import sparse_linear

# Score quantiles that a layer keeps: of 0, 1/256, ... 1.
LEVELS = 257


@dataclass(frozen=True)
class SparseLinearShape:
    """Everything about a `SparseLinear` but the values of its tensors."""

    d_in: int
    d_out: int
    bias: bool
    scale: bool
    centre: bool

    @property
    def describe(self) -> str:
        """`768 inputs → 3072`."""
        return f"{self.d_in} inputs → {self.d_out}"


class SparseLinear(nn.Module):
    """A linear layer that reads only the inputs that are far from their usual value: x [..., d_in] → [..., d_out].

    `surgeon.kernels.sparse_linear` defines what it computes. Parameters: weight [d_in, d_out], bias [d_out]. Buffers:
    scale [d_in], centre [d_in], levels [257], all float32, and tau, a float32 scalar in [0, 1]. Those that the layer
    does not have are None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
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
        for name, there in (("scale", shape.scale), ("centre", shape.centre)):
            self.register_buffer(name, buffer(shape.d_in) if there else None)
        self.register_buffer("levels", buffer(LEVELS))
        self.register_buffer("tau", buffer())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        y: Tensor = sparse_linear(x, self.weight, self.bias, self.scale, self.centre, self.levels, self.tau)
        return y

    def extra_repr(self) -> str:
        """`768 inputs → 3072`."""
        return self.shape.describe
