"""Find out on data which inputs of a linear layer matter: what each usually is, and how far it usually goes from there.

An input is skipped if |x - centre| · scale is at most a threshold. The centre then takes its place, so that the best
centre is the mean of the values that are skipped. It depends on the threshold, and the threshold on it: they are found
in turn, for the threshold that skips half of all inputs.

A neuron of a gated layer is skipped if |its gate| · scale is at most a threshold. Its centre is the mean of what it
adds to the hidden values where the threshold that skips half of all neurons skips it.
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
    """What a layer knows about its inputs or neurons. scale, centre: one of each, or None. levels: of scores, [257]."""

    scale: Tensor | None
    centre: Tensor | None
    levels: Tensor


@torch.no_grad()
def calibrate(x: Tensor, weight: Tensor, *, weighted: bool, centred: bool) -> Calibration:
    """Calibrate a layer on its inputs.

    Args:
        x: inputs [N, d_in], floating. weight: [d_out, d_in].
        weighted: multiply scores by the norms of the weight's columns (WINA, arXiv 2505.19427). Without, scores are
            those of TEAL (arXiv 2408.14690).
        centred: measure how far inputs are from a centre in place of zero.
    """
    x = x.float()
    scale = weight.float().norm(dim=0) if weighted else None
    centre = _centre(x, scale) if centred else None
    return Calibration(scale, centre, levels_of(scores(x, scale, centre)))


@torch.no_grad()
def calibrate_neurons(gates: Tensor, up: Tensor, w2: Tensor, *, weighted: bool, centred: bool) -> Calibration:
    """Calibrate a gated layer on its neurons.

    An error e of the gate of neuron i changes the output by e · up_i · w2_i. If the errors of neurons do not depend on
    each other, the expected square of the output's error is the sum of the squares of e_i · rms(up_i) · |w2_i|.

    Args:
        gates, up: the activated gates and the other factors on the data, [N, h], floating. w2: [h, d_out].
        weighted: multiply scores by rms(up_i) · |w2_i|. CHESS (arXiv 2409.01366) takes the mean of |up_i| alone, CATS
            (arXiv 2404.08763) nothing.
        centred: let what is skipped add its mean.
    """
    up, count = up.float(), gates.shape[0]
    scale = up.square().mean(0).sqrt() * w2.float().norm(dim=1) if weighted else None
    levels, centre = neuron_levels(gates, scale, centred=centred), None
    if centred:
        skipped = scores(gates.float(), scale, None) <= levels[len(levels) // 2]
        centre = torch.where(skipped, gates.float() * up, 0.0).sum(0) / skipped.sum(0).clamp(1, count)
    return Calibration(scale, centre, levels)


def neuron_levels(gates: Tensor, scale: Tensor | None, *, centred: bool) -> Tensor:
    """Return the quantiles of the scores of neurons with the gates [N, h]. With centres the first is below zero."""
    levels = levels_of(scores(gates.float(), scale, None))
    if centred:
        # A gate that is zero adds nothing, and not its mean: at tau 0 nothing may be skipped.
        levels[0] = -1.0
    return levels


def scores(x: Tensor, scale: Tensor | None, centre: Tensor | None) -> Tensor:
    """Return how much each input of x [N, d_in] matters, float32."""
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
