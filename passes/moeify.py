"""Split each feed-forward layer into experts with a router that predicts the size of every expert's output.

Balanced clusters of neurons become experts (D2DMoE, section 3.2, after MoEfication); the router regresses the norms of
the experts' outputs (section 3.3); at run time an expert is used if its score reaches tau times the largest (3.4).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from surgeon.batch import Batch, Data
from surgeon.clustering import balanced_clusters, nearest_divisors
from surgeon.errors import UsageError
from surgeon.fit import Settings, fit, real_tokens
from surgeon.graph import TracedGraph, free_target
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.moe import MoE, find_moes, set_tau
from surgeon.passes.base import SiteKind, TrainedPass, option
from surgeon.report import FitReport, SiteChange
from surgeon.rewrite import Capture, replace_call
from surgeon.search import find_ffns
from surgeon.sites import FFN, Rejection

log = logging.getLogger("surgeon")

# Expert size aimed at when neither `experts` nor `expert_size` is given.
_USUAL_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Moeify(TrainedPass[FFN]):
    """Split each FFN into experts of equal size and train a router for it (D2DMoE, sections 3.2 to 3.4).

    With every expert running (tau = 0, the default) the output stays what it was, trained or not.
    """

    name: ClassVar[str] = "moeify"
    works_on: ClassVar[SiteKind] = "ffn"
    makes: ClassVar[SiteKind | None] = "moe"
    must_precede: ClassVar[frozenset[str]] = frozenset({"lower"})
    preserves: ClassVar[bool] = True
    untrained: ClassVar[str] = (
        "The routers were not trained: every expert runs and the output is unchanged. To make it cheaper, run again "
        "with --data, then set tau."
    )

    experts: int | None = option(
        None, "Experts in each layer; must divide its width. By default about 32 neurons each."
    )
    expert_size: int | None = option(None, "Neurons in each expert, instead of their number.")
    router_width: int = option(128, "Hidden width of the router.")
    tau: float = option(0.0, "Set after fitting: the share of the largest score below which an expert is skipped.")
    epochs: float = option(5.0, "How often router training goes through the data.")
    lr: float = option(1e-3, "Learning rate of AdamW for the routers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts is not None and self.expert_size is not None:
            raise UsageError("moeify: give experts or expert_size, not both.")
        for name in ("experts", "expert_size", "router_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"moeify: {name} is {value}, but must be at least 1.")
        if not 0.0 <= self.tau <= 1.0:
            raise UsageError(f"moeify: tau is {self.tau}, but must be from 0 to 1.")

    def find(self, graph: GraphModule) -> tuple[Sequence[FFN], list[Rejection]]:
        return find_ffns(graph)

    def match(self, graph: GraphModule, site: FFN) -> str | None:
        if self.experts is not None and site.hidden % self.experts:
            return _indivisible(site, self.experts, "experts")
        if self.expert_size is not None and site.hidden % self.expert_size:
            return _indivisible(site, self.expert_size, "neurons each")
        return None

    def check(self, matched: Sequence[FFN], rejected: Sequence[Rejection]) -> None:
        if matched:
            return
        misfit = next((rejection for rejection in rejected if "do not divide by" in rejection.reason), None)
        if misfit is not None:
            raise UsageError(f"{misfit.path}: {misfit.reason}")

    def rewrite(self, graph: TracedGraph, site: FFN) -> SiteChange:
        weights = site.weights(graph)
        experts = self._experts(site.hidden)
        log.info("moeify: %s, %d experts of %d neurons", site.path, experts, site.hidden // experts)
        rows = weights.w1 if weights.gate is None else weights.gate
        # Rows of the linear whose output is sparse, at unit length, without the bias.
        labels = balanced_clusters(
            F.normalize(rows.detach().float(), dim=1), experts, seed=torch.initial_seed() % 2**31
        )
        moe = MoE(weights, labels, experts, site.activation, self.router_width)
        moe.train(graph.training)
        target = free_target(graph, site.path, "moe")
        graph.add_submodule(target, moe)
        names = [replace_call(graph, call, target) for call in site.calls]
        after = next(found for found in find_moes(graph) if found.path == target)
        return SiteChange(
            site.path,
            site.describe,
            f"{after.describe}, router {self.router_width}",
            (site.parameters(graph), sum(parameter.numel() for parameter in moe.parameters())),
            (site.multiply_adds, after.multiply_adds),
            (site.calls[-1].output.name, names[-1]),
            made=target,
        )

    def fit(
        self,
        graph: TracedGraph,
        before: TracedGraph,
        changes: Sequence[tuple[FFN, SiteChange]],
        data: Data,
        settings: Settings,
    ) -> FitReport | None:
        """Regress the norms of the experts' outputs on the dense model's activations, all layers at once."""
        moes: list[tuple[MoE, list[str]]] = []
        for site, change in changes:
            moe = graph.get_submodule(change.made)
            assert isinstance(moe, MoE)
            moes.append((moe, [call.x.name for call in site.calls]))
        inner = Capture(before, [name for _, names in moes for name in names]).eval()

        def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
            with torch.no_grad():
                _, values = inner(*batch.args, **batch.kwargs)
            losses = []
            for moe, names in moes:
                x = torch.cat([real_tokens(batch, values[name]) for name in names])
                with torch.no_grad():
                    norms = moe.expert_norms(x)
                losses.append(F.mse_loss(moe.router(x).float(), norms))
            mean = torch.stack(losses).mean()
            return mean, {"router loss": mean.item()}

        routers = [parameter for moe, _ in moes for parameter in moe.router.parameters()]
        return fit(routers, loss, data, self.plan(), settings, "moeify routers")

    def finish(self, graph: TracedGraph, sites: Sequence[FFN], changes: Sequence[SiteChange]) -> tuple[str, ...]:
        notes = []
        if changes and self.tau:
            set_tau(graph, {change.made: self.tau for change in changes})
        if any(site.dropout for site in sites):
            notes.append("Dropout between the linears is not carried into the experts; it matters in training only.")
        modules = [graph.get_submodule(change.made) for change in changes]
        names = {module.activation for module in modules if isinstance(module, MoE)}
        dense = sorted(name for name in names if not ACTIVATIONS[name].leaves_zeros)
        if dense:
            notes.append(
                f"The experts use {', '.join(dense)}, which leaves few values near zero: tau will skip little before "
                "the quality drops. To save more, run swap-activation and sparsify (with --data) first."
            )
        return tuple(notes)

    def _experts(self, hidden: int) -> int:
        if self.experts is not None:
            return self.experts
        if self.expert_size is not None:
            return hidden // self.expert_size
        return min(nearest_divisors(hidden, max(1, hidden // _USUAL_SIZE)), key=lambda n: abs(hidden / n - _USUAL_SIZE))


def _indivisible(site: FFN, number: int, what: str) -> str:
    nearest = ", ".join(map(str, nearest_divisors(site.hidden, number)))
    return f"{site.hidden} neurons do not divide by {number} {what}. Nearest: {nearest}."
