"""The losses of token halting: how many blocks tokens run, and how their halting scores are spread over the blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.collective import mean
from surgeon.data.batch import Batch
from surgeon.data.padding import token_mask
from surgeon.kernels.token_halting import halted, halting_total

_LEAST = 1e-6  # share of a block in the distribution, so that its logarithm is finite


class HaltingLoss:
    """ponder · (blocks + remainder) + prior · KL(Gaussian ‖ scores), as means over real tokens (A-ViT, section 3.2).

    The remainder is what is left of 1 before the last block that computes a token: it has a gradient, and the number of
    blocks has none. The scores' distribution is the mean score behind every place and behind the last block, divided by
    the sum. The Gaussian has deviation 1 and is normalised over these places. The divergence is taken from the Gaussian
    to the scores, and over the sum of the places, as in the code of the method's authors.
    """

    def __init__(
        self, gate: Tensor, places: Sequence[int], blocks: int, ponder: float, prior: float, depth: float | None
    ) -> None:
        """Prepare the Gaussian.

        Args:
            gate: γ and β, [2]. places: the blocks behind which tokens halt, from 1. blocks: their number.
            ponder, prior: the weights. depth: the block at the centre of the Gaussian; None for two thirds of them.
        """
        self._gate, self._ponder, self._prior = gate, ponder, prior
        self._lengths = [end - start for start, end in zip([0, *places], [*places, blocks], strict=True)]
        centre = 2 * blocks / 3 if depth is None else depth
        self._wanted = (-0.5 * (torch.tensor([*places, blocks], dtype=torch.float32) - centre).square()).softmax(0)

    def __call__(
        self, batch: Batch, totals: Sequence[Tensor], last: Tensor, tau: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch and what to show.

        Args:
            totals: the sums of the scores behind every place, [B, T]. tau: of the last place.
            last: the tokens behind the last block, [B, T, d].
        """
        real = token_mask(batch, last.shape[:2])
        if real is None:
            real = torch.ones(last.shape[:2], dtype=torch.bool, device=last.device)
        blocks, left = torch.full_like(totals[0], self._lengths[0]), torch.ones_like(totals[0])
        for total, length in zip(totals, self._lengths[1:], strict=True):
            gone = halted(total)
            blocks = blocks + length * ~gone
            left = torch.where(gone, left, 1.0 - total)
        steps = [torch.zeros_like(left), *totals, halting_total(last, totals[-1], self._gate, tau)]
        scores = torch.stack([mean((after - before)[real]) for before, after in itertools.pairwise(steps)])
        spread = (scores / scores.sum().clamp_min(_LEAST)).clamp_min(_LEAST)
        wanted = self._wanted.to(spread.device)
        divergence = (wanted * (wanted.log() - spread.log())).sum()
        ran = mean(blocks[real])
        value = self._ponder * (ran + mean(left[real])) + self._prior * divergence
        return value, {"blocks": ran.item(), "divergence from the prior": divergence.item()}
