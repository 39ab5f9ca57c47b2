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

Weights of 4 bits stand for weights of 8 bits. Neighbouring inputs of an output, a group, share a factor g from 1 to 17,
and q[n, k] = g · v with v from -8 to 7, so that q is from -127 to 127 and sums are the same integers (progressive
groups, QServe, arXiv 2405.04532). A matrix [N, K] is uint8 [N / 16, K / 8, 16, 4]. In place
[n // 16, k // 8, n % 16, k % 4] the low half of a byte has v + 8 of k % 8 = 0 to 3, and the high half that of 4 to 7.
The halves belong to two neighbouring places of the panels above. The factors are uint8 [N / 16, G, 16], with
factors[n // 16, k // size, n % 16] = g and the size that `group_size` gives for G groups.

Weights in float8 (E4M3 of arXiv 2209.05433: 4 bits of exponent, 3 of mantissa, no infinity) have the scales and the
panels of those in 8 bits, with float8_e4m3fn from -448 to 448 in place of integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.experts import Experts

FLOAT8 = torch.float8_e4m3fn
LANES = 16
"""Outputs side by side in a panel."""
MOST = 127
WIDEST = 2**16
"""The most products of 8-bit numbers, one of them without a sign, whose sum always has room in 32 bits."""
MOST_FLOAT8 = 448
"""The largest number in float8."""
MOST_HALF = 32768
"""The largest of a token's inputs and hidden values that are multiplied with weights in float8."""
MOST_TRUNK = 2047  # of the router's input and of the trunk
MOST_IN_GROUPS = 119
"""The largest of a neuron's weights before they are rounded to 4 bits: 17 · 7."""
PLACES = 8
"""Inputs of a group come in multiples of these: so many are in a byte's halves side by side."""
_LARGEST_FACTOR, _LARGEST = 17, 7
_FACTORS = 3  # that are tried for a group: with more of them the error was the same
_PART = 2**22  # numbers that are rounded to 4 bits at a time
Panels = Tensor


def _depth(dtype: torch.dtype) -> int:
    """Values of an input one after the other in a panel: 4 bytes."""
    return 2 if dtype == torch.int16 else 4


def panels_shape(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of a matrix [rows, columns] of int8, float8 or int16 in panels."""
    return (-(-rows // LANES), -(-columns // _depth(dtype)), LANES, _depth(dtype))


def pack(matrix: Tensor) -> Panels:
    """Lay out a matrix [..., N, K] in panels, [..., N / 16, K / 4, 16, 4], or [..., N / 16, K / 2, 16, 2] of int16."""
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


def numbers(panels: Panels, rows: int, columns: int) -> Tensor:
    """Return the same in float32."""
    return unpack(panels, rows, columns).float()


def group_size(columns: int, groups: int) -> int:
    """Return how many of `columns` inputs each of so many groups has; the last one may have fewer."""
    return -(-columns // (PLACES * groups)) * PLACES


def groups_of(columns: int, group: int) -> int:
    """Return how many groups of up to `group` inputs, a multiple of `PLACES`, there are."""
    return -(-columns // group)


def halves_shape(rows: int, columns: int) -> tuple[int, ...]:
    """Return the shape of a matrix [rows, columns] of 4 bits in panels."""
    return (-(-rows // LANES), -(-columns // PLACES), LANES, PLACES // 2)


def factors_shape(rows: int, groups: int) -> tuple[int, ...]:
    """Return the shape of the factors of a matrix of so many rows and groups."""
    return (-(-rows // LANES), groups, LANES)


def pack_halves(matrix: Tensor) -> Panels:
    """Lay out a matrix [..., N, K] of integers from -8 to 7 in panels: uint8 [..., N / 16, K / 8, 16, 4]."""
    panels = pack(F.pad(matrix, (0, -matrix.shape[-1] % PLACES))).view(torch.uint8) + 8
    return panels[..., ::2, :, :] | panels[..., 1::2, :, :] << 4


def pack_factors(factors: Tensor) -> Tensor:
    """Lay out factors [..., N, G] as uint8 [..., N / 16, G, 16], with zeros behind the end."""
    filled = F.pad(factors, (0, 0, 0, -factors.shape[-2] % LANES))
    *lead, height, groups = filled.shape
    return filled.reshape(*lead, height // LANES, LANES, groups).transpose(-2, -1).contiguous()


def unpack_halves(panels: Panels, factors: Tensor, columns: int) -> Panels:
    """Return the int8 panels [..., N / 16, K / 4, 16, 4] that 4 bits and their factors stand for."""
    places, groups = -(-columns // PLACES), factors.shape[-2]
    each = group_size(columns, groups) // PLACES
    both = torch.stack([panels & 15, panels >> 4], -3).to(torch.int8) - 8  # [..., K / 8, 2, 16, 4]
    factor = factors.to(torch.int8).repeat_interleave(each, -2)[..., :places, None, :, None]
    whole: Panels = (both * factor).flatten(-4, -3)[..., : -(-columns // 4), :, :].contiguous()
    return whole


def quantise(matrix: Tensor, most: int = MOST) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8 with a scale for every row: [..., N, K] → int8 of the same shape, float32 [..., N]."""
    scaled, scale = _scaled(matrix, most)
    return scaled.round().to(torch.int8), scale


def _scaled(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Divide rows by scales such that their largest numbers are `most`: float32 [..., N, K], [..., N]."""
    matrix = matrix.float()
    scale = matrix.abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, 1.0)
    return matrix / scale, scale.squeeze(-1)


def quantise_groups(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round numbers from -119 to 119 to products of 4 bits and factors, with small squared errors.

    Args:
        matrix: float32 [..., N, K].
        group: how many inputs share a factor at most, a multiple of `PLACES`.

    Returns:
        int8 [..., N, K] from -8 to 7, and factors from 1 to 17, uint8 [..., N, G].
    """
    columns = matrix.shape[-1]
    groups = groups_of(columns, group)
    size, rows = group_size(columns, groups), matrix.flatten(0, -2)
    halves = torch.empty_like(rows, dtype=torch.int8)
    factors = torch.empty((len(rows), groups), dtype=torch.uint8, device=matrix.device)
    parts = (torch.split(tensor, max(1, _PART // columns)) for tensor in (rows, halves, factors))
    for part, to_halves, to_factors in zip(*parts, strict=True):
        best, factor = _best(F.pad(part, (0, groups * size - columns)).reshape(-1, groups, size))
        to_halves.copy_(best.flatten(-2)[:, :columns])
        to_factors.copy_(factor.squeeze(-1))
    return halves.view(matrix.shape), factors.view(*matrix.shape[:-1], groups)


def _best(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return 4 bits [..., size] and factors [..., 1] for float numbers [..., size]."""
    largest = (numbers.abs().amax(-1, keepdim=True) / _LARGEST).ceil().clamp(1, _LARGEST_FACTOR)
    halves, chosen, least_error = torch.zeros_like(numbers), largest, torch.full_like(largest, torch.inf)
    for less in range(_FACTORS):
        factor = (largest - less).clamp_min(1)
        # -8 · 16 would be less than -127.
        least = torch.where(factor < MOST / (_LARGEST + 1), -_LARGEST - 1, -_LARGEST)
        rounded = torch.maximum((numbers / factor).round().clamp_max(_LARGEST), least)
        error = (rounded * factor - numbers).square().sum(-1, keepdim=True)
        better = error < least_error
        halves, chosen = torch.where(better, rounded, halves), torch.where(better, factor, chosen)
        least_error = torch.where(better, error, least_error)
    return halves, chosen


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
    """The weights of E experts of s neurons, as the operator takes them (see the module).

    w1_group, gate_group, w2_group: the factors of weights of 4 bits, None for others.
    """

    w1: Panels
    w1_scale: Tensor
    b1: Tensor | None
    gate: Panels | None
    gate_scale: Tensor | None
    b_gate: Tensor | None
    w2: Panels
    w2_scale: Tensor
    y_scale: Tensor
    w1_group: Tensor | None = None
    gate_group: Tensor | None = None
    w2_group: Tensor | None = None

    @classmethod
    def of(
        cls, experts: Experts, x_scale: Tensor | None = None, group: int | None = None, *, float8: bool = False
    ) -> Int8Experts:
        """Quantise the weights of experts whose input is multiplied by `x_scale` [d_in].

        group: how many inputs share a factor of weights of 4 bits, a multiple of `PLACES`; None for 8 bits.
        float8: whether weights of 8 bits are in float8 rather than integers.
        """

        def first(matrix: Tensor) -> tuple[Panels, Tensor | None, Tensor]:
            scaled, scale = _scaled(matrix if x_scale is None else matrix.float() / x_scale.float(), most)
            return *_packed(scaled, group, float8), scale

        most = MOST_FLOAT8 if float8 else MOST if group is None else MOST_IN_GROUPS
        w1, w1_group, w1_scale = first(experts.w1)
        gate, gate_group, gate_scale = (None, None, None) if experts.gate is None else first(experts.gate)
        y_scale = experts.w2.float().abs().amax((0, 1))
        y_scale = torch.where(y_scale > 0, y_scale, 1.0)
        scaled, w2_scale = _scaled(experts.w2.float() / y_scale, most)
        w2, w2_group = _packed(scaled.transpose(1, 2), group, float8)
        biases = _float(experts.b1), _float(experts.b_gate)
        made = cls(
            w1, w1_scale, biases[0], gate, gate_scale, biases[1], w2, w2_scale, y_scale, w1_group, gate_group, w2_group
        )
        # Hidden values are rounded after they have this scale: one that no output reads must not be the largest.
        read = (numbers(made.in_8_bits(experts.w1.shape[2]).w2, len(y_scale), w2_scale.shape[1]) != 0).any(1)
        return made._replace(w2_scale=torch.where(read, w2_scale, 0.0))

    @property
    def float8(self) -> bool:
        """Whether the weights are in float8."""
        return self.w1.dtype == FLOAT8

    def in_8_bits(self, d_in: int) -> Int8Experts:
        """Return the same weights as panels of 8 bits. d_in: the width of the input."""
        if self.w1_group is None or self.w2_group is None:
            return self
        gate = self.gate
        if gate is not None and self.gate_group is not None:
            gate = unpack_halves(gate, self.gate_group, d_in)
        return self._replace(
            w1=unpack_halves(self.w1, self.w1_group, d_in),
            gate=gate,
            w2=unpack_halves(self.w2, self.w2_group, self.w2_scale.shape[1]),
            w1_group=None,
            gate_group=None,
            w2_group=None,
        )

    def group(self, d_in: int) -> int | None:
        """How many inputs share a factor of weights of 4 bits at most, None for others. d_in: width of the input."""
        if self.w1_group is None or self.w2_group is None:
            return None
        widths = (d_in, self.w1_group), (self.w2_scale.shape[1], self.w2_group)
        return max(group_size(columns, factors.shape[-2]) for columns, factors in widths)

    def floats(self, x_scale: Tensor | None, d_in: int) -> Experts:
        """Return the weights as numbers in float32. x_scale: as in `of`. d_in: the width of the input."""
        whole, neurons, d_out = self.in_8_bits(d_in), self.w1_scale.shape[1], len(self.y_scale)

        def first(panels: Panels, scale: Tensor) -> Tensor:
            matrix = numbers(panels, neurons, d_in) * scale.float().unsqueeze(-1)
            return matrix if x_scale is None else matrix * x_scale.float()

        w2 = numbers(whole.w2, d_out, neurons).transpose(1, 2) * self.w2_scale.float().unsqueeze(-1)
        gate = None if whole.gate is None or self.gate_scale is None else first(whole.gate, self.gate_scale)
        w1, biases = first(whole.w1, self.w1_scale), (_float(self.b1), _float(self.b_gate))
        return Experts(w1, biases[0], gate, biases[1], w2 * self.y_scale.float())


def _packed(scaled: Tensor, group: int | None, float8: bool) -> tuple[Panels, Tensor | None]:
    """Round numbers to panels of 8 bits, or of 4 bits with factors (see `quantise_groups`)."""
    if float8:
        return pack(scaled.to(FLOAT8)), None
    if group is None:
        return pack(scaled.round().to(torch.int8)), None
    halves, factors = quantise_groups(scaled, group)
    return pack_halves(halves), pack_factors(factors)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
