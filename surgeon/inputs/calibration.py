"""Find out on data which values of a layer matter: what each usually is, and how far it usually goes from there.

The values are the inputs of a linear layer, or the gates of a gated one. One is skipped if |value - centre| · scale is
at most a threshold. The centre then takes its place, so that the best centre is the mean of the values that are
skipped. It depends on the threshold, and the threshold on it: they are found in turn, for the threshold that skips half
of all values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from surgeon.inputs.module import LEVELS

# How often threshold and centres are found in turn. On real activations, they barely change after that.
_TURNS = 6
# Scores that quantiles are computed from: more make no difference, and sorting takes most of the time.
_SCORES = 2**20
# The most numbers to hold of the inputs of several layers at a time: 1 GiB.
_HELD = 2**28


class Wide(Protocol):
    """A layer with so many inputs."""

    @property
    def d_in(self) -> int:
        """Number of inputs."""


Layer = TypeVar("Layer", bound=Wide)


def in_groups(layers: Sequence[Layer], tokens: int) -> list[list[Layer]]:
    """Split layers into groups whose inputs for so many tokens can be held at the same time."""
    groups: list[list[Layer]] = []
    held = _HELD
    for layer in layers:
        size = tokens * layer.d_in
        if held + size > _HELD:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += size
    return groups


@dataclass(frozen=True)
class Calibration:
    """What a layer knows about its n values. scale, centre: [n] or None. levels: quantiles of the scores, [257]."""

    scale: Tensor | None
    centre: Tensor | None
    levels: Tensor


@torch.no_grad()
def calibrate(values: Tensor, scale: Tensor | None, *, centred: bool) -> Calibration:
    """Calibrate a layer on its values.

    Args:
        values: [N, n], floating. scale: [n], what a value's distance is multiplied by; None stands for ones.
        centred: measure how far values are from a centre in place of zero.
    """
    values = values.float()
    centre = _centre(values, scale) if centred else None
    return Calibration(scale, centre, levels_of(scores(values, scale, centre)))


def input_scale(weight: Tensor) -> Tensor:
    """Return how much an error of each input weighs: the norm of its column of weight [d_out, d_in], float32 [d_in]."""
    found: Tensor = weight.float().norm(dim=0)
    return found


def neuron_scale(up: Tensor, w2: Tensor) -> Tensor:
    """Return how much an error of each gate weighs, float32 [h].

    An error e of the gate of neuron i changes the output by e · up_i · w2_i. With errors that do not depend on each
    other, the expected square of the output's error is the sum of the squares of e_i times this.

    Args:
        up: outputs of up on the data, [N, h]. w2: [h, d_out].
    """
    found: Tensor = up.float().square().mean(0).sqrt() * w2.float().norm(dim=1)
    return found


def scores(x: Tensor, scale: Tensor | None, centre: Tensor | None) -> Tensor:
    """Return how much each of the values x [N, n] matters, float32."""
    distance = (x if centre is None else x - centre).abs()
    return distance if scale is None else distance * scale


def _centre(x: Tensor, scale: Tensor | None) -> Tensor:
    centre = x.median(0).values
    for _ in range(_TURNS):
        found = scores(x, scale, centre)
        skipped = found <= _some(found).median()
        count = skipped.sum(0)
        centre = torch.where(count > 0, torch.where(skipped, x, 0.0).sum(0) / count.clamp_min(1), centre)
    return centre


def levels_of(found: Tensor) -> Tensor:
    """Return the quantiles of scores [N, d_in] at 0, 1/256, ... 1. The first level is 0."""
    ordered = _some(found).sort().values
    places = torch.linspace(0, len(ordered) - 1, LEVELS, device=ordered.device).round().long()
    levels = ordered[places]
    levels[0] = 0.0
    return levels


def _some(found: Tensor) -> Tensor:
    """Return evenly spaced ones of the scores, flat."""
    # An odd step, so that not always the same inputs are looked at.
    step = max(1, found.numel() // _SCORES)
    return found.flatten()[:: step + (step % 2 == 0)]
