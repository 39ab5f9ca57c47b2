"""Fit linear layers that skip inputs to the inputs that are left, with a low rank beside them, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.data.data import Data
from surgeon.described import was_and_is
from surgeon.dynamic.site import DynamicSite
from surgeon.exits.halting import HaltSite
from surgeon.exits.site import ExitSite
from surgeon.graph.edit import emit, erase_unread, get_attr
from surgeon.graph.holder import mark_holders, parameters_only
from surgeon.graph.traced import TracedGraph, aten, is_call, tensor_of
from surgeon.inputs.fitting import Fitted, fit
from surgeon.inputs.neuron_site import SparseNeuronsSite
from surgeon.inputs.rebuild import low_rank
from surgeon.inputs.site import SparseLinearSite, add_low_rank, value_of
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
# Ranks that are tried: the largest over these.
_PARTS = (1, 2, 4, 8)
# Their places among the op's arguments.
_WEIGHT, _BIAS = LinearCall._fields.index("weight"), LinearCall._fields.index("bias")


@dataclass(frozen=True, kw_only=True)
class Refit(Pass[DynamicSite, Tensor]):
    """Let the inputs that a linear layer reads make up for those that it skips. Nothing is trained by steps.

    Inputs are correlated, so those that are kept tell something of the others. The weights become those that bring the
    layer nearest to its dense output on the data, at its present tau: a least-squares problem with a solution in closed
    form. Set tau first, by the option of sparsify-inputs or by `surgeon tune`. At another tau the layer is off by what
    was fitted, also at 0.

    With rank, a layer may also get a product of two small matrices that every input goes through (after R-Sparse, arXiv
    2504.19449). It is fitted together with the weights, and tau becomes larger by what it costs, so that the layer
    costs what it did. Of rank, a half, a quarter and an eighth of it, and none, a layer gets what has the least error
    on tokens that were held back.

    A layer that does not get better there stays as it is. This pass is not part of D2DMoE.
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

    rank: float = option(
        0.0,
        "The largest rank to try, as a share of the layer's inputs or outputs, whichever are fewer. 0 fits weights "
        "alone.",
        least=0,
        most=1,
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
        before, words, rank, facts = site.output.name, "to be fitted", site.rank, was_and_is(site.facts, site.facts)
        if seen is not None:
            words, rank, errors = self._refit(graph, site, seen)
            facts |= {"rank": (site.rank, rank), "error": errors}
        more = (rank - site.rank) * (site.d_in + site.d_out)
        cost = site.multiply_adds
        count = cost + site.d_out
        return SiteChange(
            site.path, site.describe, words, (count, count + more), (cost, cost + more), (before, site.output.name),
            made=(site.path,), facts=facts,
        )  # fmt: skip

    def _refit(self, graph: TracedGraph, site: SparseLinearSite, x: Tensor) -> tuple[str, int, tuple[float, float]]:
        """Fit a layer; returns what to say of it, its rank, and the errors before and now."""
        if not bool(torch.isfinite(x).all()):
            raise SiteRefused("not-finite", "its inputs on the data contain NaN or infinity")
        layer = _Layer(graph, site, x.float())
        before = layer.error_now()
        tried = [one for rank in self._ranks(site) if (one := layer.fitted(rank, self.ridge)) is not None]
        best = min(tried, key=lambda one: one.error)
        if not best.error < before:
            return (
                f"unchanged: error {before:.1%}, and {best.error:.1%} with fitted weights",
                site.rank,
                (before, before),
            )
        layer.put(best)
        words = f"error {before:.1%} → {best.error:.1%}"
        if best.rank or site.rank:
            words += f", rank {best.rank} and {best.tau:.0%} skipped"
        return words, best.rank, (before, best.error)

    def _ranks(self, site: SparseLinearSite) -> list[int]:
        most = self.rank * min(site.d_in, site.d_out)
        return sorted({0, *(round(most / part) for part in _PARTS)})


@dataclass(frozen=True)
class _Tried:
    """What was fitted with a rank at the same cost. error: relative, on tokens that were held back."""

    fitted: Fitted
    rank: int
    tau: float
    error: float


class _Layer:
    """A layer of the graph that computes A s + L x + bias: d [N, d_in] is x without centres, s what is read of d.

    weight, bias: those that it has for d where nothing is skipped, A + L [d_out, d_in], and [d_out].
    """

    def __init__(self, graph: TracedGraph, site: SparseLinearSite, x: Tensor) -> None:
        self.graph, self.site = graph, site
        self.centre = x.new_zeros(site.d_in) if site.centre is None else site.centre
        self.read = _weight(graph, site.nodes[0].args[_WEIGHT])
        bias = getattr(graph.get_submodule(site.path), "bias", None)
        self.weight, self.bias = self.read.double(), x.new_zeros(site.d_out).double() if bias is None else bias.double()
        if site.rank:
            low_in, low_out = (part.double() for part in low_rank(graph, site))
            self.weight = self.weight + low_out @ low_in
            self.bias = self.bias + low_out @ (low_in @ self.centre.double())
        self.d = x - self.centre
        self.held_back = torch.arange(len(x), device=x.device) % _HELD_BACK == _HELD_BACK - 1
        self.whole = self.d[self.held_back] @ self.weight.float().t()

    def error_now(self) -> float:
        """The error at the present tau, as the layer is."""
        skipped = self.d[self.held_back] - self._left(float(self.site.tau))[self.held_back]
        return self._relative(skipped @ self.read.float().t())

    def fitted(self, rank: int, ridge: float) -> _Tried | None:
        """Fit the layer with this rank, and as much skipped as pays for it. None if there is not enough to skip."""
        site = self.site
        more = (rank - site.rank) * (site.d_in + site.d_out) / (site.d_in * site.d_out)
        tau = max(0.0, float(site.tau) + more)
        if tau > 1:
            return None
        s = self._left(tau)
        found = fit(self.weight.float(), self.d[~self.held_back], s[~self.held_back], rank, ridge)
        given = found(s[self.held_back], self.d[self.held_back])
        return _Tried(found, rank, tau, self._relative(self.whole - given))

    def put(self, tried: _Tried) -> None:
        """Give the layer of the graph these weights and this tau."""
        graph, site, found = self.graph, self.site, tried.fitted
        holder = parameters_only(graph.get_submodule(site.path))
        # The low rank reads x with its centre.
        moved = found.low_out.double() @ (found.low_in.double() @ self.centre.double())
        values = {"weight": found.read, "bias": self.bias + found.offset.double() - moved}
        for name, value in (values | {"low_in": found.low_in, "low_out": found.low_out}).items():
            there = tried.rank or name in values
            holder.register_parameter(name, nn.Parameter(value.to(self.read.dtype)) if there else None)
        holder.register_buffer("tau", torch.full_like(site.tau, tried.tau))
        graph.set_submodule(site.path, holder)
        mark_holders(graph)
        for node in site.nodes:
            self._connect(node, tried.rank)

    def _connect(self, node: Node, rank: int) -> None:
        """Let an execution of the layer read its new tensors."""
        graph, path, value = self.graph, self.site.path, value_of(node)
        with graph.graph.inserting_before(node):
            node.update_arg(_WEIGHT, get_attr(graph, f"{path}.weight"))
            node.update_arg(_BIAS, get_attr(graph, f"{path}.bias"))
        if value is not node:
            value.replace_all_uses_with(node)
            # With what it read: tensors that the layer may no longer have.
            erase_unread(graph, [value, *value.all_input_nodes[2:]])
        if rank:
            with graph.graph.inserting_before(node.next):
                low = [get_attr(graph, f"{path}.{name}") for name in ("low_in", "low_out")]
                added = emit(graph, add_low_rank, node, node.args[0], *low, path=path)
            node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)

    def _left(self, tau: float) -> Tensor:
        """The deviations [N, d_in] without those that are skipped at a tau."""
        site = self.site
        level = torch.tensor(tau, device=self.d.device)
        return torch.where(kept(self.d, site.scale, None, site.levels, level), self.d, 0.0)

    def _relative(self, error: Tensor) -> float:
        """The root mean square of an error [N, d_out] of the tokens held back, over that of what the layer gives."""
        whole = float(self.whole.double().square().mean()) + 1e-300
        return math.sqrt(float(error.double().square().mean()) / whole)


def _weight(graph: TracedGraph, node: object) -> Tensor:
    """The weight that a node gives, [d_out, d_in]."""
    assert isinstance(node, Node)
    flipped = is_call(node, aten.t.default)
    source = node.args[0] if flipped else node
    assert isinstance(source, Node)
    tensor = tensor_of(graph, source)
    assert tensor is not None
    return tensor.detach().t() if flipped else tensor.detach()
