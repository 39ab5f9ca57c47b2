"""Split the neurons of a feed-forward layer into experts."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import Experts, hidden
from surgeon.moe.clustering import balanced_clusters
from surgeon.sites.ffn import FFNWeights

Split = Literal["auto", "weights", "activations", "random"]


def split_neurons(
    weights: FFNWeights, activation: str, experts: int, *, split: Split, shared: int, x: Tensor | None, seed: int
) -> Tensor:
    """Return the expert of every neuron, int64 [h]. The first `shared` experts get the most active neurons.

    Args:
        experts: the number of experts, a divisor of h.
        split: how neurons are grouped (see `Moeify.split`).
        shared: the number of experts that always run.
        x: inputs of the layer, [N, d_in]. Without data (None), weights are compared instead of activations.
        seed: seed of the clustering or of the random split.
    """
    neurons = len(weights.w1)
    size = neurons // experts
    generator = torch.Generator().manual_seed(seed)
    active = None if x is None else _output_sizes(weights, activation, x)
    always = torch.zeros(0, dtype=torch.int64)
    if shared:
        if active is None:  # a dry run
            always = torch.arange(shared * size)
        else:
            rate = (active > 0.1 * active.amax(0, keepdim=True)).float().mean(1)
            always = rate.topk(shared * size).indices.cpu()
    routed = torch.ones(neurons, dtype=torch.bool)
    routed[always] = False
    count = experts - shared
    if split == "random":
        found = torch.arange(count).repeat_interleave(size)[torch.randperm(count * size, generator=generator)]
    else:
        if active is not None and split != "weights":
            features = F.normalize(active[routed], dim=1)
        else:
            # Compare the normalised rows of the linear whose output is sparse, without the bias.
            rows = weights.w1 if weights.gate is None else weights.gate
            features = F.normalize(rows.detach().float()[routed], dim=1)
        found = balanced_clusters(features, count, seed=seed)
    labels = torch.empty(neurons, dtype=torch.int64)
    labels[always] = torch.arange(shared).repeat_interleave(size)
    labels[routed] = found + shared
    return labels


def _output_sizes(weights: FFNWeights, activation: str, x: Tensor) -> Tensor:
    """Return the size of each neuron's output on each token, [h, N]: |activation| times the norm of its row of w2."""
    with torch.no_grad():
        experts = Experts(weights.w1, weights.b1, weights.gate, weights.b_gate, weights.w2)
        a = hidden(x, experts, ACTIVATIONS[activation]).float()
        sizes: Tensor = a.abs() * weights.w2.float().norm(dim=1)
        return sizes.t()
