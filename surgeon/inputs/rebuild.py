"""Make the module of a linear layer that skips inputs from its ops in a graph, and the dense layer it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.graph.traced import aten, is_call, tensor_of
from surgeon.inputs.module import SparseLinear, SparseLinearShape
from surgeon.inputs.site import SparseLinearSite
from surgeon.kernels.sparse_linear import LinearCall


def linear_module(graph: GraphModule, site: SparseLinearSite) -> SparseLinear:
    """Return a layer of a graph as a module of its own. It shares the graph's tensors where they are laid out alike.

    The module reads only the inputs that are kept, also if the layer in the graph is not lowered.
    """
    weight, bias = _weight(graph, site), _bias(graph, site)
    shape = SparseLinearShape(
        site.d_in, site.d_out, bias is not None, site.scale is not None, site.centre is not None, site.rank
    )
    made = SparseLinear(shape, device="meta", dtype=None)
    made.weight = _parameter(weight)
    made.bias = None if bias is None else _parameter(bias)
    if site.rank:
        made.low_in, made.low_out = low_rank(graph, site)
    made.scale, made.centre, made.levels, made.tau = site.scale, site.centre, site.levels, site.tau
    return made


@torch.no_grad()
def dense_weights(graph: GraphModule, site: SparseLinearSite) -> tuple[Tensor, Tensor]:
    """Return weight [d_out, d_in] and bias [d_out] of the dense layer that a layer computes at tau 0."""
    weight, bias = _weight(graph, site), _bias(graph, site)
    moved = weight.new_zeros(site.d_out, dtype=torch.float64) if bias is None else bias.double()
    if site.centre is not None:
        moved = moved - site.centre.double() @ weight.double()
    rows = weight.detach().t()
    if site.rank:
        low_in, low_out = low_rank(graph, site)
        rows = (rows.double() + low_out.double() @ low_in.double()).to(weight.dtype)
    return rows, moved.to(weight.dtype)


def low_rank(graph: GraphModule, site: SparseLinearSite) -> tuple[nn.Parameter, nn.Parameter]:
    """Return low_in [rank, d_in] and low_out [d_out, rank] of a layer that has them."""
    holder = graph.get_submodule(site.path)
    return holder.get_parameter("low_in"), holder.get_parameter("low_out")


def _weight(graph: GraphModule, site: SparseLinearSite) -> Tensor:
    """The weight, [d_in, d_out] and contiguous."""
    node: object = LinearCall(*site.nodes[0].args).weight  # type: ignore[arg-type]
    assert isinstance(node, Node)
    turned = is_call(node, aten.t.default)
    stored = tensor_of(graph, node.args[0] if turned else node)  # type: ignore[arg-type]
    assert stored is not None
    # Conv1D of transformers stores one row for each input, as the module does; others store one for each output.
    return stored if turned or site.form == "dynamic" else stored.detach().t().contiguous()


def _bias(graph: GraphModule, site: SparseLinearSite) -> Tensor | None:
    node: object = LinearCall(*site.nodes[0].args).bias  # type: ignore[arg-type]
    return tensor_of(graph, node) if isinstance(node, Node) else None


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
