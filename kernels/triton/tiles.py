"""Choose tile sizes, warps and pipeline stages by chip, dtype and number of neurons, from small tables with reasons.

The sizes for `Chip.hopper` were chosen among several dozen by time on an H100; the others are estimates. They are bound
by what the compiler reports for a kernel: no register may spill, shared memory must fit, and `tl.dot` needs at least 16
along each axis. `tests/kernels/triton/test_compiled.py` compiles the table for every target. There is no autotuning,
because it runs a kernel several times on the same output, and the kernels here add to their output.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton

from surgeon.kernels.triton.launch import Chip

_FUSED_NEURONS = 128
_EXPECTED_SHARE = 4  # one in this many pairs is assumed to be selected: the host does not know


class Tiles(NamedTuple):
    """The sizes of a kernel's tile, and how the kernel is run.

    Attributes:
        rows: tokens.
        neurons: hidden values.
        depth: how many elements of the sum for a hidden value are loaded at a time.
        columns: how many elements of the output are computed at a time.
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
        """Return the sizes that a kernel takes, by its names for them, and how it is run."""
        return {name.upper(): getattr(self, name) for name in names} | {"warps": self.warps, "stages": self.stages}


def _padded(size: int, most: int) -> int:
    """The power of two that covers `size`, between what `tl.dot` needs and `most`."""
    return min(most, max(16, int(triton.next_power_of_2(size))))


def rows(chip: Chip, dtype: torch.dtype, tokens: int) -> int:
    """Return the rows of a tile, for all kernels that follow one plan.

    A tile has as many rows as one expert should get, because the rest of a tile is computed for nothing. The
    accumulators of the largest tile limit this by their registers. fp32 is multiplied from registers, so it has half as
    many rows.
    """
    most = 64
    if chip.hopper:
        most = 128  # a warp group multiplies 64 rows at a time, from shared memory
    elif dtype == torch.float32:
        most = 32
    return _padded(triton.cdiv(tokens, _EXPECTED_SHARE), most)


def most_fused(chip: Chip, dtype: torch.dtype, *, gated: bool) -> int:
    """Return the most neurons for which an expert's hidden values stay on the chip, in registers.

    Gated layers have half as many, because they take two accumulators. fp32 has half as many, because it holds the
    factors in registers too. With the tiles that are fastest on a `Chip.hopper`, fp32 has no registers left.
    """
    if dtype == torch.float32 and chip.hopper:
        return 0
    return _FUSED_NEURONS // (2 if gated else 1) // (2 if dtype == torch.float32 else 1)


def fuses(chip: Chip, dtype: torch.dtype, tokens: int, experts: int, neurons: int, rows: int, *, gated: bool) -> bool:
    """Whether the forward that adds atomically is one kernel rather than two.

    In the fused kernel one tile is the work of one program, so few tiles would leave the chip idle. The two kernels
    also divide the work along neurons and columns, but they have to write and read the hidden values.
    """
    tiles = experts * triton.cdiv(triton.cdiv(tokens, _EXPECTED_SHARE), rows)
    return neurons <= most_fused(chip, dtype, gated=gated) and 2 * tiles >= chip.processors


def adds_atomically(chip: Chip, tokens: int, columns: int) -> bool:
    """Whether pairs add their outputs atomically, rather than write them to be added up later.

    Atomic additions are made in the L2 cache. If the output stays there, they are faster on an H100 than writing every
    pair's output and reading it again. If it does not, they are slower.
    """
    return 2 * 4 * tokens * columns <= chip.cache


def programs(chip: Chip, tiles: Tiles) -> int:
    """Return how many programs share a plan's tiles: sixteen warps for each multiprocessor.

    If registers or shared memory let fewer run at a time, the others take their share afterwards.
    """
    return chip.processors * (2 if tiles.warps >= 8 else 4)


def fused(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, gated: bool) -> Tiles:
    """Sizes for `forward_kernels.fused`: accumulators of rows × neurons (two if gated), then of rows × columns."""
    wide = _padded(neurons, most_fused(chip, dtype, gated=gated))
    columns = 32 if chip.backend == "hip" or gated else 64
    warps = _warps(chip, dtype, rows * max(wide, columns))
    return Tiles(rows, wide, _depth(chip, dtype), columns, warps, 4 if chip.hopper and not gated else _stages(chip))


