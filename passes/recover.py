"""Fine-tune a model as it will run: with experts and inputs skipped by tau, and with routers that adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.padding import real_tokens
from surgeon.described import was_and_is
from surgeon.dynamic.site import DynamicSite, find_dynamic
from surgeon.exits.halting import HaltSite
from surgeon.exits.site import ExitSite
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph
from surgeon.inputs.site import Skipping
from surgeon.moe.module import MoE
from surgeon.moe.site import MoESite
from surgeon.passes.contract import FitContext, SiteKind
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.passes.sparsify_inputs import recalibrate
from surgeon.passes.trained import FineTunedPass
from surgeon.sites.rejection import Rejection
from surgeon.training.finetuning import finetune
from surgeon.training.loop import FitReport, RunSettings


@dataclass(frozen=True, kw_only=True)
class Recover(FineTunedPass[DynamicSite, str]):
    """Fine-tune with experts and inputs skipped, so that what runs makes up for the rest.

    Every batch runs at a random tau, at most the given one, and linear layers skip at most the given share of their
    inputs. The selection itself gets no gradient. The routers continue to learn what moeify fitted them to predict.
    They learn it from the changing experts, on the inputs in the sparse model. This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "recover"
    works_on: ClassVar[SiteKind] = "dynamic"
    must_precede: ClassVar[frozenset[str]] = frozenset({"lower", "quantize"})
    preserves: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    tau: float = option(0.3, "Largest tau during training. The model's own tau stays as it is.", least=0, most=1)
    skip_inputs: float = option(
        0.6,
        "For layers that skip inputs or neurons: the largest share that they skip during training. A batch with little "
        "tau skips less. The layers' own tau stays as it is.",
        least=0,
        most=1,
    )
    router_weight: float = option(0.1, "Weight of the routers' loss, added to the model's loss.", least=0)
    lr: float = option(2e-5, "Learning rate of AdamW for all parameters except the routers'.", above=0)
    router_lr: float = option(
        1e-3, "Learning rate of AdamW for the routers, which have to adapt to the experts.", above=0
    )
    epochs: float = option(1.0, "Number of fine-tuning epochs.", least=0)

    def keeps_output(self, fitted: bool) -> bool:
        return not fitted

    def match(self, graph: GraphModule, site: DynamicSite) -> Rejection | None:
        if isinstance(site, ExitSite | HaltSite):
            return Rejection("early-exit", f"{site.leaving} there, and recover trains what all of them run")
        if site.form == ("masked" if isinstance(site, Skipping) else "module"):
            return None
        return Rejection("in-op-form", "it is already in the graph as ops: run recover before lower")

    def observe(
        self, graph: TracedGraph, sites: Sequence[DynamicSite], data: Data | None, settings: RunSettings
    ) -> Mapping[str, str]:
        without = "to be fine-tuned" if settings.dry_run else "unchanged: there is no data to train it on"
        return dict.fromkeys((site.path for site in sites), without if data is None else "fine-tuned")

    def rewrite(self, graph: TracedGraph, site: DynamicSite, seen: str) -> SiteChange:
        """Describe what happens to the site. Nothing is inserted: only `fit` changes anything."""
        if isinstance(site, Skipping):
            count = site.parameters
        else:
            count = sum(parameter.numel() for parameter in graph.get_submodule(site.path).parameters())
        cost, name = site.multiply_adds, site.nodes[-1].name
        return SiteChange(
            site.path, site.describe, seen, (count, count), (cost, cost), (name, name),
            facts=was_and_is(site.facts, site.facts),
        )  # fmt: skip

    def fit(self, context: FitContext[DynamicSite]) -> FitReport | None:
        """Train all parameters for the task, at a new random tau for every batch. Then restore the layers' own tau."""
        graph = context.graph
        # `finetune` does so too, but after the first tau is drawn, which must not be set in the graph this came from.
        own_parameters(graph)
        chosen = {change.path for _, change in context.changes}
        sites = [site for site in find_dynamic(graph) if site.path in chosen]
        moes = [site for site in sites if isinstance(site, MoESite)]
        inputs = {site.path: [str(node.args[0].name) for node in site.nodes] for site in moes}  # type: ignore[union-attr]
        taus = {site.path: site.tau.clone() for site in sites}

        def layer(path: str) -> MoE:
            # Looked up at every use: `finetune` gives the graph copies of its modules.
            moe = graph.get_submodule(path)
            assert isinstance(moe, MoE)
            return moe

        def penalise(batch: Batch, values: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, float]]:
            losses = [
                moe.router.goal.loss(moe.router, real_tokens(batch, values[name]).detach(), moe.routed, moe.activation)
                for moe, names in ((layer(path), names) for path, names in inputs.items())
                for name in names
            ]
            drawn.draw(done)
            if not losses:
                return torch.zeros(()), {}
            mean = torch.stack(losses).mean()
            return self.router_weight * mean, {"router loss": mean.item()}

        largest = {site.path: self.tau if isinstance(site, MoESite) else self.skip_inputs for site in sites}
        curved = {site.path for site in sites if isinstance(site, Skipping)}
        drawn = _DrawnTau(graph, largest, curved, context.settings.seed)
        drawn.draw(-1.0)
        try:
            report = finetune(
                graph, context.data, self.plan(), context.settings, "recover",
                watched=[n for names in inputs.values() for n in names],
                penalise=penalise, distill=self.distill, distill_layers=self.distill_layers,
                augmentation=self.augmentation, stateful=(drawn,),
                own_rates={
                    f"{path}.router.{name}": self.router_lr
                    for path in inputs
                    for name, _ in layer(path).router.named_parameters()
                },
            )  # fmt: skip
        finally:
            for path, tau in taus.items():
                _tau(graph, path).copy_(tau)
        linears = [site for site in find_dynamic(graph) if site.path in curved and isinstance(site, Skipping)]
        recalibrate(graph, linears, context.data, context.settings)
        return report


def _tau(graph: TracedGraph, path: str) -> Tensor:
    # Looked up at every use, like layers.
    tau = graph.get_submodule(path).tau
    assert isinstance(tau, Tensor)
    return tau


class _DrawnTau:
    """A random tau, drawn at the end of each batch for the next one. Therefore checkpoints have to keep it.

    largest: of every layer, by path. curved: the layers that skip inputs. Of what they skip at most they skip the cube
    root of the share that was drawn, since skipping a few inputs changes nothing.
    """

    def __init__(self, graph: TracedGraph, largest: Mapping[str, float], curved: Set[str], seed: int) -> None:
        self._graph, self._largest, self._curved, self._seed, self._share = graph, largest, curved, seed, 0.0

    def draw(self, done: float) -> None:
        """Draw again, from the seed and the share of the training that is done."""
        generator = torch.Generator().manual_seed(self._seed + int((1.0 + done) * 1e9))
        self._set(float(torch.rand((), generator=generator)))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"share": self._share}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self._set(state["share"])

    def _set(self, share: float) -> None:
        self._share = share
        for path, largest in self._largest.items():
            _tau(self._graph, path).fill_(largest * (share ** (1 / 3) if path in self._curved else share))
