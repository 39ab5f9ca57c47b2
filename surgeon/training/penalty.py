"""Measures and penalties of activation sparsity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgeon.kernels.activations import ACTIVATIONS

Penalty = Literal["hoyer", "l1"]
AlphaSchedule = Literal["constant", "linear", "linear_warmup"]
_EPSILON = 1e-15


def square_hoyer(a: Tensor) -> Tensor:
    """Compute (Σ|a|)² / (Σa² + 1e-15) over the last dimension: [..., h] → [...] float32.

    This is the square Hoyer measure of D2DMoE, section 3.1. It is 1 for one active neuron, h if all are equally active,
    and 0 if all are zero.
    """
    a = a.float()
    return a.abs().sum(-1).square() / (a.square().sum(-1) + _EPSILON)


def l1(a: Tensor) -> Tensor:
    """Compute Σ|a| over the last dimension: [..., h] → [...] float32."""
    return a.float().abs().sum(-1)


PENALTIES: dict[Penalty, Callable[[Tensor], Tensor]] = {"hoyer": square_hoyer, "l1": l1}
PENALTY_NAMES: dict[Penalty, str] = {"hoyer": "square Hoyer", "l1": "L1"}


def penalised_values(z: Tensor, activation: str, displacement: float) -> Tensor:
    """Return the non-negative values that should be sparse, for the pre-activations z: [..., h] → [..., h].

    For a ReLU this is its output. For an activation without exact zeros (GELU, SiLU) it is the pre-activation shifted
    to max(z, D) − D, in float32. Values below the displacement D, where the activation is near zero, cost nothing.
    """
    known = ACTIVATIONS[activation]
    return known.fn(z) if known.leaves_zeros else z.float().clamp_min(displacement) - displacement


def alpha_at(schedule: AlphaSchedule, alpha: float, done: float) -> float:
    """Return the penalty's weight after the share `done` of the training.

    constant: always alpha. linear: rises from 0 to alpha over the whole training. linear_warmup: rises from 0 to alpha
    over the first half, then stays at alpha.
    """
    if schedule == "linear":
        return alpha * done
    if schedule == "linear_warmup":
        return alpha * min(1.0, 2.0 * done)
    return alpha


@dataclass(frozen=True)
class Sparsity:
    """How sparse a layer's activations are: shares of the neurons, as means over tokens.

    zero: the share that is exactly zero. below_10th, below_100th, below_1000th: the share that is zero or smaller than
    this part of the token's largest activation.
    """

    zero: float
    below_10th: float
    below_100th: float
    below_1000th: float

    @classmethod
    def of(cls, a: Tensor) -> Sparsity:
        """Measure activations [N, h]."""
        size = a.detach().float().abs()
        largest = size.amax(-1, keepdim=True)
        # If all values of a token are zero, none of its neurons is active.
        zero = size == 0
        parts = (float(((size < largest / part) | zero).float().mean()) for part in (10, 100, 1000))
        return cls(float(zero.float().mean()), *parts)

    @property
    def active(self) -> float:
        """Share of the neurons above a hundredth of the token's largest activation."""
        return 1.0 - self.below_100th


class AlphaControl:
    """Controls the weight of each layer's penalty so that its share of active neurons reaches a target.

    Over the first part of the training, the goal falls geometrically from the layer's initial share to the target. A
    layer above its goal gets more weight, and a layer below it gets less. This is proportional and integral control of
    the logarithm.
    """

    _RAMP = 0.6  # share of the training in which the goal falls
    _PROPORTIONAL, _INTEGRAL = 2.0, 0.1
    _SMOOTHING = 0.9
    _LIMITS = (-18.0, 2.0)  # limits of the logarithm of the weight

    def __init__(self, targets: Sequence[float | None], start: float, *, per_step: int = 1) -> None:
        """Start the control of one layer per target.

        targets: the wanted share of active neurons of each layer, in (0, 1]. With None the layer's weight is always 0.
        start: the initial weight.
        per_step: the number of observations per optimiser step. Together they count as one observation.
        """
        layers = len(targets)
        self._keep, self._gain = self._SMOOTHING ** (1 / per_step), self._INTEGRAL / per_step
        self._aimed = torch.tensor([target is not None for target in targets])
        self._target = torch.tensor([1.0 if target is None else target for target in targets]).log()
        self._first: Tensor | None = None
        self._smooth = torch.zeros(layers)
        self._integral = torch.full((layers,), start).log()
        self._proportional = torch.zeros(layers)

    def observe(self, active: Tensor, done: float) -> None:
        """Record the layers' shares of active neurons, [layers], after the share `done` of the training."""
        value = active.detach().cpu().float().clamp_min(1e-4).log()
        if self._first is None:
            self._first, self._smooth = value, value
        self._smooth = self._keep * self._smooth + (1 - self._keep) * value
        goal = self._first + (self._target - self._first) * min(1.0, done / self._RAMP)
        error = (self._smooth - goal).clamp(-1.0, 1.0)
        self._integral = (self._integral + self._gain * error).clamp(*self._LIMITS)
        self._proportional = self._PROPORTIONAL * error

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the state for a checkpoint."""
        return {"first": self._first, "smooth": self._smooth, "integral": self._integral, "last": self._proportional}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state of a checkpoint."""
        self._first, self._smooth = state["first"], state["smooth"]
        self._integral, self._proportional = state["integral"], state["last"]

    @property
    def alphas(self) -> Tensor:
        """The present weights, [layers]."""
        return (self._integral + self._proportional).exp() * self._aimed
