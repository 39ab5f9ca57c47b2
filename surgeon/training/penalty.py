"""How sparse activations are, to be measured and to be penalised."""

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
    """(Σ|a|)² / (Σa² + 1e-15) over the last dimension, [..., h] → [...] float32: from 1 to h, 0 if all are zero.

    The square Hoyer measure of D2DMoE, section 3.1: 1 for one active neuron, h if all are equally active.
    """
    a = a.float()
    return a.abs().sum(-1).square() / (a.square().sum(-1) + _EPSILON)


def l1(a: Tensor) -> Tensor:
    """Σ|a| over the last dimension, [..., h] → [...] float32."""
    return a.float().abs().sum(-1)


PENALTIES: dict[Penalty, Callable[[Tensor], Tensor]] = {"hoyer": square_hoyer, "l1": l1}
PENALTY_NAMES: dict[Penalty, str] = {"hoyer": "square Hoyer", "l1": "L1"}


def penalised_values(z: Tensor, activation: str, displacement: float) -> Tensor:
    """The non-negative values that should be sparse, given what goes into an activation, [..., h] → [..., h].

    A ReLU's output as it is. For an activation that leaves no zeros (GELU, SiLU) the pre-activation, shifted to
    max(z, D) − D in float32: values below the displacement D, where the activation is near zero, cost nothing.
    """
    known = ACTIVATIONS[activation]
    return known.fn(z) if known.leaves_zeros else z.float().clamp_min(displacement) - displacement


def alpha_at(schedule: AlphaSchedule, alpha: float, done: float) -> float:
    """The penalty's weight when the share `done` of the training is over.

    constant: alpha. linear: from 0 to alpha over the whole training. linear_warmup: over its first half, then alpha.
    """
    if schedule == "linear":
        return alpha * done
    if schedule == "linear_warmup":
        return alpha * min(1.0, 2.0 * done)
    return alpha


@dataclass(frozen=True)
class Sparsity:
    """How sparse a layer's activations are: mean shares of the neurons, over tokens.

    zero: exactly zero. below_10th, below_100th, below_1000th: zero, or smaller than that part of the token's largest.
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
        # A token whose values are all zero has no neuron that is active.
        zero = size == 0
        parts = (float(((size < largest / part) | zero).float().mean()) for part in (10, 100, 1000))
        return cls(float(zero.float().mean()), *parts)

    @property
    def active(self) -> float:
        """Share of the neurons above a hundredth of the token's largest."""
        return 1.0 - self.below_100th


def active_share(a: Tensor) -> Tensor:
    """Share of neurons that are above a hundredth of the token's largest, [..., h] → [...]."""
    size = a.abs()
    return (size > 0.01 * size.amax(-1, keepdim=True)).float().mean(-1)


class AlphaControl:
    """Finds the weight of each layer's penalty so that its share of active neurons becomes what is wanted.

    The goal falls geometrically from where the layer starts to the target over the first part of the training. A layer
    above its goal gets more weight, one below it less: proportional and integral control in the logarithm.
    """

    _RAMP = 0.6  # part of the training in which the goal falls
    _PROPORTIONAL, _INTEGRAL = 2.0, 0.1
    _SMOOTHING = 0.9
    _LIMITS = (-18.0, 2.0)  # of the logarithm

    def __init__(self, targets: Sequence[float | None], start: float, *, per_step: int = 1) -> None:
        """Control one layer to each of `targets`, in (0, 1], from the weight `start` on; with None the weight is 0.

        per_step: how often it observes in one optimiser step; together they count as one observation.
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
        """Take in the layers' active shares [layers] at the share `done` of the training."""
        value = active.detach().cpu().float().clamp_min(1e-4).log()
        if self._first is None:
            self._first, self._smooth = value, value
        self._smooth = self._keep * self._smooth + (1 - self._keep) * value
        goal = self._first + (self._target - self._first) * min(1.0, done / self._RAMP)
        error = (self._smooth - goal).clamp(-1.0, 1.0)
        self._integral = (self._integral + self._gain * error).clamp(*self._LIMITS)
        self._proportional = self._PROPORTIONAL * error

    def state_dict(self) -> dict[str, Tensor | None]:
        """What a checkpoint keeps."""
        return {"first": self._first, "smooth": self._smooth, "integral": self._integral, "last": self._proportional}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._first, self._smooth = state["first"], state["smooth"]
        self._integral, self._proportional = state["integral"], state["last"]

    @property
    def alphas(self) -> Tensor:
        """The weights now, [layers]."""
        return (self._integral + self._proportional).exp() * self._aimed