def hidden(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, products: int, spread: bool = False) -> Tiles:
    """Sizes for `forward_kernels.hidden` and `backward_kernels.grad_hidden`: 1 to 3 `products` of rows × neurons.

    With more accumulators each is narrower. In fp32 they are half as wide, because the factors are in registers too. If
    `spread`, addresses take some more registers.
    """
    most = {1: 128, 2: 64, 3: 32}[products]
    wide = _padded(neurons, most // 2 if dtype == torch.float32 else most)
    if chip.hopper and dtype == torch.float32 and products == 1 and not spread:
        return Tiles(rows, wide, 32, 0, 4, 3)
    stages = 4 if chip.hopper and products == 1 else _stages(chip)
    return Tiles(rows, wide, _depth(chip, dtype), 0, _warps(chip, dtype, rows * wide), stages)


def combine(chip: Chip, dtype: torch.dtype, rows: int, neurons: int, *, products: int, ordered: bool) -> Tiles:
    """Sizes for `forward_kernels.combine`. Its sum goes over the neurons of an expert, often in one step.

    Atomic additions take more registers than stores, so their tiles are narrower on a `Chip.hopper`. Two products load
    twice as much, so fewer loads are in flight and tiles are narrower. Without tensor cores a whole step of the sum is
    in registers, so steps are short in fp32.
    """
    if chip.hopper and products == 1:
        columns = 64 if dtype == torch.float32 else 256 if ordered else 128
        return Tiles(rows, _padded(neurons, 32), 0, columns, 8, 3)
    wide = _padded(neurons, 16 if dtype == torch.float32 else 32 if chip.backend == "hip" else 64)
    columns = 64 if dtype == torch.float32 or products == 2 else 128
    if chip.hopper and dtype == torch.float32:
        columns = 32  # twice as many rows
    return Tiles(rows, wide, 0, columns, _warps(chip, dtype, rows * columns), _stages(chip) if products == 1 else 2)


def reduce(width: int) -> Tiles:
    """Sizes for `forward_kernels.reduce`. Rows are experts of a token, most of which have nothing to add.

    One warp per program lets many tokens be read at a time. With four warps it takes much longer on an H100.
    """
    return Tiles(8, 0, 0, min(256, triton.next_power_of_2(width)), 1, 2)


def mask(width: int) -> Tiles:
    """Sizes for `forward_kernels.mask`: a part of a token's hidden values. A thread reads 16 bytes in half types."""
    return Tiles(1, 0, 0, min(1024, triton.next_power_of_2(width)), 4, 1)


def scores(count: int) -> Tiles:
    """Sizes for `threshold_kernels.sorted_threshold`: all scores of a token. Few warps communicate less."""
    columns = triton.next_power_of_2(count)
    return Tiles(1, 0, 0, columns, min(8, max(1, columns // 256)), 1)


def grad_weight(chip: Chip, dtype: torch.dtype, neurons: int) -> Tiles:
    """Sizes for `backward_kernels.grad_weight`: an accumulator of neurons × columns, summed over an expert's pairs."""
    wide = _padded(neurons, 64)
    columns = 64 if dtype == torch.float32 else 128
    return Tiles(_depth(chip, dtype), wide, 0, columns, _warps(chip, dtype, wide * columns), _stages(chip))


def decode(chip: Chip, dtype: torch.dtype, tokens: int, neurons: int, *, gated: bool) -> Tiles:
    """Sizes for `decode_kernels`: few neurons per program, so that a few selected experts still occupy the chip.

    For one token this is 16 neurons, or 8 of two weights, each read in a long stretch to keep memory busy. Fewer
    neurons mean more additions to the output, because each program adds to every element.
    """
    if tokens == 1:
        few = min(8 if gated else 16, triton.next_power_of_2(neurons))
        return Tiles(1, few, 512, 1024 if gated else 2048, 4 if gated else 8, 1)
    deep = 64 if dtype == torch.float32 else 128
    return Tiles(16, 16, deep, deep, 4, 2 if chip.backend == "hip" else 3)


def depth_int8(width: int, most: int) -> int:
    """Return how many products of 8-bit integers are added up at a time; tensor cores take at least 32."""
    return max(32, _padded(width, most))


def hidden_int8(chip: Chip, rows: int, neurons: int, *, gated: bool) -> Tiles:
    """Sizes for `int8_kernels.hidden_int8`. Weights and addresses wait in registers, so tiles are narrower than in
    `hidden`, with twice the depth, whose elements are half as large."""
    wide = _padded(neurons, 32 if gated else 64)
    return Tiles(rows, wide, 2 * _depth(chip, torch.int8), 0, 8 if rows > 64 else 4, _stages(chip))


def combine_int8(chip: Chip, rows: int, neurons: int) -> Tiles:
    """Sizes for `int8_kernels.combine_int8`. Hidden values wait in registers, as fp32: with more loads in flight, steps
    of the sum are shorter."""
    return Tiles(rows, depth_int8(neurons, 32 if chip.roomy else 64), 0, 64, 8 if chip.roomy else 4, _stages(chip))


def decode_int8(width: int) -> Tiles:
    """Sizes for the kernels of `int8_kernels` for a few tokens, whose output has `width` elements.

    Few neurons or columns per program, so that a few selected experts still occupy the chip, and long steps to keep
    memory busy. Steps over hidden values, which wait in registers, are at most half as long: `depth_int8`.
    """
    return Tiles(16, 16, 256, _padded(width, 32), 4, 2)


def trunk(tokens: int) -> Tiles:
    """Sizes for `int8_kernels.trunk`. It has three accumulators, and parts of both factors in registers.

    For a few tokens there are few programs, which take long steps to keep memory busy.
    """
    return Tiles(16, 16, 128, 0, 4, 2) if tokens <= 16 else Tiles(32, 32, 32, 0, 4, 2)


def round_rows(width: int) -> Tiles:
    """Sizes for `int8_kernels.round_rows`: a part of a token's inputs. A thread reads 16 bytes in half types."""
    return Tiles(1, 0, 0, min(1024, triton.next_power_of_2(width)), 4, 1)


def _warps(chip: Chip, dtype: torch.dtype, elements: int) -> int:
    """Return 8 warps if 4 would have 32 or more elements per thread, since each also has a 64-bit address; else 4.

    In fp32 on NVIDIA the limit is 8 elements: without tensor cores, the factors are in registers too.
    """
    most = 8 if dtype == torch.float32 and chip.backend == "cuda" else 32
    return 8 if elements >= most * 128 else 4


def _depth(chip: Chip, dtype: torch.dtype) -> int:
    """How many elements along a sum are multiplied at a time. They wait in shared memory, and partly in registers."""
    return 64 if chip.roomy and dtype != torch.float32 else 32


def _stages(chip: Chip) -> int:
    return 3 if chip.roomy else 2
