"""Fine-tune a model as it will run: with experts skipped by tau, and with routers that adapt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.padding import real_tokens
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph
from surgeon.moe.module import MoE
from surgeon.moe.site import MoESite, find_moes
from surgeon.passes.contract import FitContext, SiteKind
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.passes.trained import FineTunedPass
from surgeon.sites.rejection import Rejection
from surgeon.training.finetuning import finetune
from surgeon.training.loop import FitReport, RunSettings


@dataclass(frozen=True, kw_only=True)
class Recover(FineTunedPass[MoESite, str]):
    """Fine-tune with experts skipped, so that the experts that run make up for the others.

    Every batch runs at a random tau, at most the given one. The selection itself gets no gradient. The routers continue
    to learn what moeify fitted them to predict. They learn it from the changing experts, on the inputs in the sparse
    model. This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "recover"
    works_on: ClassVar[SiteKind] = "moe"
    must_precede: ClassVar[frozenset[str]] = frozenset({"lower", "quantize"})
    preserves: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    tau: float = option(0.3, "Largest tau during training. The model's own tau stays as it is.", least=0, most=1)
    router_weight: float = option(0.1, "Weight of the routers' loss, added to the model's loss.", least=0)
    lr: float = option(2e-5, "Learning rate of AdamW for all parameters except the routers'.", above=0)
    router_lr: float = option(
        1e-3, "Learning rate of AdamW for the routers, which have to adapt to the experts.", above=0
    )
    epochs: float = option(1.0, "Number of fine-tuning epochs.", least=0)

    def keeps_output(self, fitted: bool) -> bool:
        return not fitted

    def match(self, graph: GraphModule, site: MoESite) -> Rejection | None:
        if site.form == "module":
            return None
        return Rejection("in-op-form", "it is already in the graph as ops: run recover right after moeify")

    def observe(
        self, graph: TracedGraph, sites: Sequence[MoESite], data: Data | None, settings: RunSettings
    ) -> Mapping[str, str]:
        without = "to be fine-tuned" if settings.dry_run else "unchanged: there is no data to train it on"
        return dict.fromkeys((site.path for site in sites), without if data is None else "fine-tuned")

    def rewrite(self, graph: TracedGraph, site: MoESite, seen: str) -> SiteChange:
        """Describe what happens to the site. Nothing is inserted: only `fit` changes anything."""
        count = sum(parameter.numel() for parameter in graph.get_submodule(site.path).parameters())
        cost, name = site.multiply_adds, site.nodes[-1].name
        return SiteChange(site.path, site.describe, seen, (count, count), (cost, cost), (name, name))

    def fit(self, context: FitContext[MoESite]) -> FitReport | None:
        """Train all parameters for the task, at a new random tau for every batch. Then restore the layers' own tau."""
        graph = context.graph
        # `finetune` does so too, but after the first tau is drawn, which must not be set in the graph this came from.
        own_parameters(graph)
        chosen = {change.path for _, change in context.changes}
        sites = [site for site in find_moes(graph) if site.path in chosen]
        inputs = {site.path: [str(node.args[0].name) for node in site.nodes] for site in sites}  # type: ignore[union-attr]
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
            mean = torch.stack(losses).mean()
            drawn.draw(done)
            return self.router_weight * mean, {"router loss": mean.item()}

        drawn = _DrawnTau(lambda: map(layer, inputs), self.tau, context.settings.seed)
        drawn.draw(-1.0)
        try:
            return finetune(
                graph, context.data, self.plan(), context.settings, "recover",
                watched=[n for names in inputs.values() for n in names],
                penalise=penalise, distill=self.distill, distill_layers=self.distill_layers, stateful=(drawn,),
                own_rates={
                    f"{path}.router.{name}": self.router_lr
                    for path in inputs
                    for name, _ in layer(path).router.named_parameters()
                },
            )  # fmt: skip
        finally:
            for path, tau in taus.items():
                layer(path).tau.copy_(tau)


class _DrawnTau:
    """A random tau, drawn at the end of each batch for the next one. Therefore checkpoints have to keep it."""

    def __init__(self, layers: Callable[[], Iterable[MoE]], largest: float, seed: int) -> None:
        self._layers, self._largest, self._seed, self._tau = layers, largest, seed, 0.0

    def draw(self, done: float) -> None:
        """Draw again, from the seed and the share of the training that is done."""
        generator = torch.Generator().manual_seed(self._seed + int((1.0 + done) * 1e9))
        self._set(self._largest * float(torch.rand((), generator=generator)))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"tau": self._tau}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self._set(state["tau"])

    def _set(self, tau: float) -> None:
        self._tau = tau
        for moe in self._layers():
            moe.tau.fill_(tau)
