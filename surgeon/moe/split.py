"""Split the neurons of a feed-forward layer into experts."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import Experts, hidden
from surgeon.kernels.scores import neuron_size
from surgeon.moe.clustering import balanced_clusters, clusters_around
from surgeon.moe.filling import neurons_of_experts
from surgeon.sites.ffn import FFNWeights

Split = Literal["auto", "weights", "activations", "markers", "random"]


def split_neurons(
    weights: FFNWeights, experts: int, size: int, *, split: Split, shared: int, active: Tensor | None, seed: int
) -> Tensor:
    """Return the expert of every neuron, int64 [h]. The first `shared` experts get the most active neurons.

    Args:
        experts, size: the number of experts and of their neurons. Where the layer has fewer neurons, the experts at the
            end get fewer (see `surgeon.moe.filling`).
        split: how neurons are grouped (see `Moeify.split`).
        shared: the number of experts that always run.
        active: what the neurons do on data, [h, N]: `markers` for split="markers", else `output_sizes`. Without data
            (None), weights are compared instead.
        seed: seed of the clustering or of the random split.
    """
    neurons = len(weights.w1)
    sizes = torch.tensor(neurons_of_experts(experts, size, experts * size - neurons))
    in_shared = int(sizes[:shared].sum())
    generator = torch.Generator().manual_seed(seed)
    rates = torch.arange(neurons, 0, -1.0)  # a dry run
    if active is not None:
        often = active if split == "markers" else (active > 0.1 * active.amax(0, keepdim=True)).float()
        rates = often.mean(1).cpu()
    ranked = rates.argsort(descending=True, stable=True)
    always, routed = ranked[:in_shared], ranked[in_shared:].sort().values
    others = sizes[shared:].tolist()
    if split == "random":
        found = torch.arange(len(others)).repeat_interleave(sizes[shared:])
        found = found[torch.randperm(len(found), generator=generator)]
    elif split == "markers" and active is not None:
        first = ranked[in_shared : in_shared + len(others)]
        found = clusters_around(active[routed], active[first], others)
    else:
        found = balanced_clusters(neuron_features(weights, split, active)[routed], others, seed=seed)
    labels = torch.empty(neurons, dtype=torch.int64)
    labels[always] = torch.arange(shared).repeat_interleave(sizes[:shared])
    labels[routed] = found + shared
    return labels


def neuron_features(weights: FFNWeights, split: Split, active: Tensor | None) -> Tensor:
    """Return what neurons are compared by, float32 [h, n]; the arguments are those of `split_neurons`."""
    if active is not None and split != "weights":
        return active if split == "markers" else F.normalize(active, dim=1)
    # The normalised rows of the linear whose output is sparse, without the bias.
    rows = weights.w1 if weights.gate is None else weights.gate
    return F.normalize(rows.detach().float(), dim=1)


def representatives(features: Tensor, labels: Tensor, shared: int) -> Tensor:
    """Return the neuron nearest to the mean of its expert, for every expert that does not always run: int64 [E].

    Distances are sums of absolute differences, as CMoE (arXiv 2502.04416) has them.

    Args:
        features: what neurons are compared by, [h, n] (`neuron_features`).
        labels: the expert of every neuron, [h].
        shared: how many experts, the first ones, always run.
    """
    found = []
    for expert in range(shared, int(labels.max()) + 1):
        members = (labels == expert).nonzero().squeeze(1)
        rows = features[members.to(features.device)]
        found.append(members[int((rows - rows.mean(0)).abs().sum(1).argmin())])
    return torch.stack(found)


def output_sizes(weights: FFNWeights, activation: str, x: Tensor) -> Tensor:
    """Return the size of each neuron's output on each token, [h, N]: |activation| times the norm of its row of w2."""
    with torch.no_grad():
        experts = Experts(weights.w1, weights.b1, weights.gate, weights.b_gate, weights.w2)
        a = hidden(x, experts, ACTIVATIONS[activation]).float()
        sizes: Tensor = a.abs() * weights.w2.float().norm(dim=1)
        return sizes.t()


def markers(weights: FFNWeights, activation: str, x: Tensor, count: int) -> Tensor:
    """Mark each token's `count` largest hidden values: 1 and 0, float32 [h, N], for x [N, d_in].

    They are those of inputs and weight rows of length 1 (CMoE, arXiv 2502.04416). NaN stays NaN.
    """
    lengths: Tensor = x.float().norm(dim=1, keepdim=True).clamp_min(1e-12)

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        rows: Tensor = weight.float().norm(dim=1).clamp_min(1e-12)
        return F.linear(x, weight, bias).float() / (lengths * rows)

    with torch.no_grad():
        up = linear(weights.w1, weights.b1)
        gate = None if weights.gate is None else linear(weights.gate, weights.b_gate)
        sizes: Tensor = neuron_size(up if gate is None else gate, None if gate is None else up, activation)
        marked = torch.zeros_like(sizes).scatter_(1, sizes.topk(count, dim=1).indices, 1.0)
        return marked.masked_fill(sizes.isnan(), torch.nan).t()
