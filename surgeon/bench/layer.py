"""A feed-forward layer with random weights, its input tokens, the experts they select, and the exact result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from surgeon.kernels.activations import activation
from surgeon.kernels.dynamic_k import selected
from surgeon.kernels.experts import Experts, hidden, keep_selected
from surgeon.kernels.gpu_model.cost import LayerShape

MaskKind = Literal["uniform", "skewed", "clustered"]
MASKS: tuple[MaskKind, ...] = get_args(MaskKind)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RUN = 16  # neighbouring tokens that select similar experts
_OWN = 0.2  # part of the score that is a token's own
_CHECKED = 256  # tokens; in float64 they take as long as several methods on all tokens


@dataclass(frozen=True)
class Case:
    """A layer, and how its tokens select experts.

    dtype: a name of `DTYPES`. mask: "uniform", every expert equally likely; "skewed", the n-th most popular expert in
    proportion to 1/n (Zipf); "clustered", 16 neighbouring tokens select similar experts. share: selected share of the
    token-expert pairs.
    """

    shape: LayerShape
    dtype: str
    tokens: int
    mask: MaskKind
    share: float
    activation: str = "relu"


@dataclass(frozen=True)
class Problem:
    """The input of every method.

    x [N, d]; scores [N, E] and threshold [N], float32; the experts' weights; b2 [d].
    pairs: selected token-expert pairs. used: experts that some token selects.
    """

    case: Case
    x: Tensor
    scores: Tensor
    threshold: Tensor
    experts: Experts
    b2: Tensor
    pairs: int
    used: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds that the selected pairs need: none with values that the activation made zero."""
        return self.pairs * self._first_weights + self._active[0] * self.case.shape.width

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that have to be read: of the experts that some token selects, without the rows of w2 of
        neurons that are zero for all of these tokens.
        """
        weights = self.used * self._first_weights + self._active[1] * self.case.shape.width
        return weights * self.x.element_size()

    @property
    def executed(self) -> float:
        """Share of the token-expert pairs that are selected."""
        return self.pairs / self.scores.numel()

    @property
    def _first_weights(self) -> int:
        """Weights of an expert in w1 and gate."""
        shape = self.case.shape
        return shape.size * shape.width * (2 if shape.gated else 1)

    @cached_property
    def _active(self) -> tuple[int, int]:
        """How many values of neurons in selected experts are not zero, and how many neurons have such a value."""
        function = activation(self.case.activation)
        if not function.leaves_zeros:
            return self.pairs * self.case.shape.size, self.used * self.case.shape.size
        values, neurons = 0, torch.zeros(self.case.shape.hidden, dtype=torch.bool, device=self.x.device)
        mask = selected(self.scores, self.threshold)
        for x, chosen in zip(torch.split(self.x, _CHECKED), torch.split(mask, _CHECKED), strict=True):
            active = keep_selected(hidden(x, self.experts.flat(), function), chosen) != 0
            values += int(active.sum())
            neurons |= active.any(0)
        return values, int(neurons.sum())

    def error(self, result: Tensor, *, every: bool, mask: Tensor | None = None) -> float:
        """Largest difference from the float64 result, relative to its largest value.

        every: compare with the result of all experts, not of the selected ones. mask: the experts [N, E] that run, if
        they are others than those of the scores.
        """
        wanted = self.full if every else self.chosen if mask is None else self._of(mask[self.checked])
        found = result[self.checked].double()
        return float((found - wanted).abs().max() / wanted.abs().max())

    @property
    def full(self) -> Tensor:
        """Result of the dense layer for the tokens that are checked, in float64."""
        return self._exact[0]

    @property
    def chosen(self) -> Tensor:
        """Result of the selected experts for the tokens that are checked, in float64."""
        return self._exact[1]

    @cached_property
    def checked(self) -> Tensor:
        """The tokens whose results are compared."""
        tokens = len(self.x)
        return torch.linspace(0, tokens - 1, min(tokens, _CHECKED)).long().to(self.x.device)

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor]:
        mask = selected(self.scores, self.threshold)[self.checked]
        return self._of(torch.ones_like(mask)), self._of(mask)

    def _of(self, mask: Tensor) -> Tensor:
        """The result of the experts of `mask` [n, E] for the tokens that are checked, in float64."""
        flat = self.experts.flat().to(torch.float64)
        h = hidden(self.x[self.checked].double(), flat, activation(self.case.activation))
        return torch.addmm(self.b2.double(), keep_selected(h, mask), flat.w2)


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw weights, tokens and scores for a case.

    They are drawn on the CPU, so that a seed gives the same values on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = case.shape, DTYPES[case.dtype]
    per_neuron = (shape.experts, shape.size)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * scale).to(device, dtype)

    def matrix(scale: float) -> Tensor:
        return draw(*per_neuron, shape.width, scale=scale)

    x = draw(case.tokens, shape.width)
    experts = Experts(
        matrix(shape.width**-0.5),
        draw(*per_neuron, scale=0.1),
        matrix(shape.width**-0.5) if shape.gated else None,
        draw(*per_neuron, scale=0.1) if shape.gated else None,
        matrix(shape.hidden**-0.5),
    )
    b2 = draw(shape.width, scale=0.1)
    scores, threshold = _select(case, generator)
    mask = selected(scores, threshold)
    return Problem(
        case, x, scores.to(device), threshold.to(device), experts, b2, int(mask.sum()), int(mask.any(0).sum())
    )


def _select(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores [N, E] and thresholds [N] that select `share` of the pairs, and at least one pair."""
    tokens, experts = case.tokens, case.shape.experts
    scores = torch.rand(tokens, experts, generator=generator)
    if case.mask == "skewed":
        popularity = 1.0 / (1.0 + torch.randperm(experts, generator=generator))
        # The largest of these are drawn in proportion to popularity (the Gumbel trick).
        scores = popularity.log() - (-scores.clamp_min(1e-12).log()).log()
    elif case.mask == "clustered":
        shared = torch.rand(-(-tokens // _RUN), experts, generator=generator).repeat_interleave(_RUN, 0)[:tokens]
        scores = _OWN * scores + (1.0 - _OWN) * shared
    if case.share >= 1.0:
        return scores, torch.full((tokens,), float("-inf"))
    wanted = max(1, round(case.share * scores.numel()))
    least = scores.flatten().kthvalue(scores.numel() - wanted + 1).values
    return scores, least.repeat(tokens)
