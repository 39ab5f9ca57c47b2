"""Tile sizes, warps and pipeline stages: small tables by chip, dtype and number of neurons, with the reasons.

What bounds them is what the compiler reports for a kernel (`tests/kernels/triton/test_compiled.py` compiles the table
for every target): no register may spill, shared memory must fit, and `tl.dot` needs at least 16 along each axis.
There is no autotuning: it runs a kernel several times on the same output, which the kernels here add to.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton

from .launch import Chip

_FUSED_NEURONS = 128
_EXPECTED_SHARE = 4  # one in so many pairs is taken to be selected: the host does not know


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

    def constants(self, *names: Literal["rows", "neurons", "depth", "columns"]) -> dict[str, int]:
        """Those of the sizes that a kernel has, by the names they have there, and how it is run."""
        return {name.upper(): getattr(self, name) for name in names} | {"warps": self.warps, "stages": self.stages}


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
    elif chip.capability >= 90 and _roomy(chip):
        most = 128  # a warp group multiplies 64 rows at a time, from shared memory
    return _padded(triton.cdiv(tokens, _EXPECTED_SHARE), most)


def most_fused(dtype: torch.dtype, *, gated: bool) -> int:
    """Up to how many neurons an expert's hidden values stay on the chip, in registers.

    Half as many if gated, which takes two accumulators, and half as many in fp32, which holds what they are multiplied
    with in registers too.
    """
    return _FUSED_NEURONS // (2 if gated else 1) // (2 if dtype == torch.float32 else 1)


def fuses(chip: Chip, dtype: torch.dtype, tokens: int, experts: int, neurons: int, rows: int, *, gated: bool) -> bool:
    """Whether the forward is one kernel rather than two.

    One tile is one program's work in the fused kernel. With fewer tiles than processors the chip would starve, and
    the two kernels cut the work along neurons and columns too, for the price of writing and reading hidden values.
    """
    tiles = experts * triton.cdiv(triton.cdiv(tokens, _EXPECTED_SHARE), rows)
    return neurons <= most_fused(dtype, gated=gated) and tiles >= chip.processors


def programs(chip: Chip, tiles: Tiles) -> int:
    """How many programs share out a plan's tiles: sixteen warps for each processor.

    Where registers or shared memory let fewer run at a time, the others take their share afterwards.
    """
    return chip.processors * (2 if tiles.warps >= 8 else 4)


def fused(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, gated: bool) -> Tiles:
    """Of `forward_kernels.fused`: accumulators of rows × neurons (twice if gated) and then rows × columns."""
    wide = _padded(neurons, most_fused(dtype, gated=gated))
    columns = 32 if chip.backend == "hip" or gated else 64
    warps = _warps(chip, dtype, rows * max(wide, columns))
    return Tiles(rows, wide, _depth(chip, dtype), columns, warps, _stages(chip))


def hidden(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, products: int) -> Tiles:
    """Of `forward_kernels.hidden` and `backward_kernels.grad_hidden`: 1 to 3 `products` of rows × neurons.

    The more accumulators, the narrower each; in fp32 half as wide, since what is multiplied is in registers too.
    """
    most = {1: 128, 2: 64, 3: 32}[products]
    wide = _padded(neurons, most // 2 if dtype == torch.float32 else most)
    return Tiles(rows, wide, _depth(chip, dtype), 0, _warps(chip, dtype, rows * wide), _stages(chip))


def combine(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, products: int) -> Tiles:
    """Of `forward_kernels.combine`, whose sum goes over the neurons of an expert: often one step.

    Two products load twice as much, so fewer loads are in flight and tiles are narrower. Without tensor cores a whole
    step of the sum is in registers: a short one in fp32.
    """
    wide = _padded(neurons, 16 if dtype == torch.float32 else 32 if chip.backend == "hip" else 64)
    columns = 64 if dtype == torch.float32 or products == 2 else 128
    return Tiles(rows, wide, 0, columns, _warps(chip, dtype, rows * columns), _stages(chip) if products == 1 else 2)


def grad_weight(chip: Chip, dtype: torch.dtype, neurons: int) -> Tiles:
    """Of `backward_kernels.grad_weight`: an accumulator of neurons × columns and a sum over the pairs of an expert."""
    wide = _padded(neurons, 64)
    columns = 64 if dtype == torch.float32 else 128
    return Tiles(_depth(chip, dtype), wide, 0, columns, _warps(chip, dtype, wide * columns), _stages(chip))


def decode(chip: Chip, dtype: torch.dtype, tokens: int, neurons: int, *, gated: bool) -> Tiles:
    """Of the kernels in `decode_kernels`: few neurons a program, so that a few selected experts still occupy the chip.

    For one token 4 neurons, each read in a stretch long enough to keep memory busy, from one weight or half as long
    from two; the fewer neurons, the more additions to the output, one of each program to every element.
    """
    if tokens == 1:
        return Tiles(1, min(4, triton.next_power_of_2(neurons)), 256 if gated else 512, 256, 4, 1)
    deep = 64 if dtype == torch.float32 else 128
    return Tiles(16, 16, deep, deep, 4, 2 if chip.backend == "hip" else 3)


def _warps(chip: Chip, dtype: torch.dtype, elements: int) -> int:
    """Eight warps from 32 elements a thread of four on: beside its value, one has a 64-bit address.

    In fp32 on NVIDIA from 8 on: without tensor cores, what is multiplied is in registers too.
    """
    most = 8 if dtype == torch.float32 and chip.backend == "cuda" else 32
    return 8 if elements >= most * 128 else 4


def _depth(chip: Chip, dtype: torch.dtype) -> int:
    """What is multiplied at a time along a sum. It waits in shared memory, and in part in registers."""
    return 64 if _roomy(chip) and dtype != torch.float32 else 32


def _stages(chip: Chip) -> int:
    return 3 if _roomy(chip) else 2


def _roomy(chip: Chip) -> bool:
    """Whether shared memory is that of a data-centre NVIDIA chip: others have about 100 KiB, AMD's 64 KiB."""
    return chip.backend == "cuda" and chip.shared_memory > 160 * 1024
