"""Plan on the device which (token, expert) pairs run, sorted by expert and split into tiles of rows.

Pairs get *slots*, numbered by expert and, within one, by token. A tile is up to `rows` consecutive slots of one expert.
Only the device knows how many pairs there are. The host launches a fixed number of programs, which share the tiles that
they find, and never waits. Nothing here is atomic, so a plan is the same every time.

There are four launches: count the pairs of each expert in each block of tokens; sum over the preceding blocks; sum over
the preceding experts; fill in the lists. Buffers have the size that selecting everything would need, 4 bytes per score.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.kernels.triton import launch

LAUNCHES = 4
"""How many kernels `plan` launches."""

# What one step takes: elements of a tile of scores (16 a thread); blocks or experts summed over (8 a thread).
_SCORES, _BLOCKS, _SCAN = 2048, 32, 1024


class Plan(NamedTuple):
    """The plan that the kernels for the products follow.

    Attributes:
        start: [E + 1] int64, the first slot of each expert; the last entry is the number of pairs.
        first_tile: [E + 1] int64, the same for tiles.
        expert_of_tile: int32, one expert for each tile.
        token_of_slot: int32, one token for each slot.
        slot_of_pair: [N, E] int32, -1 for a pair that does not run; None unless asked for.
        rows: the most rows of a tile.
    """

    start: Tensor
    first_tile: Tensor
    expert_of_tile: Tensor
    token_of_slot: Tensor
    slot_of_pair: Tensor | None
    rows: int

    def tiles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The plan as arguments for kernels that go through tiles."""
        return self.start, self.first_tile, self.expert_of_tile, self.token_of_slot


def plan(scores: Tensor, threshold: Tensor, rows: int, *, slot_of_pair: bool = False) -> Plan:
    """Plan the pairs of `scores` [N, E] that are not below `threshold` [N], in tiles of `rows`; no synchronisation.

    `slot_of_pair` numbers slots in 32 bits, so it needs N · E below 2³¹.
    """
    (tokens, experts), device = scores.shape, scores.device
    wide = min(64, max(16, triton.next_power_of_2(experts)))
    tall = _SCORES // wide
    blocks, columns = triton.cdiv(tokens, tall), triton.cdiv(experts, wide)
    compare = comparison_type(scores, threshold)

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    counts, total = ints(blocks, experts), ints(experts)
    made = Plan(
        start=ints(experts + 1, dtype=torch.int64),
        first_tile=ints(experts + 1, dtype=torch.int64),
        expert_of_tile=ints(experts * triton.cdiv(tokens, rows)),
        token_of_slot=ints(tokens * experts),
        slot_of_pair=ints(tokens, experts) if slot_of_pair else None,
        rows=rows,
    )
    tile = {"TOKENS": tall, "EXPERTS": wide, "COMPARE": compare}
    start = {"warps": 4, "stages": 1}
    launch.launch(_count, (blocks, columns), scores, threshold, counts, tokens, experts, **tile, **start)
    summed = {"BLOCKS": _BLOCKS, "EXPERTS": wide, "warps": 8, "stages": 1}
    launch.launch(_add_blocks, (columns,), counts, total, blocks, experts, **summed)
    scan = wide if experts <= wide else _SCAN
    launch.launch(_add_experts, (1,), total, made.start, made.first_tile, experts, ROWS=rows, EXPERTS=scan, **start)
    launch.launch(
        _fill,
        (blocks, columns),
        *(scores, threshold, counts, *made.tiles(), made.slot_of_pair, tokens, experts),
        ROWS=rows,
        **tile,
        **start,
    )
    return made


def comparison_type(scores: Tensor, threshold: Tensor) -> tl.dtype:
    """Return the type in which the comparison of the two is exact, as PyTorch's is."""
    return tl.float64 if torch.float64 in (scores.dtype, threshold.dtype) else tl.float32


@triton.jit
def runs(score, least, COMPARE: tl.constexpr):
    """The selection rule of `experts.selected`: ties run and NaN runs."""
    return ~(score.to(COMPARE) < least.to(COMPARE))


@triton.jit
def _selected(scores, threshold, token, expert, N, E, COMPARE: tl.constexpr):
    inside = (token < N)[:, None] & (expert < E)[None, :]
    score = tl.load(scores + token.to(tl.int64)[:, None] * E + expert[None, :], mask=inside, other=0.0)
    least = tl.load(threshold + token, mask=token < N, other=0.0)
    return (runs(score, least[:, None], COMPARE) & inside).to(tl.int32)


@triton.jit
def _count(
    scores, threshold, counts, N, E, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COMPARE: tl.constexpr
):  # fmt: skip
    """counts[b, e] = pairs of expert e in block b of tokens."""
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    on = _selected(scores, threshold, token, expert, N, E, COMPARE)
    tl.store(counts + block.to(tl.int64) * E + expert, tl.sum(on, 0), mask=expert < E)


@triton.jit
def _add_blocks(counts, total, blocks, E, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Replace counts[b, e] by its sum over the blocks before b; total[e] is the sum over all."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    running = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = counts + block.to(tl.int64)[:, None] * E + expert[None, :]
        inside = (block < blocks)[:, None] & (expert < E)[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, running[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        running += tl.sum(count, 0)
    tl.store(total + expert, running, mask=expert < E)


@triton.jit
def _add_experts(total, start, first_tile, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Write where each expert's slots and tiles begin, and at the end how many there are. This is one program."""
    slots = tl.full((), 0, tl.int64)
    tiles = tl.full((), 0, tl.int64)
    for first in range(0, E, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        count = tl.load(total + expert, mask=expert < E, other=0).to(tl.int64)
        cut = (count + ROWS - 1) // ROWS
        tl.store(start + expert, slots + tl.cumsum(count, 0) - count, mask=expert < E)
        tl.store(first_tile + expert, tiles + tl.cumsum(cut, 0) - cut, mask=expert < E)
        slots += tl.sum(count, 0)
        tiles += tl.sum(cut, 0)
    tl.store(start + E, slots)
    tl.store(first_tile + E, tiles)


@triton.jit
def _fill(
    scores, threshold, counts, start, first_tile, expert_of_tile, token_of_slot, slot_of_pair, N, E,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    """Fill in the lists of a `Plan`."""
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    on = _selected(scores, threshold, token, expert, N, E, COMPARE)
    known = expert < E
    before = tl.load(counts + block.to(tl.int64) * E + expert, mask=known, other=0)
    position = before[None, :] + tl.cumsum(on, 0) - 1
    slot = tl.load(start + expert, mask=known, other=0)[None, :] + position
    pair = on > 0
    tl.store(token_of_slot + slot, tl.broadcast_to(token[:, None], (TOKENS, EXPERTS)), mask=pair)
    # The pair in the first row of a tile writes the tile's expert.
    tile = tl.load(first_tile + expert, mask=known, other=0)[None, :] + position // ROWS
    opens = pair & (position % ROWS == 0)
    tl.store(expert_of_tile + tile, tl.broadcast_to(expert[None, :], (TOKENS, EXPERTS)), mask=opens)
    if slot_of_pair is not None:
        inside = (token < N)[:, None] & known[None, :]
        at = slot_of_pair + token.to(tl.int64)[:, None] * E + expert[None, :]
        tl.store(at, tl.where(pair, slot, -1).to(tl.int32), mask=inside)
