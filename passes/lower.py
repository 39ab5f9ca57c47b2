"""Replace each mixture of experts by ops that run only the experts that a token needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from surgeon.described import Fact, was_and_is
from surgeon.dynamic.site import DynamicSite
from surgeon.errors import first_line
from surgeon.exits.halting import HaltSite, find_halts
from surgeon.exits.halting_lowering import BlockPlan, lower_block, plan_block, same_block
from surgeon.exits.heads import multiply_adds
from surgeon.exits.lowering import Plan, plan_skipping, skip_rest
from surgeon.exits.site import ExitSite, find_exits
from surgeon.graph.edit import emit, get_attr, merge_duplicates
from surgeon.graph.holder import parameters_only
from surgeon.graph.traced import TracedGraph, aten, fork, is_call, tensor_of
from surgeon.inputs.neuron_site import SparseNeuronsSite, sparse_neurons
from surgeon.inputs.site import SparseLinearSite, sparse_linear
from surgeon.kernels.sparse_linear import LinearCall
from surgeon.moe.module import MoE
from surgeon.moe.ops import dynamic_k_ffn
from surgeon.moe.site import MoESite, find_moes, router_nodes
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind, SiteRefused
from surgeon.passes.report import SiteChange
from surgeon.sites.rejection import Rejection
from surgeon.tracing.quiet import quiet


@dataclass(frozen=True, kw_only=True)
class Lower(Pass[DynamicSite]):
    """Lower each mixture of experts to `surgeon::dynamic_k_ffn`, which skips the experts below the threshold.

    The router and the threshold become ordinary nodes of the graph; parameters and tau keep their names. Linear layers
    that skip inputs are lowered to `surgeon::sparse_linear`, which reads the rows of the inputs that are left. It gets
    its own copy of a weight that is stored the other way round. Gated layers that skip neurons are lowered to
    `surgeon::sparse_neurons`, which computes the others only. What follows an early exit is computed for the samples
    that stay: the size of the batch depends on the data from there on. The block behind a place where tokens halt is
    computed for the tokens that have not.
    """

    name: ClassVar[str] = "lower"
    works_on: ClassVar[SiteKind] = "dynamic"
    preserves: ClassVar[bool] = True

    def match(self, graph: GraphModule, site: DynamicSite) -> Rejection | None:
        if site.skips:
            return Rejection("already-done", "it is already lowered")
        if isinstance(site, HaltSite):
            plan: object = plan_block(site)
        else:
            plan = plan_skipping(graph, site) if isinstance(site, ExitSite) else None
        return plan if isinstance(plan, Rejection) else None

    def rewrite(self, graph: TracedGraph, site: DynamicSite, seen: None) -> SiteChange:
        if isinstance(site, SparseLinearSite):
            return self._lower_inputs(graph, site)
        if isinstance(site, SparseNeuronsSite):
            return self._lower_neurons(site)
        if isinstance(site, ExitSite):
            return self._lower_exit(graph, site)
        if isinstance(site, HaltSite):
            return self._lower_halting(graph, site)
        names = [self._lower(graph, site, node) for node in site.nodes]
        if site.form == "module":
            # From here on only its parameters matter; the module itself belongs to other copies of the graph too.
            graph.set_submodule(site.path, parameters_only(graph.get_submodule(site.path)))
        # Layers that read the same input may share a router's trunk.
        ops = [node for moe in find_moes(graph) if moe.form == "dynamic" for node in moe.nodes]
        merge_duplicates(graph, {part for node in ops for part in router_nodes(node)})
        parameters = sum(parameter.numel() for parameter in graph.get_submodule(site.path).parameters())
        return SiteChange(
            site.path,
            "masked experts",
            "dynamic_k_ffn",
            (parameters, parameters),
            (site.multiply_adds, site.multiply_adds),
            (site.nodes[-1].name, names[-1]),
            made=(site.path,),
            facts=_lowered(site),
        )

    def _lower_inputs(self, graph: TracedGraph, site: SparseLinearSite) -> SiteChange:
        call = LinearCall(*site.nodes[0].args)  # type: ignore[arg-type]
        weight = call.weight
        assert isinstance(weight, Node)
        if is_call(weight, aten.t.default):
            rows = weight.args[0]
            assert isinstance(rows, Node)
            target = str(rows.target)
        else:
            tensor = tensor_of(graph, weight)
            assert tensor is not None
            holder, target = parameters_only(graph.get_submodule(site.path)), f"{site.path}.weight"
            own = nn.Parameter(tensor.detach().t().contiguous(), requires_grad=tensor.requires_grad)
            holder.register_parameter("weight", own)
            graph.set_submodule(site.path, holder)
        for node in site.nodes:
            with graph.graph.inserting_before(node):
                node.update_arg(1, get_attr(graph, target))
            node.target = sparse_linear
        count = site.parameters
        return SiteChange(
            site.path,
            "masked inputs",
            "sparse_linear",
            (count, count),
            (site.multiply_adds, site.multiply_adds),
            (site.output.name, site.output.name),
            made=(site.path,),
            facts=_lowered(site),
        )

    def _lower_neurons(self, site: SparseNeuronsSite) -> SiteChange:
        for node in site.nodes:
            node.target = sparse_neurons
        return SiteChange(
            site.path,
            "masked neurons",
            "sparse_neurons",
            (site.parameters, site.parameters),
            (site.multiply_adds, site.multiply_adds),
            (site.output.name, site.output.name),
            made=(site.path,),
            facts=_lowered(site),
        )

    def _lower_exit(self, graph: TracedGraph, site: ExitSite) -> SiteChange:
        # What was found before other sites were lowered is no longer there.
        site = next(found for found in find_exits(graph) if found.path == site.path)
        with quiet():
            self._try(fork(graph), site.path)
        merged = self._try(graph, site.path)
        head = graph.get_submodule(site.path)
        count = sum(parameter.numel() for parameter in head.parameters())
        cost = multiply_adds(head)
        return SiteChange(
            site.path,
            "the rest runs for all samples",
            "rows_that_stay",
            (count, count),
            (cost, cost),
            (site.output.name, merged.name),
            made=(site.path,),
            facts=_lowered(site),
        )

    def _try(self, graph: TracedGraph, path: str) -> Node:
        """Lower an exit. An op that needs to know how many samples stay shows only now."""
        site = next(found for found in find_exits(graph) if found.path == path)
        plan = plan_skipping(graph, site)
        assert isinstance(plan, Plan)
        try:
            return skip_rest(graph, site, plan)
        except GuardOnDataDependentSymNode as error:
            reason = "an op that follows needs the size of the batch as a number, which depends on the data here"
            raise SiteRefused("needs-batch-size", reason) from error

    def _lower_halting(self, graph: TracedGraph, site: HaltSite) -> SiteChange:
        def lowered(work: TracedGraph) -> Node:
            found = next(one for one in find_halts(work) if one.path == site.path)
            plan = plan_block(found)
            assert isinstance(plan, BlockPlan)
            return lower_block(work, found, plan)

        why = "an op of the block needs the number of tokens as a number, which depends on the data here"
        with quiet():
            try:
                trial = fork(graph)
                lowered(trial)
                right = same_block(graph, trial, site.path)
            except Exception as error:  # whatever the ops of the block raise at sizes that are not known
                raise SiteRefused("needs-length", f"{why}: {first_line(error)}") from error
            if not right:
                raise SiteRefused("needs-length", why)
            tokens = lowered(graph)
        cost = (site.multiply_adds, site.multiply_adds)
        return SiteChange(
            site.path,
            "the block runs for all tokens",
            "tokens_that_stay",
            (0, 0),
            cost,
            (site.output.name, tokens.name),
            made=(site.path,),
            facts=_lowered(site),
        )

    def _lower(self, graph: TracedGraph, site: MoESite, node: Node) -> str:
        if site.form == "masked":
            node.target = dynamic_k_ffn
            return node.name
        module = graph.get_submodule(site.path)
        assert isinstance(module, MoE)
        x = node.args[0]
        assert isinstance(x, Node)
        with graph.graph.inserting_before(node):

            def parameter(name: str) -> Node | None:
                return None if getattr(module, name) is None else get_attr(graph, f"{site.path}.{name}")

            def step(target: object, *args: object, part: str = "router") -> Node:
                return emit(graph, target, *args, path=f"{site.path}.{part}" if part else site.path)

            def linear(name: str, x: object) -> Node:
                weights = ["weight", "bias"] if module.router.get_submodule(name).bias is not None else ["weight"]
                return step(
                    aten.linear.default, x, *(get_attr(graph, f"{site.path}.router.{name}.{part}") for part in weights)
                )

            scores = module.router.steps(step, x, linear)
            scores, threshold = module.select(step, scores, get_attr(graph, f"{site.path}.tau"))
            weights = [parameter(name) for name in ("w1", "b1", "gate", "b_gate", "w2", "b2")]
            lowered = step(dynamic_k_ffn, x, scores, threshold, *weights, module.activation, part="")
        node.replace_all_uses_with(lowered)
        graph.graph.erase_node(node)
        return lowered.name


def _lowered(site: DynamicSite) -> dict[str, tuple[Fact, Fact]]:
    return was_and_is({**site.facts, "skips": False}, {**site.facts, "skips": True})
