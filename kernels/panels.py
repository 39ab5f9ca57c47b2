"""How 8-bit weights of experts, and 16-bit weights of routers, are stored.

A number w is stored as an integer q from -127 to 127 and scales. For the first product, w ≈ w1_scale · q / x_scale:
every neuron has a scale, and so may every input, which is multiplied by x_scale before it is rounded (as in
SmoothQuant, arXiv 2211.10438). For the second product, w ≈ w2_scale · q · y_scale: every neuron has a scale, and every
output has one, which all experts share. A few outputs of a transformer have far larger weights than the others; without
scales of their own the rounding of all others is several times as coarse.

The operator reads its weights as they are stored, in *panels*: a matrix [N, K], which is multiplied with vectors of K
values, is [N / 16, K / 4, 16, 4], with panels[n // 16, k // 4, n % 16, k % 4] = q[n, k] and zeros behind the end. This
is the order in which the 8-bit dot products of processors read them, four values of K in each of 16 lanes. The trunk of
the router has 16 bits, because an expert whose score is near the threshold runs or is skipped by the last ones. Its
panels are [N / 16, K / 2, 16, 2].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.experts import Experts

LANES = 16
"""Outputs side by side in a panel."""
MOST = 127
WIDEST = 2**16
"""The most products of 8-bit numbers, one of them without a sign, whose sum always has room in 32 bits."""
MOST_TRUNK = 2047  # of the router's input and of the trunk
Panels = Tensor


def _depth(dtype: torch.dtype) -> int:
    """Values of an input one after the other in a panel: 4 bytes."""
    return 4 if dtype == torch.int8 else 2


def panels_shape(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of a matrix [rows, columns] of int8 or int16 in panels."""
    return (-(-rows // LANES), -(-columns // _depth(dtype)), LANES, _depth(dtype))


def pack(matrix: Tensor) -> Panels:
    """Lay out a matrix [..., N, K] in panels: int8 [..., N / 16, K / 4, 16, 4] or int16 [..., N / 16, K / 2, 16, 2]."""
    rows, columns = matrix.shape[-2:]
    depth = _depth(matrix.dtype)
    filled = F.pad(matrix, (0, -columns % depth, 0, -rows % LANES))
    *lead, height, width = filled.shape
    split = filled.reshape(*lead, height // LANES, LANES, width // depth, depth)
    panels: Panels = split.transpose(-3, -2).contiguous()
    return panels


def unpack(panels: Panels, rows: int, columns: int) -> Tensor:
    """Return the matrix [..., rows, columns] of `pack`."""
    filled: Tensor = panels.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return filled[..., :rows, :columns]


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8 with a scale for every row: [..., N, K] → int8 of the same shape, float32 [..., N]."""
    matrix = matrix.float()
    scale = matrix.abs().amax(-1, keepdim=True) / MOST
    scale = torch.where(scale > 0, scale, 1.0)
    return (matrix / scale).round().to(torch.int8), scale.squeeze(-1)


def quantise_trunk(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round a trunk [R, K] to 12 bits: int16 of the same shape, and a float32 scale for every row, [R].

    Rows of very many inputs get fewer bits, such that no sum of products is too large for int32.
    """
    matrix = matrix.float()
    # Rounding adds at most a half to every number.
    room = 2**31 // MOST_TRUNK - matrix.shape[-1]
    scale = torch.maximum(matrix.abs().amax(-1) / MOST_TRUNK, matrix.abs().sum(-1) / room)
    scale = torch.where(scale > 0, scale, 1.0)
    return (matrix / scale.unsqueeze(-1)).round().to(torch.int16), scale


class Int8Experts(NamedTuple):
    """The weights of E experts of s neurons, as the operator takes them (see the module)."""

    w1: Panels
    w1_scale: Tensor
    b1: Tensor | None
    gate: Panels | None
    gate_scale: Tensor | None
    b_gate: Tensor | None
    w2: Panels
    w2_scale: Tensor
    y_scale: Tensor

    @classmethod
    def of(cls, experts: Experts, x_scale: Tensor | None = None) -> Int8Experts:
        """Quantise the weights of experts whose input is multiplied by `x_scale` [d_in]."""

        def first(matrix: Tensor) -> tuple[Tensor, Tensor]:
            whole, scale = quantise(matrix.float() if x_scale is None else matrix.float() / x_scale.float())
            return pack(whole), scale

        w1, w1_scale = first(experts.w1)
        gate, gate_scale = (None, None) if experts.gate is None else first(experts.gate)
        y_scale = experts.w2.float().abs().amax((0, 1))
        y_scale = torch.where(y_scale > 0, y_scale, 1.0)
        w2, w2_scale = quantise(experts.w2.float() / y_scale)
        # Hidden values are rounded after they have this scale: one that no output reads must not be the largest.
        w2_scale = torch.where((w2 != 0).any(-1), w2_scale, 0.0)
        biases = _float(experts.b1), _float(experts.b_gate)
        return cls(
            w1, w1_scale, biases[0], gate, gate_scale, biases[1], pack(w2.transpose(1, 2)), w2_scale, y_scale
        )  # fmt: skip

    def floats(self, x_scale: Tensor | None, d_in: int) -> Experts:
        """Return the weights as numbers in float32. x_scale: as in `of`. d_in: the width of the input."""
        neurons, d_out = self.w1_scale.shape[1], len(self.y_scale)

        def first(panels: Panels, scale: Tensor) -> Tensor:
            numbers = unpack(panels, neurons, d_in) * scale.float().unsqueeze(-1)
            return numbers if x_scale is None else numbers * x_scale.float()

        w2 = unpack(self.w2, d_out, neurons).transpose(1, 2) * self.w2_scale.float().unsqueeze(-1)
        gate = None if self.gate is None or self.gate_scale is None else first(self.gate, self.gate_scale)
        w1, biases = first(self.w1, self.w1_scale), (_float(self.b1), _float(self.b_gate))
        return Experts(w1, biases[0], gate, biases[1], w2 * self.y_scale.float())


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
