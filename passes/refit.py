"""Fit the weights of linear layers that skip inputs to the inputs that are left, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.data.data import Data
from surgeon.dynamic.site import DynamicSite
from surgeon.exits.halting import HaltSite
from surgeon.exits.site import ExitSite
from surgeon.graph.edit import get_attr
from surgeon.graph.holder import mark_holders, parameters_only
from surgeon.graph.traced import TracedGraph, aten, is_call, tensor_of
from surgeon.inputs.neuron_site import SparseNeuronsSite
from surgeon.inputs.site import SparseLinearSite
from surgeon.kernels.sparse_linear import LinearCall, kept
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind, SiteRefused
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.passes.sparsify_inputs import dense_inputs
from surgeon.sites.rejection import Rejection
from surgeon.training.loop import RunSettings

# Tokens to fit on. Every eighth is held back, to see whether the fit helps.
_TOKENS, _HELD_BACK = 16384, 8
# Their places among the op's arguments.
_WEIGHT, _BIAS = LinearCall._fields.index("weight"), LinearCall._fields.index("bias")


@dataclass(frozen=True, kw_only=True)
class Refit(Pass[DynamicSite, Tensor]):
    """Let the inputs that a linear layer reads make up for those that it skips. Nothing is trained by steps.

    Inputs are correlated, so those that are kept tell something of the others. The weights become those that bring the
    layer nearest to its dense output on the data, at its present tau: a least-squares problem with a solution in closed
    form. It costs nothing at run time. Set tau first, by the option of sparsify-inputs or by `surgeon tune`. At
    another tau the layer is off by what was fitted, also at 0.

    A layer that does not get better on tokens that were held back stays as it is. This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "refit"
    works_on: ClassVar[SiteKind] = "dynamic"
    must_precede: ClassVar[frozenset[str]] = frozenset({"lower"})
    preserves: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    ridge: float = option(
        0.01, "How strongly weights are drawn to what they are, relative to the inputs' mean square.", above=0
    )

    def match(self, graph: GraphModule, site: DynamicSite) -> Rejection | None:
        if isinstance(site, ExitSite | HaltSite):
            reason = f"only linear layers that skip inputs are refitted, and {site.leaving} there"
            return Rejection("early-exit", reason)
        if isinstance(site, SparseNeuronsSite):
            return Rejection("skips-neurons", "only linear layers that skip inputs are refitted")
        if not isinstance(site, SparseLinearSite):
            return Rejection(
                "has-experts", "only linear layers that skip inputs are refitted, and this one has experts"
            )
        if site.form != "masked":
            return Rejection("in-op-form", "it is already lowered: run refit before lower")
        if not float(site.tau):
            return Rejection("skips-nothing", "its tau is 0, so that nothing is skipped")
        return None

    def observe(
        self, graph: TracedGraph, sites: Sequence[DynamicSite], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Tensor]:
        if data is None:
            return {}
        linears = [site for site in sites if isinstance(site, SparseLinearSite)]
        return {site.path: x for site, x in dense_inputs(graph, linears, data, settings, tokens=_TOKENS)}

    @torch.no_grad()
    def rewrite(self, graph: TracedGraph, site: DynamicSite, seen: Tensor | None) -> SiteChange:
        assert isinstance(site, SparseLinearSite)
        words = "to be fitted"
        if seen is not None:
            words = self._refit(graph, site, seen)
        count = site.multiply_adds + site.d_out
        name = site.output.name
        return SiteChange(
            site.path, site.describe, words, (count, count), (site.multiply_adds,) * 2, (name, name), made=(site.path,)
        )

    def _refit(self, graph: TracedGraph, site: SparseLinearSite, x: Tensor) -> str:
        if not bool(torch.isfinite(x).all()):
            raise SiteRefused("not-finite", "its inputs on the data contain NaN or infinity")
        weight, bias = (
            _weight(graph, site.nodes[0].args[_WEIGHT]),
            getattr(graph.get_submodule(site.path), "bias", None),
        )
        held_back = torch.arange(len(x), device=x.device) % _HELD_BACK == _HELD_BACK - 1
        deviation = x.float() if site.centre is None else x.float() - site.centre
        sparse = torch.where(kept(x, site.scale, site.centre, site.levels, site.tau), deviation, 0.0)
        # What the dense layer gives, and what is missing of it.
        whole, missing = deviation @ weight.float().t(), (deviation - sparse) @ weight.float().t()
        change, offset = _least_squares(sparse[~held_back], missing[~held_back], self.ridge)
        fitted = sparse[held_back] @ change + offset
        scale = float(whole[held_back].double().square().mean()) + 1e-300
        before = (float(missing[held_back].double().square().mean()) / scale) ** 0.5
        after = (float((missing[held_back] - fitted).double().square().mean()) / scale) ** 0.5
        if not after < before:
            return f"unchanged: error {before:.1%}, and {after:.1%} with fitted weights"
        holder = parameters_only(graph.get_submodule(site.path))
        fresh = weight.double() + change.t().double()
        moved = offset.double() if bias is None else bias.double() + offset.double()
        holder.register_parameter("weight", nn.Parameter(fresh.to(weight.dtype)))
        holder.register_parameter("bias", nn.Parameter(moved.to(weight.dtype)))
        graph.set_submodule(site.path, holder)
        mark_holders(graph)
        for node in site.nodes:
            with graph.graph.inserting_before(node):
                node.update_arg(_WEIGHT, get_attr(graph, f"{site.path}.weight"))
                node.update_arg(_BIAS, get_attr(graph, f"{site.path}.bias"))
        return f"error {before:.1%} → {after:.1%}"


def _weight(graph: TracedGraph, node: object) -> Tensor:
    """The weight that a node gives, [d_out, d_in]."""
    assert isinstance(node, Node)
    flipped = is_call(node, aten.t.default)
    source = node.args[0] if flipped else node
    assert isinstance(source, Node)
    tensor = tensor_of(graph, source)
    assert tensor is not None
    return tensor.detach().t() if flipped else tensor.detach()


def _least_squares(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the map [d_in, d_out] and the offset [d_out] that bring x [N, d_in] nearest to y [N, d_out]."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x.t() @ x) / len(x) - mean_x.outer(mean_x)
    cross = (x.t() @ y) / len(x) - mean_x.outer(mean_y)
    gram.diagonal().add_(ridge * float(x.square().mean()) + 1e-30)
    change = torch.linalg.solve(gram, cross)
    return change.float(), (mean_y - mean_x @ change).float()
