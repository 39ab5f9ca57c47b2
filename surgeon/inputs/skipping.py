"""Both kinds of layers that skip by a threshold on their own values: inputs of linear layers, and gated neurons."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from surgeon.inputs.neuron_site import SparseNeuronsSite, find_sparse_neurons
from surgeon.inputs.site import SparseLinearSite, find_sparse_linears

SkippingSite: TypeAlias = SparseLinearSite | SparseNeuronsSite


def find_skipping(model: nn.Module) -> list[SkippingSite]:
    """Return every layer that skips inputs or neurons: first those that skip inputs, each kind in its order."""
    return [*find_sparse_linears(model), *find_sparse_neurons(model)]
