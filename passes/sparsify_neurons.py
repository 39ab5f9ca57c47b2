"""Let gated feed-forward layers skip the neurons whose gate is near zero, with thresholds from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.data.data import Data
from surgeon.described import was_and_is
from surgeon.graph.edit import emit, get_attr
from surgeon.graph.holder import mark_holders, parameters_only
from surgeon.graph.traced import TracedGraph, free_target
from surgeon.inputs.calibration import Calibration, calibrate_neurons, in_groups
from surgeon.inputs.module import LEVELS
from surgeon.inputs.neuron_site import find_sparse_neurons, masked_neurons
from surgeon.inputs.neurons import SparseNeurons
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.sparse_neurons import NeuronsCall, gates
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind, SiteRefused
from surgeon.passes.options import PerSite, for_site, option
from surgeon.passes.report import SiteChange
from surgeon.sites.ffn import FFN, FFNWeights, LayerCall
from surgeon.sites.rejection import Rejection
from surgeon.sites.replace import replace_by
from surgeon.sites.soundness import not_finite
from surgeon.training.loop import FitReport, RunSettings
from surgeon.training.observe import collect_calls

# Tokens to calibrate on.
_TOKENS = 4096

Criterion = Literal["weighted", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class SparsifyNeurons(Pass[FFN, Calibration | Rejection | None]):
    """Let gated feed-forward layers skip, for each token, the neurons whose gate is near zero. Nothing is trained.

    The gate is computed in full, and says which neurons of up and down are skipped. A skipped neuron adds what it
    usually adds where it is skipped, its centre. These together are part of the bias, so that they cost nothing.
    Centres and thresholds come from a few thousand tokens of data.

    tau is the share of the neurons to skip, as it was on these data. It is set, swept and tuned like the tau of
    experts, and at 0 the output is that of the dense layer. With centre=false, criterion=magnitude is CATS (arXiv
    2404.08763); criterion=weighted is close to CHESS (arXiv 2409.01366), which leaves out the norms of down. For layers
    without a gate use sparsify-inputs. This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "sparsify-neurons"
    works_on: ClassVar[SiteKind] = "ffn"
    makes: ClassVar[SiteKind | None] = "dynamic"
    must_precede: ClassVar[frozenset[str]] = frozenset({"sparsify-inputs", "lower"})
    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    criterion: Criterion = option(
        "weighted",
        "How a gate counts: weighted by what its neuron makes of it, up and down, or by its magnitude alone.",
    )
    centre: bool = option(True, "Let a skipped neuron add its mean in place of nothing.")
    tau: PerSite[float] = option(
        0.0, "Share of the neurons to skip, or values by path. It can be changed later.", least=0, most=1
    )

    def find(self, graph: GraphModule) -> tuple[Sequence[FFN], list[Rejection]]:
        sites, rejected = super().find(graph)
        done = [
            Rejection("already-done", "it already skips neurons", site.path.rpartition(".")[0], site.output.name)
            for site in find_sparse_neurons(graph)
        ]
        return sites, [*rejected, *done]

    def match(self, graph: GraphModule, site: FFN) -> Rejection | None:
        if not site.gated:
            return Rejection("no-gate", "it has no gate that says which neurons matter before the others are computed")
        return not_finite(graph, site.linears)

    def keeps_output(self, fitted: bool) -> bool:
        return not any(self.tau.values() if isinstance(self.tau, dict) else [self.tau])

    def observe(
        self, graph: TracedGraph, sites: Sequence[FFN], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Calibration | Rejection]:
        if data is None:
            return {}
        found: dict[str, Calibration | Rejection] = {}
        for part in in_groups(sites, _TOKENS):
            names = {site.path: [call.x.name for call in site.calls] for site in part}
            values = collect_calls(graph, names, data, tokens=_TOKENS, progress=settings.progress)
            for site in part:
                found[site.path] = self._calibrate(site, site.weights(graph), values[site.path])
        return found

    @torch.no_grad()
    def _calibrate(self, site: FFN, weights: FFNWeights, x: Tensor) -> Calibration | Rejection:
        assert weights.gate is not None
        a = gates(x, weights.gate, weights.b_gate, site.activation)
        up, activated = F.linear(x, weights.w1, weights.b1), ACTIVATIONS[site.activation].up
        up = up if activated is None else activated.fn(up)
        if not bool(torch.isfinite(a).all() and torch.isfinite(up).all()):
            return Rejection("not-finite", "its neurons on the data contain NaN or infinity")
        return calibrate_neurons(a, up, weights.w2, weighted=self.criterion == "weighted", centred=self.centre)

    @torch.no_grad()
    def rewrite(self, graph: TracedGraph, site: FFN, seen: Calibration | Rejection | None) -> SiteChange:
        if isinstance(seen, Rejection):
            raise SiteRefused(seen.code, seen.reason)
        weights, tau = site.weights(graph), for_site(self.tau, site.path) or 0.0
        seen = seen or Calibration(None, None, torch.zeros(LEVELS))
        made = SparseNeurons.of(weights, site.activation, seen.scale, seen.centre, seen.levels)
        made.tau.fill_(tau)
        before, target = site.parameters(graph), free_target(graph, site.path, "neurons")
        graph.add_submodule(target, parameters_only(made))
        new = ""
        for call in site.calls:
            new = self._replace(graph, call, target, made)
        mark_holders(graph)
        (changed,) = [found for found in find_sparse_neurons(graph) if found.path == target]
        words = made.shape.describe + (f", {tau:.0%} skipped" if tau else "")
        return SiteChange(
            site.path,
            site.describe,
            words,
            (before, changed.parameters),
            (site.multiply_adds, changed.multiply_adds),
            (site.output.name, new),
            made=(target,),
            facts=was_and_is(site.facts, {**changed.facts, "skipped": tau}),
        )

    def _replace(self, graph: TracedGraph, call: LayerCall, target: str, made: SparseNeurons) -> str:
        def tensor(name: str) -> Node | None:
            return None if getattr(made, name) is None else get_attr(graph, f"{target}.{name}")

        def node() -> Node:
            tensors = [tensor(name) for name in NeuronsCall._fields[1:-1]]
            return emit(graph, masked_neurons, call.x, *tensors, made.shape.activation, path=target)

        return replace_by(graph, call, node, path=target.rpartition(".")[0])

    def finish(
        self, graph: TracedGraph, sites: Sequence[FFN], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        if any(site.dropout for site in sites):
            return ("The layers drop the dropout between their linear layers. It only matters in training.",)
        return ()
