"""Let tokens of a classifier stop behind the block at which they have been computed for long enough."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.described import was_and_is
from surgeon.dynamic.knobs import set_tau
from surgeon.exits.attention import find_attention, mask_attention
from surgeon.exits.blocks import BlockEnd, find_block_ends
from surgeon.exits.halting import find_halts, halting_total, keep_halted, mean_field, stands_for
from surgeon.exits.site import find_exits
from surgeon.graph.edit import emit, get_attr
from surgeon.graph.holder import mark_holders
from surgeon.graph.ops import equal_size
from surgeon.graph.traced import TracedGraph, free_target, is_call
from surgeon.passes.blocks import block_layers, stack_of
from surgeon.passes.contract import FitContext, SiteKind
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.passes.trained import FineTunedPass
from surgeon.sites.rejection import Rejection
from surgeon.training.finetuning import finetune
from surgeon.training.halting import HaltingLoss
from surgeon.training.loop import FitReport, RunSettings


@dataclass(frozen=True)
class HaltPlan:
    """What a place has to know of the others.

    target: where its tau, γ and β go. end: the end of the block behind it, up to where its tokens matter.
    attention: the nodes in between at which keys are masked. last: the end of the last block.
    """

    target: str
    end: Node
    attention: tuple[Node, ...]
    last: Node


@dataclass(frozen=True, kw_only=True)
class HaltTokens(FineTunedPass[BlockEnd, HaltPlan]):
    """Let a token halt behind the block at which its halting scores add up to 1, and fine-tune for few blocks.

    The method is A-ViT (arXiv 2112.07658). Behind every block but the last, the score of a token is a sigmoid of one
    element of its embedding. Later blocks do not update a token that has halted, and no other token attends to it. What
    follows the last block reads the sum over the blocks of the tokens behind each, weighted by their scores. The loss
    is that of the task, plus the mean number of blocks that a token runs, plus how far the scores' distribution over
    the blocks is from a Gaussian.

    Scores are multiplied by tau / (1 - tau). At tau 1/2 the method is that of the paper, and it is trained there. At 0
    nothing halts, and what follows reads the tokens of the last block alone. A larger tau halts earlier. This pass is
    not part of D2DMoE.
    """

    name: ClassVar[str] = "halt-tokens"
    works_on: ClassVar[SiteKind] = "block"
    makes: ClassVar[SiteKind | None] = "dynamic"
    must_precede: ClassVar[frozenset[str]] = frozenset(
        {"moeify", "early-exit", "sparsify-inputs", "sparsify-neurons", "lower", "quantize"}
    )
    needs_data: ClassVar[bool] = True
    untrained: ClassVar[str] = "Nothing was fine-tuned, so tau is 0 and no token halts. Run again with data."

    gamma: float = option(5.0, "The first element of a token is multiplied by it, to make a score.", above=0)
    beta: float = option(-10.0, "It is added to that. A larger beta halts earlier.")
    ponder: float = option(5e-4, "Weight of the number of blocks that a token runs, plus its remainder.", least=0)
    prior: float = option(0.1, "Weight of the divergence of the scores' distribution from a Gaussian.", least=0)
    depth: float | None = option(
        None, "Block at the centre of the Gaussian, which has deviation 1. By default two thirds of them.", above=0
    )
    tau: float = option(0.5, "tau to train at and to keep. 1/2 is as published.", above=0, below=1)
    epochs: float = option(20.0, "Number of fine-tuning epochs.", least=0)

    def keeps_output(self, fitted: bool) -> bool:
        return not fitted

    def find(self, graph: GraphModule) -> tuple[Sequence[BlockEnd], list[Rejection]]:
        ends, refused = _ends(graph)
        if find_halts(graph):  # `match` says so
            return ends, []
        sites: list[BlockEnd] = []
        later: Rejection | None = None
        for site, following in reversed(list(itertools.pairwise(ends))):
            why = later or _unlike(site.output, following.output)
            if why is None:
                found = find_attention(graph, site.output, following.output)
                why = found if isinstance(found, Rejection) else None
            if why is None:
                sites.insert(0, site)
                continue
            refused.append(dataclasses.replace(why, path=site.path))
            # A token that halted stays halted.
            later = later or Rejection(why.code, f"in the block behind {site.path}, {why.reason}")
        return sites, refused

    def match(self, graph: GraphModule, site: BlockEnd) -> Rejection | None:
        if find_halts(graph):
            return Rejection("already-done", "its tokens halt")
        if find_exits(graph):
            return Rejection("early-exit", "samples leave the model, which a graph does in place of token halting")
        return None

    def observe(
        self, graph: TracedGraph, sites: Sequence[BlockEnd], data: Data | None, settings: RunSettings
    ) -> Mapping[str, HaltPlan]:
        if not sites:
            return {}
        last = _ends(graph)[0][-1].output
        target = free_target(graph, stack_of(sites[0].path), "halting")
        plans = {}
        for number, (site, end) in enumerate(zip(sites, [*(one.output for one in sites[1:]), last], strict=True)):
            attention = find_attention(graph, site.output, end)
            assert not isinstance(attention, Rejection)
            plans[site.path] = HaltPlan(f"{target}.{number}", end, tuple(attention), last)
        return plans

    def rewrite(self, graph: TracedGraph, site: BlockEnd, seen: HaltPlan) -> SiteChange:
        path = seen.target
        earlier = find_halts(graph)
        device = next(graph.parameters()).device
        knob = nn.Module()
        knob.register_buffer("tau", torch.tensor(0.0, device=device))
        knob.register_buffer("gate", torch.tensor([self.gamma, self.beta], device=device))
        graph.add_submodule(path, knob)
        mark_holders(graph)
        tokens = stands_for(site.output)
        before = earlier[-1].total if earlier else None
        with graph.graph.inserting_before(tokens.next):
            gate, tau = get_attr(graph, f"{path}.gate"), get_attr(graph, f"{path}.tau")
            total = emit(graph, halting_total, tokens, before, gate, tau, path=path)
        mask_attention(graph, seen.attention, total, path)
        with graph.graph.inserting_before(seen.end.next):
            kept = emit(graph, keep_halted, seen.end, tokens, total, path=path)
        seen.end.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
        self._weigh(graph, seen.last, tokens, total, path)
        layer, name = site.layer, site.output.name
        return SiteChange(
            site.path,
            site.describe,
            f"{site.describe}, behind which tokens halt",
            (layer.parameters, layer.parameters),
            (layer.multiply_adds, layer.multiply_adds),
            (name, name),
            made=(path,),
            facts=was_and_is(site.facts, {**site.facts, "kind": "token-halting"}),
        )

    def _weigh(self, graph: TracedGraph, last: Node, tokens: Node, total: Node, path: str) -> None:
        """Let what follows the last block read the tokens behind each, weighted by their scores."""
        end = stands_for(last)
        field = next((user for user in end.users if is_call(user, mean_field)), None)
        if field is not None:
            behind, totals = cast("tuple[list[Node], list[Node]]", field.args)
            field.args = ([*behind[:-1], tokens, end], [*totals, total])
            return
        with graph.graph.inserting_before(end.next):
            field = emit(graph, mean_field, [tokens, end], [total], path=path)
        end.replace_all_uses_with(field, delete_user_cb=lambda user: user is not field)

    def fit(self, context: FitContext[BlockEnd]) -> FitReport | None:
        """Fine-tune all parameters with task loss + ponder · blocks that a token runs + prior · divergence."""
        graph = context.graph
        set_tau(graph, {change.made[0]: self.tau for _, change in context.changes})
        sites = find_halts(graph)
        field = next(node for node in graph.graph.find_nodes(op="call_function", target=mean_field))
        last = cast("list[Node]", field.args[0])[-1]
        blocks, changed = [end.path for end in _ends(context.before)[0]], {site.path for site, _ in context.changes}
        places = [number for number, path in enumerate(blocks, 1) if path in changed]
        loss = HaltingLoss(
            graph.get_buffer(f"{sites[-1].path}.gate"), places, len(blocks), self.ponder, self.prior, self.depth
        )

        def penalise(batch: Batch, values: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, float]]:
            return loss(batch, [values[site.total.name] for site in sites], values[last.name], sites[-1].tau)

        return finetune(
            graph,
            context.data,
            self.plan(),
            context.settings,
            self.name,
            watched=[*(site.total.name for site in sites), last.name],
            penalise=penalise,
            distill=self.distill,
            distill_layers=self.distill_layers,
            augmentation=self.augmentation,
        )


def _ends(graph: GraphModule) -> tuple[list[BlockEnd], list[Rejection]]:
    """The ends of all blocks. Without that of the last one there are none: what follows reads it."""
    layers = block_layers(graph)
    ends, refused = find_block_ends(graph, layers, last=True)
    if ends and any(rejection.node == layers[-1].output.name for rejection in refused):
        return [], refused
    return ends, refused


def _unlike(one: Node, other: Node) -> Rejection | None:
    """Why the tokens at two places are not the same ones."""
    pairs = zip(one.meta["val"].shape, other.meta["val"].shape, strict=True)
    if all(equal_size(a, b) for a, b in pairs) and one.meta["val"].dtype == other.meta["val"].dtype:
        return None
    return Rejection("tokens-change", "the number of tokens, their width or their number type changes")
