"""Let samples leave a classifier as soon as a small head behind a block is sure of their class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from surgeon.data.data import Data
from surgeon.described import was_and_is
from surgeon.dynamic.knobs import set_tau
from surgeon.errors import UsageError
from surgeon.exits.blocks import BlockEnd, find_block_ends
from surgeon.exits.halting import find_halts
from surgeon.exits.heads import (
    LOGITS,
    HeadPlan,
    Pooling,
    answer,
    emit_features,
    make_head,
    multiply_adds,
    nodes_at,
    pooling_words,
)
from surgeon.exits.site import exit_or, find_exits
from surgeon.graph.edit import emit, get_attr, set_path
from surgeon.graph.holder import mark_holders
from surgeon.graph.traced import TracedGraph, free_target
from surgeon.passes.blocks import block_layers, stack_of
from surgeon.passes.contract import FitContext, SiteKind
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.passes.trained import TrainedPass
from surgeon.sites.rejection import Rejection
from surgeon.training.exits import train_heads
from surgeon.training.loop import FitReport, RunSettings


@dataclass(frozen=True, kw_only=True)
class EarlyExit(TrainedPass[BlockEnd, str]):
    """Put a head behind each block but the last, and let samples leave at the first head that is sure enough.

    The heads are trained on the frozen model. A head pools the tokens as the model does: it reads the token that the
    model's own classifier reads, or the mean of the real tokens. The method is Zero Time Waste (arXiv 2106.05409):
    every head also reads the answer of the one before it (cascade), and an exit answers with the weighted geometric
    mean of all heads so far (ensemble).

    tau is how unsure an answer may be: a sample leaves where 1 - its largest probability is below tau. It is set, swept
    and tuned like the tau of experts, for all exits or for each. At 0 nothing leaves, and the output is unchanged.
    After lower, later blocks run only for the samples that stay. This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "early-exit"
    works_on: ClassVar[SiteKind] = "block"
    makes: ClassVar[SiteKind | None] = "dynamic"
    must_precede: ClassVar[frozenset[str]] = frozenset({"sparsify-inputs", "sparsify-neurons", "lower"})
    needs_data: ClassVar[bool] = True
    untrained: ClassVar[str] = "The heads were not trained. Run again with data."

    every: int = option(1, "Put an exit behind every so many blocks.", least=1)
    pool: Pooling = option(
        "auto",
        "What a head reads of a sample. first: its first token. mean: the mean of its real tokens. auto: the token "
        "that the model's own classifier reads, or else the mean.",
    )
    width: int | None = option(None, "Width of a hidden layer in every head. By default there is none.", least=1)
    cascade: bool = option(True, "Let every head also read what the head before it answers.")
    ensemble: bool = option(True, "Let an exit answer with the weighted geometric mean of all heads so far.")
    distill: float = option(
        1.0,
        "Share of the loss that is divergence from the model's own answer; the labels have the rest. 1 needs no "
        "labels, and 0 is as published.",
        least=0,
        most=1,
    )
    tau: float = option(0.0, "tau to set after training. Larger values are cheaper.", least=0, most=1)
    epochs: float = option(20.0, "Number of epochs to train the heads. The model runs over the data once.", least=0)
    lr: float = option(1e-3, "Learning rate of AdamW for the heads.", above=0)

    def find(self, graph: GraphModule) -> tuple[Sequence[BlockEnd], list[Rejection]]:
        ends, refused = find_block_ends(graph, block_layers(graph))
        return ends[self.every - 1 :: self.every], refused

    def match(self, graph: GraphModule, site: BlockEnd) -> Rejection | None:
        if find_halts(graph):
            return Rejection("early-exit", "its tokens halt, which a graph does in place of early exits")
        return Rejection("already-done", "the model has early exits") if find_exits(graph) else None

    def observe(
        self, graph: TracedGraph, sites: Sequence[BlockEnd], data: Data | None, settings: RunSettings
    ) -> Mapping[str, str]:
        if self.tau and data is None and not settings.dry_run:
            raise UsageError("early-exit: tau needs heads that were trained, but there is no data. Give data.")
        if not sites:
            return {}
        return dict.fromkeys((site.path for site in sites), free_target(graph, stack_of(sites[0].path), "exits"))

    def rewrite(self, graph: TracedGraph, site: BlockEnd, seen: str) -> SiteChange:
        earlier = nodes_at(graph, LOGITS)
        target = f"{seen}.{len(earlier)}"
        head = make_head(site, self._form, len(earlier), next(graph.parameters()).device)
        head.train(graph.training)
        graph.add_submodule(target, head)
        mark_holders(graph)

        def get(name: str) -> Node:
            return get_attr(graph, f"{target}.{name}")

        def step(op: Any, *args: Any) -> Node:
            return emit(graph, op, *args, path=target)

        with graph.graph.inserting_before(site.output.next):
            features = emit_features(graph, site, self.pool, target)
            own, answered = answer(step, get, features, earlier, self._form)
            set_path(own, f"{target}.{LOGITS}")
        with graph.graph.inserting_before(site.answer.next):
            chosen = emit(graph, exit_or, answered, site.answer, get("tau"), path=target)
        site.answer.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
        count, cost = sum(parameter.numel() for parameter in head.parameters()), multiply_adds(head)
        layer, name, pooled = site.layer, site.output.name, pooling_words(site, self.pool)
        return SiteChange(
            site.path,
            site.describe,
            f"{site.describe}, exit with {site.classes} classes from its {pooled}",
            (layer.parameters, layer.parameters + count),
            (layer.multiply_adds, layer.multiply_adds + cost),
            (name, name),
            made=(target,),
            facts=was_and_is(
                site.facts, {**site.facts, "kind": "early-exit", "classes": site.classes, "reads": pooled}
            ),
        )

    def fit(self, context: FitContext[BlockEnd]) -> FitReport | None:
        """Train the heads on what the frozen model computes on the data, which it runs over once."""
        graph = context.graph
        heads = {change.made[0]: graph.get_submodule(change.made[0]) for _, change in context.changes}
        final = context.changes[0][0].answer.name
        return train_heads(
            graph, heads, final, context.data, self.plan(), context.settings, form=self._form, distill=self.distill
        )

    def finish(
        self, graph: TracedGraph, sites: Sequence[BlockEnd], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        if changes and self.tau and fit is not None:  # a dry run has no heads to be sure by
            set_tau(graph, {change.made[0]: self.tau for change in changes})
        return ()

    @property
    def _form(self) -> HeadPlan:
        return HeadPlan(self.cascade, self.ensemble, self.width)
