"""Replace activation functions, so that hidden neurons can be exactly zero."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from surgeon.described import was_and_is
from surgeon.graph.edit import emit, emit_dropout, erase_unread
from surgeon.graph.traced import TracedGraph, aten, shape_of
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.passes.activation_ops import TARGETS
from surgeon.passes.contract import FitContext, SiteKind
from surgeon.passes.options import PerSite, for_site, option
from surgeon.passes.report import SiteChange
from surgeon.passes.trained import FineTunedPass
from surgeon.sites.ffn import FFN, LayerCall
from surgeon.sites.nonlinearity import HALVES, OTHER
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_ffns
from surgeon.training.finetuning import finetune
from surgeon.training.loop import FitReport
from surgeon.training.observe import layer_sparsity


@dataclass(frozen=True, kw_only=True)
class SwapActivation(FineTunedPass[FFN]):
    """Replace each FFN's activation by ReLU; in a gated FFN, that of the gate (D2DMoE, section 3.1).

    This changes the output of the model. Fine-tune it afterwards: set epochs above 0 here, or run sparsify.
    """

    name: ClassVar[str] = "swap-activation"
    works_on: ClassVar[SiteKind] = "ffn"
    must_precede: ClassVar[frozenset[str]] = frozenset(
        {"sparsify", "moeify", "early-exit", "sparsify-inputs", "sparsify-neurons", "lower", "quantize"}
    )
    preserves: ClassVar[bool] = False
    optional: ClassVar[bool] = True
    untrained: ClassVar[str] = (
        "Nothing was fine-tuned, so the model has not recovered from its new activation. Set epochs above 0 and give "
        "data, or run sparsify afterwards."
    )

    to: PerSite[str] = option("relu", "The new activation.", choices=TARGETS)
    epochs: float = option(0.0, "Number of fine-tuning epochs. 0 trains nothing.", least=0)

    @property
    def will_fit(self) -> bool:
        return self.optimises

    def match(self, graph: GraphModule, site: FFN) -> Rejection | None:
        to = for_site(self.to, site.path)
        if to is None:
            return Rejection("no-value", "the option to has no activation for this site")
        if site.activation == to and site.nonlinearity.slopes is None:
            return Rejection("already-done", f"its activation is already {to}")
        if ACTIVATIONS[site.activation].up is not None:
            return Rejection("both-activated", "both factors of its hidden values are activated")
        for call in site.calls:
            hidden, first = shape_of(call.down.input), shape_of(call.first[0].output)
            if hidden is None or first is None or len(hidden) != len(first):
                return Rejection("changes-shape", "its values change shape between the linear layers")
        return None

    def rewrite(self, graph: TracedGraph, site: FFN, seen: None) -> SiteChange:
        output = ("", "")
        to = for_site(self.to, site.path)
        assert to is not None
        for call in site.calls:
            output = (call.output.name, call.output.name)
            self._swap(graph, site, call, to)
        count, cost = site.parameters(graph), site.multiply_adds
        was = site.activation if site.nonlinearity.slopes is None else "prelu"
        facts = was_and_is(site.facts, {**site.facts, "activation": to})
        return SiteChange(site.path, was, to, (count, count), (cost, cost), output, facts=facts)

    def fit(self, context: FitContext[FFN]) -> FitReport | None:
        """Fine-tune all parameters for the task, so that the model recovers from the new activation."""
        graph, data = context.graph, context.data
        swapped = {site.path for site, _ in context.changes}
        sites = [site for site in find_ffns(graph)[0] if site.path in swapped]
        before = layer_sparsity(context.before, [site for site, _ in context.changes], data)
        report = finetune(
            graph,
            data,
            self.plan(),
            context.settings,
            "swap-activation",
            distill=self.distill,
            distill_layers=self.distill_layers,
            augmentation=self.augmentation,
        )
        after = layer_sparsity(graph, sites, data)
        return dataclasses.replace(report, sparsity={path: (before[path], after[path]) for path in before})

    def _swap(self, graph: TracedGraph, site: FFN, call: LayerCall, to: str) -> None:
        """Rewrite the cone in its simplest form: act(scale · z) · up · scale, then dropout."""
        found, old = site.nonlinearity, call.down.input
        reader = next(iter(node for node in old.users if node in call.down.nodes))
        with graph.graph.inserting_before(reader):

            def step(target: Any, *args: Any) -> Node:
                return emit(graph, target, *args, path=site.path)

            def scaled(value: Node, at: str) -> Node:
                for factor in found.factors:
                    if factor.at == at:
                        constant = (
                            step(aten.logical_not.default, factor.node) if factor.how == "unless" else factor.node
                        )
                        value = step(aten.div.Tensor if factor.how == "over" else aten.mul.Tensor, value, constant)
                return value

            z, up = scaled(call.first[0].output, "first"), call.first[-1].output
            if found.fused is not None:
                rows = HALVES[found.fused](site.hidden), HALVES[OTHER[found.fused]](site.hidden)
                z, up = (step(aten.slice.Tensor, z, -1, part.start, part.stop, part.step or 1) for part in rows)
            z = scaled(z, "z")
            if found.input_scale != 1.0:
                z = step(aten.mul.Tensor, z, found.input_scale)
            value = TARGETS[to](step, z)
            if found.gated:
                value = step(aten.mul.Tensor, value, up)
            if found.output_scale != 1.0:
                value = step(aten.mul.Tensor, value, found.output_scale)
            value = emit_dropout(graph, scaled(value, "after"), site.dropout, path=site.path)
        for user in list(old.users):
            if user in call.down.nodes:
                user.replace_input_with(old, value)
        erase_unread(graph, call.cone)
