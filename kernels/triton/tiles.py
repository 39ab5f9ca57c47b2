"""Tile sizes, warps and pipeline stages: small tables by chip, dtype and number of neurons, with the reasons.

What bounds them is what the compiler reports for a kernel (`tests/kernels/triton/test_compiled.py` compiles the table
for every target): no register may spill, shared memory must fit, and `tl.dot` needs at least 16 along each axis.
There is no autotuning: it runs a kernel several times on the same output, which the kernels here add to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .launch import Chip

FUSED_NEURONS = 128
"""Up to how many neurons an expert's hidden values stay on the chip, in registers. Half as many if gated, which takes
two accumulators, and half as many in fp32, which holds what they are multiplied with in registers too."""

_EXPECTED_SHARE = 4  # one in so many pairs is taken to be selected: the host does not know
_BIG_SHARED_MEMORY = 160 * 1024  # data-centre NVIDIA chips have at least this, others about 100 KiB, AMD 64 KiB


class Tiles(NamedTuple):
    """Sizes of a kernel's tile and how it is run.

    Attributes:
        rows: tokens.
        neurons: hidden values.
        depth: elements of the sum that gives hidden values which are loaded at a time.
        columns: elements of the output which are computed at a time.
        warps: warps that share a tile; more of them spread the accumulators over more registers.
        stages: loads in flight, each of which takes shared memory.
    """

    rows: int
    neurons: int
    depth: int
    columns: int
    warps: int
    stages: int


def _padded(size: int, most: int) -> int:
    """The power of two that covers `size`, between what `tl.dot` needs and `most`."""
    return min(most, max(16, int(triton.next_power_of_2(size))))


def rows(chip: Chip, dtype: torch.dtype, tokens: int) -> int:
    """Rows of a tile, for all kernels that follow one plan.

    As many as there are to be expected for one expert, since the rest of a tile is computed for nothing; at most what
    the accumulators of the largest tile leave registers for. fp32 is multiplied from registers, half as many rows.
    """
    most = 64
    if dtype == torch.float32:
        most = 32
    elif chip.backend == "cuda" and chip.capability >= 90 and chip.shared_memory > _BIG_SHARED_MEMORY:
        most = 128  # a warp group multiplies 64 rows at a time, from shared memory
    return _padded(triton.cdiv(tokens, _EXPECTED_SHARE), most)


def fuses(chip: Chip, dtype: torch.dtype, tokens: int, experts: int, neurons: int, rows: int, *, gated: bool) -> bool:
    """Whether the forward is one kernel rather than two.

    One tile is one program's work in the fused kernel. With fewer tiles than processors the chip would starve, and
    the two kernels cut the work along neurons and columns too, for the price of writing and reading hidden values.
    """
    tiles = experts * triton.cdiv(triton.cdiv(tokens, _EXPECTED_SHARE), rows)
    most = FUSED_NEURONS // (2 if gated else 1) // (2 if dtype == torch.float32 else 1)
    return neurons <= most and tiles >= chip.processors


def programs(chip: Chip, tiles: Tiles) -> int:
    """How many programs share out a plan's tiles: sixteen warps for each processor.

    Where registers or shared memory let fewer run at a time, the others take their share afterwards.
    """
    return chip.processors * (2 if tiles.warps >= 8 else 4)


def fused(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, gated: bool) -> Tiles:
    """Of `forward_kernels.fused`: accumulators of rows × neurons (twice if gated) and then rows × columns."""
    wide = _padded(neurons, FUSED_NEURONS)
    depth = 32 if dtype == torch.float32 or chip.backend == "hip" else 64
    columns = 64
    if chip.backend == "hip" or gated or dtype == torch.float32:
        columns = 32
    return Tiles(rows, wide, depth, columns, _warps(rows * max(wide, columns)), _stages(chip))


def hidden(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, products: int) -> Tiles:
    """Of `forward_kernels.hidden` and `backward_kernels.grad_hidden`: 1 to 3 `products` of rows × neurons.

    The more accumulators, the narrower each; in fp32 half as wide, since what is multiplied is in registers too.
    """
    most = {1: 128, 2: 64, 3: 32}[products]
    wide = _padded(neurons, most // 2 if dtype == torch.float32 else most)
    depth = 32 if dtype == torch.float32 or chip.backend == "hip" else 64
    return Tiles(rows, wide, depth, 0, _warps(rows * wide), _stages(chip))


def combine(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, products: int) -> Tiles:
    """Of `forward_kernels.combine`, whose sum goes over the neurons of an expert: often one step.

    Two products load twice as much, so fewer loads are in flight and tiles are narrower. Without tensor cores a whole
    step of the sum is in registers: a short one in fp32.
    """
    wide = _padded(neurons, 16 if dtype == torch.float32 else 32 if chip.backend == "hip" else 64)
    columns = 64 if dtype == torch.float32 or products == 2 else 128
    return Tiles(rows, wide, 0, columns, _warps(rows * columns), _stages(chip) if products == 1 else 2)


def grad_weight(chip: Chip, dtype: torch.dtype, neurons: int) -> Tiles:
    """Of `backward_kernels.grad_weight`: an accumulator of neurons × columns and a sum over the pairs of an expert."""
    deep = 32 if dtype == torch.float32 or chip.backend == "hip" else 64
    wide = _padded(neurons, 64)
    columns = 64 if dtype == torch.float32 else 128
    return Tiles(deep, wide, 0, columns, _warps(wide * columns), _stages(chip))


def decode(chip: Chip, dtype: torch.dtype, tokens: int, neurons: int) -> Tiles:
    """Of the kernels in `decode_kernels`: few neurons a program, so that a few selected experts still occupy the chip.

    For one token 4 neurons, each read in a stretch long enough to keep memory busy; the fewer neurons, the more
    additions to the output, one of each program to every element.
    """
    if tokens == 1:
        return Tiles(1, min(4, triton.next_power_of_2(neurons)), 512, 256, 4, 1)
    deep = 64 if dtype == torch.float32 else 128
    return Tiles(16, 16, deep, deep, 4, 2 if chip.backend == "hip" else 3)


def _warps(elements: int) -> int:
    """Eight warps from 32 elements a thread of four on: beside its value, one has a 64-bit address."""
    return 8 if elements >= 32 * 128 else 4


def _stages(chip: Chip) -> int:
    return 3 if chip.backend == "cuda" and chip.shared_memory > _BIG_SHARED_MEMORY else 2
