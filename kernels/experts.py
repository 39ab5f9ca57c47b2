"""The weights of a layer's experts, and the operations on them that all backends and the toolkit share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.activations import Activation


class Experts(NamedTuple):
    """The weights of E experts of s neurons each, one contiguous row per neuron.

    w1 [E, s, d_in], b1 [E, s], gate [E, s, d_in], b_gate [E, s], w2 [E, s, d_out]; b1, gate and b_gate may be None.
    """

    w1: Tensor
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor

    def flat(self) -> Experts:
        """Return all experts as one of E·s neurons: views if the weights are contiguous."""
        return Experts(*(None if t is None else t.flatten(0, 1) for t in self))  # type: ignore[arg-type]

    def after(self, first: int) -> Experts:
        """Return the experts from `first` on, as views."""
        return Experts(*(None if t is None else t[first:] for t in self))  # type: ignore[arg-type]

    def take(self, chosen: Tensor) -> Experts:
        """Return copies of the experts `chosen` [n]."""
        return Experts(*(None if t is None else t.index_select(0, chosen) for t in self))  # type: ignore[arg-type]

    def one(self, which: int | slice) -> Experts:
        """Return views of one expert, or of a run of neurons in a `flat` layer. Written out, as calls are frequent."""
        w1, b1, gate, b_gate, w2 = self
        return Experts(
            w1[which],
            None if b1 is None else b1[which],
            None if gate is None else gate[which],
            None if b_gate is None else b_gate[which],
            w2[which],
        )

    def to(self, dtype: torch.dtype) -> Experts:
        """Return the weights in `dtype`; unchanged if they already have it."""
        if self.w1.dtype == dtype:
            return self
        return Experts(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


class Gradients(NamedTuple):
    """The gradients of the inputs of the same name. None if not asked for, or if the input is absent."""

    x: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor | None


def selected(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return the mask [..., E] of the experts that run: the one definition of the selection rule.

    An expert runs for a token unless its score is below the token's threshold. Ties run; a NaN in either runs, so a
    token that is NaN stays NaN, as it does in the dense FFN.

    Args:
        scores: [..., E], any floating dtype.
        threshold: [...], one per token.
    """
    return ~(scores < threshold.unsqueeze(-1))


def hidden(x: Tensor, experts: Experts, act: Activation) -> Tensor:
    """Return the hidden activations [..., m] of `x` [..., d_in] for one expert of m neurons (or a flat view of all)."""
    up = F.linear(x, experts.w1, experts.b1)
    if experts.gate is None:
        return act.fn(up)
    return act.fn(F.linear(x, experts.gate, experts.b_gate)) * (up if act.up is None else act.up.fn(up))


def keep_selected(h: Tensor, mask: Tensor) -> Tensor:
    """Set to zero what `mask` [..., E] does not select in `h` [..., E·s]. Filling removes NaN as well."""
    experts = mask.shape[-1]
    return h.view(*mask.shape, h.shape[-1] // experts).masked_fill(~mask.unsqueeze(-1), 0).view(h.shape)
