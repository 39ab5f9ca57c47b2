"""Split the neurons of a feed-forward layer into experts."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import Experts, hidden
from surgeon.moe.clustering import balanced_clusters
from surgeon.moe.filling import neurons_of_experts
from surgeon.sites.ffn import FFNWeights

Split = Literal["auto", "weights", "activations", "random"]


def split_neurons(
    weights: FFNWeights, experts: int, size: int, *, split: Split, shared: int, active: Tensor | None, seed: int
) -> Tensor:
    """Return the expert of every neuron, int64 [h]. The first `shared` experts get the most active neurons.

    Args:
        experts, size: the number of experts and of their neurons. Where the layer has fewer neurons, the experts at the
            end get fewer (see `surgeon.moe.filling`).
        split: how neurons are grouped (see `Moeify.split`).
        shared: the number of experts that always run.
        active: the sizes of the neurons' outputs, [h, N], as `output_sizes` returns them. Without data (None), weights
            are compared instead.
        seed: seed of the clustering or of the random split.
    """
    neurons = len(weights.w1)
    sizes = torch.tensor(neurons_of_experts(experts, size, experts * size - neurons))
    in_shared = int(sizes[:shared].sum())
    generator = torch.Generator().manual_seed(seed)
    always = torch.zeros(0, dtype=torch.int64)
    if shared:
        if active is None:  # a dry run
            always = torch.arange(in_shared)
        else:
            rate = (active > 0.1 * active.amax(0, keepdim=True)).float().mean(1)
            always = rate.topk(in_shared).indices.cpu()
    routed = torch.ones(neurons, dtype=torch.bool)
    routed[always] = False
    others = sizes[shared:]
    if split == "random":
        found = torch.arange(len(others)).repeat_interleave(others)
        found = found[torch.randperm(len(found), generator=generator)]
    else:
        if active is not None and split != "weights":
            features = F.normalize(active[routed], dim=1)
        else:
            # Compare the normalised rows of the linear whose output is sparse, without the bias.
            rows = weights.w1 if weights.gate is None else weights.gate
            features = F.normalize(rows.detach().float()[routed], dim=1)
        found = balanced_clusters(features, others.tolist(), seed=seed)
    labels = torch.empty(neurons, dtype=torch.int64)
    labels[always] = torch.arange(shared).repeat_interleave(sizes[:shared])
    labels[routed] = found + shared
    return labels


def output_sizes(weights: FFNWeights, activation: str, x: Tensor) -> Tensor:
    """Return the size of each neuron's output on each token, [h, N]: |activation| times the norm of its row of w2."""
    with torch.no_grad():
        experts = Experts(weights.w1, weights.b1, weights.gate, weights.b_gate, weights.w2)
        a = hidden(x, experts, ACTIVATIONS[activation]).float()
        sizes: Tensor = a.abs() * weights.w2.float().norm(dim=1)
        return sizes.t()
