"""Fit routers in closed form: ridge regression to the experts' norms, with some of the layer's neurons as features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.experts import Experts
from surgeon.moe.router import Labels, Objective, Router, target

# Forward selection chooses among this many neurons. Its cost grows with their square.
_CANDIDATES = 2048
# Strength of the ridge regression, relative to the mean square of the features.
_RIDGE = 1e-3


def fit_closed_form(
    routers: Sequence[Router],
    x: Tensor,
    layers: Sequence[tuple[Experts, str]],
    objective: Objective,
    labels: Labels = "output",
) -> None:
    """Set the weights of routers that share a trunk, without training.

    The trunk becomes the neurons of the layers that together explain the targets best, followed by a ReLU. Forward
    selection by a pivoted Cholesky factorisation chooses them one after the other. fc2 is the solution of a ridge
    regression on these features.

    Args:
        routers: routers with biases, a ReLU and a shared fc1.
        x: inputs of the layers, [N, d_in], a few thousand tokens.
        layers: (weights, activation) of each layer, in the order of the routers.
        objective, labels: what the routers should predict (see `surgeon.moe.router.target`).
    """
    trunk = routers[0].fc1
    assert trunk is not None
    assert trunk.bias is not None
    candidates = [_first_linear(experts) for experts, _ in layers]
    rows = torch.cat([weight for weight, _ in candidates])
    bias = torch.cat([offset for _, offset in candidates])
    features = F.relu(F.linear(x, rows, bias)).double()
    wanted = [target(objective, x, experts, activation, labels) for experts, activation in layers]
    # Scale the targets, so that every layer has the same weight. Their means do not matter to centred features.
    scaled = torch.cat([w / w.std().clamp_min(1e-12) for w in wanted], dim=1).double()
    chosen = _forward_selection(features - features.mean(0), scaled, trunk.out_features)
    with torch.no_grad():
        trunk.weight.copy_(rows[chosen])
        trunk.bias.copy_(bias[chosen])
        inputs = F.pad(features[:, chosen], (0, 1), value=1.0)
        gram = inputs.t() @ inputs
        gram.diagonal()[:-1].add_(_RIDGE * gram.diagonal()[:-1].mean().clamp_min(1e-12))
        for router, norms in zip(routers, wanted, strict=True):
            solution = torch.linalg.lstsq(gram, inputs.t() @ norms.double()).solution
            router.fc2.weight.copy_(solution[:-1].t())
            router.fc2.bias.copy_(solution[-1])


def _first_linear(experts: Experts) -> tuple[Tensor, Tensor]:
    """Return the rows [h, d_in] and biases [h] of the linear whose output is activated."""
    weight, bias = (experts.w1, experts.b1) if experts.gate is None else (experts.gate, experts.b_gate)
    rows = weight.detach().flatten(0, 1)
    return rows, rows.new_zeros(len(rows)) if bias is None else bias.detach().flatten()


def _forward_selection(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Choose `count` columns of centred `features` [N, m] that explain `labels` [N, k] best; returns indices."""
    candidates = torch.arange(features.shape[1], device=features.device)
    if len(candidates) > _CANDIDATES:
        gain = (features.t() @ labels).square().sum(1) / features.square().sum(0).clamp_min(1e-12)
        candidates = gain.topk(_CANDIDATES).indices
        features = features[:, candidates]
    gram, cross = features.t() @ features, features.t() @ labels
    scale = gram.diagonal().clone().clamp_min(1e-12)
    chosen: list[int] = []
    free = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for _ in range(min(count, len(gram))):
        remaining = gram.diagonal()
        # A column that the chosen columns nearly span has only rounding errors left. Do not choose it.
        usable = free & (remaining > 1e-6 * scale)
        gain = torch.where(usable, cross.square().sum(1) / remaining.clamp_min(1e-12), -1.0)
        best = int(gain.argmax())
        if not bool(usable[best]):
            break
        free[best] = False
        chosen.append(best)
        column = gram[best] / remaining[best]
        cross = cross - torch.outer(column, cross[best])
        gram = gram - torch.outer(column, gram[best])
    # If fewer neurons are usable than asked for, repeat them to fill the trunk. The ridge regression then divides the
    # weight among the copies. If no neuron is ever active, any choice will do.
    chosen = chosen or [0]
    return candidates[(chosen * (count // len(chosen) + 1))[:count]]
