"""Let linear layers skip the inputs that are near their usual value, with thresholds from data and without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.data.data import Data
from surgeon.described import Facts, was_and_is
from surgeon.dynamic.knobs import nothing_skipped
from surgeon.graph.edit import emit, erase_unread, get_attr, replace_value
from surgeon.graph.holder import mark_holders
from surgeon.graph.traced import TracedGraph, aten, free_target
from surgeon.inputs.calibration import Calibration, calibrate, in_groups
from surgeon.inputs.module import LEVELS
from surgeon.inputs.site import find_sparse_linears, masked_linear
from surgeon.inputs.skipping import SkippingSite
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind, SiteRefused
from surgeon.passes.options import PerSite, for_site, option
from surgeon.passes.report import SiteChange
from surgeon.sites.linear import Linear
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.rejection import Rejection
from surgeon.sites.soundness import not_finite
from surgeon.training.loop import RunSettings
from surgeon.training.observe import collect_calls

# Tokens to calibrate on.
_TOKENS = 4096

Criterion = Literal["weighted", "magnitude"]
Site = TypeVar("Site", bound=SkippingSite)


@dataclass(frozen=True, kw_only=True)
class SparsifyInputs(Pass[LinearSite, Calibration | Rejection | None]):
    """Let linear layers skip, for each token, the inputs that matter least. Nothing is trained.

    An input matters if it is far from its centre, and if the weight's column that it meets is large. What is skipped
    is replaced by the centre, whose product with the weight is part of the bias, so that it costs nothing. Centres and
    thresholds come from a few thousand tokens of data.

    tau is the share of the inputs to skip, as it was on these data. It is set, swept and tuned like the tau of experts,
    and at 0 the output is that of the dense layer. `surgeon tune` finds a tau for each layer within a budget.

    The pass works on every linear layer that is left: projections, feed-forward layers that were not split, heads. Put
    it after moeify to combine both. With centre=false, criterion=magnitude is TEAL (arXiv 2408.14690), and
    criterion=weighted is WINA (arXiv 2505.19427). This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "sparsify-inputs"
    works_on: ClassVar[SiteKind] = "any-linear"
    makes: ClassVar[SiteKind | None] = "dynamic"
    must_precede: ClassVar[frozenset[str]] = frozenset({"lower"})
    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    criterion: Criterion = option(
        "weighted", "How an input's distance counts: weighted by the norm of its weights, or by its magnitude alone."
    )
    centre: bool = option(True, "Measure how far inputs are from what is usual in place of from zero.")
    tau: PerSite[float] = option(
        0.0, "Share of the inputs to skip, or values by path. It can be changed later.", least=0, most=1
    )

    def find(self, graph: GraphModule) -> tuple[Sequence[LinearSite], list[Rejection]]:
        sites, rejected = super().find(graph)
        done = [
            Rejection("already-done", "it already skips inputs", site.path.rpartition(".")[0], site.output.name)
            for site in find_sparse_linears(graph)
        ]
        return sites, [*rejected, *done]

    def match(self, graph: GraphModule, site: LinearSite) -> Rejection | None:
        return not_finite(graph, site.calls[:1])

    def keeps_output(self, fitted: bool) -> bool:
        return not any(self.tau.values() if isinstance(self.tau, dict) else [self.tau])

    def observe(
        self, graph: TracedGraph, sites: Sequence[LinearSite], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Calibration | Rejection]:
        if data is None:
            return {}
        found: dict[str, Calibration | Rejection] = {}
        for part in in_groups(sites, _TOKENS):
            names = {site.path: [call.input.name for call in site.calls] for site in part}
            values = collect_calls(graph, names, data, tokens=_TOKENS, progress=settings.progress)
            for site in part:
                x, weight = values[site.path], site.calls[0].weight_rows(graph)
                if bool(torch.isfinite(x).all()):
                    found[site.path] = calibrate(x, weight, weighted=self.criterion == "weighted", centred=self.centre)
                else:
                    found[site.path] = Rejection("not-finite", "its inputs on the data contain NaN or infinity")
        return found

    @torch.no_grad()
    def rewrite(self, graph: TracedGraph, site: LinearSite, seen: Calibration | Rejection | None) -> SiteChange:
        if isinstance(seen, Rejection):
            raise SiteRefused(seen.code, seen.reason)
        call, tau = site.calls[0], for_site(self.tau, site.path) or 0.0
        weight, bias = call.weight_rows(graph), call.bias_vector(graph)
        seen = seen or Calibration(None, None, torch.zeros(LEVELS, device=weight.device))
        holder = nn.Module()
        if seen.centre is not None:
            # In float64, since it has to undo what the centre takes away.
            moved = weight.double() @ seen.centre.double()
            bias = (moved if bias is None else bias.double() + moved).to(weight.dtype)
        holder.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))
        values = {"scale": seen.scale, "centre": seen.centre, "levels": seen.levels, "tau": torch.tensor(tau)}
        for name, value in values.items():
            holder.register_buffer(name, None if value is None else value.float().to(weight.device))
        target = free_target(graph, site.path, "inputs")
        graph.add_submodule(target, holder)
        output = ("", "")
        for one in site.calls:
            output = (one.output.name, self._replace(graph, one, target, holder).name)
        mark_holders(graph)
        before = weight.numel() + (0 if call.bias is None else site.d_out)
        after = weight.numel() + (0 if bias is None else site.d_out)
        words = f"{site.d_in} inputs → {site.d_out}" + (f", {tau:.0%} skipped" if tau else "")
        cost = site.multiply_adds
        now: Facts = {"kind": "skips-inputs", "d_in": site.d_in, "d_out": site.d_out, "rank": 0, "skipped": tau}
        return SiteChange(
            site.path, site.describe, words, (before, after), (cost, cost), output, made=(target,),
            facts=was_and_is(site.facts, now),
        )  # fmt: skip

    def _replace(self, graph: TracedGraph, call: Linear, target: str, holder: nn.Module) -> Node:
        with graph.graph.inserting_before(call.core):

            def tensor(name: str) -> Node | None:
                return None if getattr(holder, name) is None else get_attr(graph, f"{target}.{name}")

            weight = get_attr(graph, str(call.weight.target))
            if call.transposed:
                weight = emit(graph, aten.t.default, weight, path=target)
            given = [tensor(name) for name in ("bias", "scale", "centre", "levels", "tau")]
            value = emit(graph, masked_linear, call.input, weight, *given, path=target)
        replace_value(call.output, value, call.input, call.nodes)
        erase_unread(graph, call.nodes)
        return value


def dense_inputs(
    graph: TracedGraph, sites: Sequence[Site], data: Data, settings: RunSettings, *, tokens: int = _TOKENS
) -> Iterator[tuple[Site, Tensor]]:
    """Yield every layer that skips with its inputs [N, d_in] on the data, while no layer skips inputs or neurons."""
    for part in in_groups(sites, tokens):
        names = {site.path: [str(node.args[0].name) for node in site.nodes] for site in part}  # type: ignore[union-attr]
        with nothing_skipped(graph):
            found = collect_calls(graph, names, data, tokens=tokens, progress=settings.progress)
        for site in part:
            yield site, found[site.path]


@torch.no_grad()
def recalibrate(graph: TracedGraph, sites: Sequence[SkippingSite], data: Data, settings: RunSettings) -> None:
    """Measure again which scores inputs or neurons have, so that tau stays the share that is skipped after training."""
    for site, x in dense_inputs(graph, sites, data, settings):
        site.levels.copy_(site.levels_on(x))
