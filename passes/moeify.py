"""Split each feed-forward layer into experts with a router that predicts the size of every expert's output.

Balanced clusters of neurons become experts (D2DMoE, section 3.2, after MoEfication). The router regresses the norms of
the experts' outputs (section 3.3). At run time a rule selects experts by the scores and tau (section 3.4, see
`kernels.selection`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.data.data import Data
from surgeon.described import Facts, was_and_is
from surgeon.dynamic.knobs import set_tau
from surgeon.errors import UsageError
from surgeon.graph.traced import TracedGraph, free_target
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.scores import Output
from surgeon.kernels.selection import RULES
from surgeon.moe.filling import mark_filling
from surgeon.moe.module import MoE
from surgeon.moe.router import Goal, Labels, Objective, Router
from surgeon.moe.site import find_moes
from surgeon.moe.sizes import usual_size, usual_width
from surgeon.moe.split import Split, markers, neuron_features, output_sizes, representatives, split_neurons
from surgeon.moe.trunks import trunk_groups, trunk_of
from surgeon.passes.contract import FitContext, SiteKind, SiteRefused
from surgeon.passes.options import PerSite, for_site, option
from surgeon.passes.report import SiteChange
from surgeon.passes.trained import TrainedPass
from surgeon.sites.ffn import FFN, FFNWeights
from surgeon.sites.rejection import Rejection
from surgeon.sites.replace import replace_call
from surgeon.sites.soundness import not_finite
from surgeon.training.loop import FitReport, RunSettings
from surgeon.training.observe import collect_calls
from surgeon.training.routers import by_trunk, fit_from_neurons, running_at, train_routers

log = logging.getLogger("surgeon")

RouterKind = Literal["trained", "neurons", "centres", "representatives"]
RouterOutput = Literal["auto", "abs", "relu", "softplus"]

# How many tokens neurons are compared on.
_SPLIT_TOKENS = 4096


@dataclass(frozen=True)
class _Seen:
    """What is known about a site before it is rewritten.

    router_width: the width of its router's trunk, None if it has none. x: its inputs [N, d_in], if there is data.
    group: paths of the sites that share the trunk, itself included.
    """

    router_width: int | None
    x: Tensor | None
    group: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Moeify(TrainedPass[FFN, _Seen]):
    """Split each FFN into experts of equal size and train a router for it (D2DMoE, sections 3.2 to 3.4).

    If the hidden width is not a multiple of the size, neurons that never fire fill up the last expert. They cost
    nothing in all counts.

    With tau = 0, the default, every expert runs and the output is unchanged, whether the routers are trained or not.
    """

    name: ClassVar[str] = "moeify"
    works_on: ClassVar[SiteKind] = "ffn"
    makes: ClassVar[SiteKind | None] = "moe"
    # After sparsify-inputs there are no feed-forward layers left.
    must_precede: ClassVar[frozenset[str]] = frozenset({"sparsify-inputs", "lower"})
    preserves: ClassVar[bool] = True
    optional: ClassVar[bool] = True
    wrong_options: ClassVar[frozenset[str]] = frozenset({"too-few-neurons"})
    for_training: ClassVar[frozenset[str]] = frozenset({"exposure", "underestimate"})
    untrained: ClassVar[str] = (
        "The routers were not trained: every expert runs and the output is unchanged. To make the model cheaper, run "
        "again with data, then set tau."
    )

    experts: PerSite[int] | None = option(
        None,
        "Number of experts in each layer. By default experts have about 32 neurons.",
        least=1,
    )
    expert_size: PerSite[int] | None = option(
        None, "Number of neurons in each expert, instead of the number of experts.", least=1
    )
    split: Split = option(
        "auto",
        "How neurons are grouped. weights: by similar weight rows (as published, but balanced by our own assignment "
        "instead of the exact solver). activations: by neurons that fire together on the data. markers: by neurons "
        "that are among the largest of the same tokens, around the most active ones (CMoE, with the same assignment). "
        "random: at random. auto: activations with data, otherwise weights.",
    )
    marked: int = option(
        10,
        "With split=markers, how many neurons are the largest of a token. Inputs and weight rows count with length 1.",
        least=1,
    )
    shared: int = option(
        0,
        "Number of experts that always run (needs data). They get the neurons that are active most often. A neuron is "
        "active if its share of the output is above a tenth of the token's largest, or with split=markers if it is "
        "marked. E in rule=top_k counts routed experts only.",
        least=0,
    )
    router: RouterKind = option(
        "neurons",
        "How the router starts before it is trained. neurons: closed form, from the layer's own neurons. trained: "
        "random weights (as published, with objective=norm, split=weights, router_width=128, share_trunk=false). "
        "centres: the means of the experts' normalised weight rows (MoEfication, with objective=activation). "
        "representatives: the size of one hidden value per expert, that of the neuron nearest to what its neurons have "
        "in common (CMoE, with split=markers). All but trained also work with epochs=0.",
    )
    router_depth: int = option(
        2,
        "Number of linear layers in the router: 2 or 1. A single layer has no hidden width and no trunk to share.",
        choices=(1, 2),
    )
    router_width: int | None = option(
        None,
        "Hidden width of the router. By default the router costs 2.5% of what it routes, with a width from 8 to 128.",
        least=1,
    )
    router_output: RouterOutput = option(
        "auto",
        "Function that makes the scores non-negative: abs (as published), relu or softplus. It can be set only with "
        "router=trained and objective=norm or relative, where auto is abs.",
    )
    share_trunk: bool = option(
        True, "Share one trunk among the routers of an attention's replaced projections that read the same input."
    )
    objective: Objective = option(
        "relative",
        "What the router predicts. relative: norms of the experts' outputs, relative to the token's largest. norm: the "
        "norms themselves (as published). log: the logarithm of relative, with a floor of 1% of the largest. "
        "activation: sums of activations, by cross entropy (MoEfication). router=neurons needs relative, and "
        "router=centres needs activation.",
    )
    labels: Labels = option(
        "output",
        "Norms to predict: those of an expert's outputs (output, as published) or of its activations (hidden).",
    )
    layer_by_layer: bool = option(
        False,
        "Fit the routers of one layer after another. This needs less memory and runs the model more often.",
    )
    underestimate: float = option(
        1.0, "Weight of errors where the score is too low. Other errors have weight 1.", above=0
    )
    exposure: float = option(
        0.0,
        "The model's tau while its routers are trained. 0 is the dense model. With router=neurons it applies only to "
        "the training after the closed form.",
        least=0,
        most=1,
    )
    rule: str = option(
        "max",
        "How scores and tau select experts. max: skip scores below tau times the largest. cumulative: skip the "
        "smallest scores whose sum is less than tau of the total. energy: the same with squared scores and tau². "
        "top_k: skip the smallest tau · E of E scores.",
        choices=RULES,
    )
    tau: float = option(
        0.0,
        "tau to set after fitting (needs data). 0 runs every expert, and larger values are cheaper. See rule.",
        least=0,
        most=1,
    )
    epochs: float = option(
        8.0, "Number of epochs to train the routers. The model runs over the data once. 0 trains nothing.", least=0
    )
    lr: float = option(1e-3, "Learning rate of AdamW for the routers.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.optimises and self.router == "trained":
            raise UsageError(
                "moeify: epochs is 0, so router=trained would stay random. Set epochs above 0 or choose another router."
            )
        if self.experts is not None and self.expert_size is not None:
            raise UsageError(
                "moeify: give experts or expert_size, not both. Set one to none to drop what a recipe sets."
            )
        if self.underestimate != 1.0 and self.objective == "activation":
            raise UsageError(
                "moeify: underestimate weights the errors of a regression, but objective=activation is not one. "
                "Drop one of them."
            )
        if self.router == "neurons" and self.objective != "relative":
            raise UsageError(f"moeify: objective={self.objective} needs router=trained.")
        if self.router == "centres" and self.objective != "activation":
            raise UsageError("moeify: router=centres needs objective=activation, because it scores by activations.")
        if self.objective == "activation" and self.labels != "output":
            raise UsageError(
                "moeify: labels chooses norms to predict, but objective=activation predicts sums. Drop one of them."
            )
        if self.router == "representatives" and self.objective not in ("norm", "relative"):
            raise UsageError(
                f"moeify: objective={self.objective} needs another output than sizes of hidden values. Choose another "
                "router."
            )
        if self.marked != type(self).marked and self.split != "markers":
            raise UsageError("moeify: marked only has an effect with split=markers. Drop it, or choose that split.")
        if self.router_depth == 1 and self.router == "neurons":
            raise UsageError("moeify: router=neurons has two layers. For router_depth=1 choose router=trained.")
        if self.router_output != "auto" and (self.router != "trained" or self.objective not in ("norm", "relative")):
            raise UsageError(
                "moeify: router_output can be set only with router=trained and objective=norm or relative. All other "
                "choices fix it."
            )
        if self.router_width is not None and (self.router_depth == 1 or self.router in ("centres", "representatives")):
            what = (
                "router=centres sets it itself"
                if self.router == "centres" and self.router_depth == 2
                else "a router of one layer has no hidden width"
            )
            raise UsageError(f"moeify: router_width is {self.router_width}, but {what}.")

    def match(self, graph: GraphModule, site: FFN) -> Rejection | None:
        refused = not_finite(graph, site.linears)
        if refused is not None:
            return refused
        count, size = for_site(self.experts, site.path), for_site(self.expert_size, site.path)
        if count is not None and count > site.neurons:
            return Rejection("too-few-neurons", f"{count} experts were asked for, but it has {site.neurons} neurons")
        if size is not None and size > site.neurons:
            what = f"experts of {size} neurons were asked for, but it has {site.neurons} neurons"
            return Rejection("too-few-neurons", what)
        if self.split == "markers" and self.marked >= site.neurons:
            what = f"{self.marked} neurons of each token would be marked, but it has {site.neurons} neurons"
            return Rejection("too-few-neurons", what)
        experts, _ = self._shape(site)
        if self.shared >= experts:
            what = f"{self.shared} of its {experts} experts would always run, which leaves none to route"
            return Rejection("nothing-to-route", what)
        return None

    def router_widths(self, graph: GraphModule) -> set[int]:
        """The widths of the trunks that routers would have in a graph; none of routers that are linear or centres."""
        if self.router in ("centres", "representatives"):
            return set()
        widths = {self._width(group) for group in self._groups(graph, self.find(graph)[0])}
        return {width for width in widths if width is not None}

    @property
    def why_data(self) -> str:
        return "tau needs routers that were fitted" if self.tau else ""

    def observe(
        self, graph: TracedGraph, sites: Sequence[FFN], data: Data | None, settings: RunSettings
    ) -> Mapping[str, _Seen]:
        if self.why_data and data is None and not settings.dry_run:
            raise UsageError(f"moeify: {self.why_data}, but there is no data. Give data, or set tau later.")
        needs_data = self.split in ("activations", "markers") or self.shared
        looks = needs_data or self.split == "auto"
        inputs: dict[str, Tensor] = {}
        if looks and data is not None and sites:
            names = {site.path: [call.x.name for call in site.calls] for site in sites}
            inputs = collect_calls(graph, names, data, tokens=_SPLIT_TOKENS, progress=settings.progress)
        elif needs_data and sites and not settings.dry_run:
            raise UsageError(
                "moeify: split=activations, split=markers and shared need data to see which neurons are active. Give "
                "data."
            )
        return {
            site.path: _Seen(self._width(group), inputs.get(site.path), tuple(member.path for member in group))
            for group in self._groups(graph, sites)
            for site in group
        }

    def rewrite(self, graph: TracedGraph, site: FFN, seen: _Seen) -> SiteChange:
        weights, (experts, size) = site.weights(graph), self._shape(site)
        active = None if seen.x is None else self._active(weights, site.activation, seen.x)
        if active is not None and not bool(torch.isfinite(active).all()):
            raise SiteRefused("not-finite", "its hidden values on the data contain NaN or infinity")
        log.info("moeify: %s, %d experts of %d neurons", site.path, experts, size)
        labels = split_neurons(
            weights, experts, size,
            split=self.split, shared=self.shared, active=active, seed=torch.initial_seed() % 2**31,
        )  # fmt: skip
        router = self._router(site, weights, experts, seen.router_width)
        if self.router == "representatives":
            chosen = representatives(neuron_features(weights, self.split, active), labels, self.shared)
            router.start_from_neurons(chosen, weights)
        moe = MoE(weights, labels, experts, site.activation, router, shared=self.shared)
        moe.rule = self.rule
        trunk = trunk_of(graph, site, seen.group) if len(seen.group) > 1 else None
        if trunk is not None:
            assert router.fc1 is not None
            router.fc1.weight, router.fc1.bias = trunk.weight, trunk.bias
        if self.router == "centres":
            rows = moe.routed.w1 if moe.routed.gate is None else moe.routed.gate
            router.start_from_centres(rows.detach())
        moe.train(graph.training)
        path = free_target(graph, site.path, "moe")
        graph.add_submodule(path, moe)
        mark_filling(graph, path, experts * size - len(labels))
        names = [replace_call(graph, call, path) for call in site.calls]
        after = next(found for found in find_moes(graph) if found.path == path)
        parameters = sum(p.numel() for p in moe.parameters()) - sum(
            p.numel() for p in ([] if trunk is None else trunk.parameters())
        )
        added: Facts = {"router_width": seen.router_width or None, "shares_router": trunk is not None}
        return SiteChange(
            site.path,
            site.describe,
            f"{after.describe}, router {'shared' if trunk is not None else seen.router_width or 'linear'}",
            (site.parameters(graph), parameters),
            (site.multiply_adds, after.multiply_adds),
            (site.calls[-1].output.name, names[-1]),
            made=(path,),
            facts=was_and_is(site.facts, {**after.facts, **added}),
        )

    def fit(self, context: FitContext[FFN]) -> FitReport | None:
        """Fit the routers to the experts' outputs on the inputs that the layers get, all at once or layer by layer."""
        graph, inputs = context.before, {}
        paths: dict[MoE, str] = {}
        for site, change in context.changes:
            moe = context.graph.get_submodule(change.made[0])
            assert isinstance(moe, MoE)
            paths[moe], inputs[moe] = site.path, [call.x.name for call in site.calls]
        parts = self._parts(paths)
        if self.router == "neurons":
            for _, _, part in parts:
                of_part = {moe: inputs[moe] for moe in part}
                fit_from_neurons(graph, of_part, context.data, context.settings)
        if not self.optimises:
            return FitReport(0, 0.0, 0.0, ())
        if self.exposure:
            # The inputs come from the sparse model instead of the original one.
            graph = context.graph
            inputs = dict(zip(paths, (_read(graph, change.made[0]) for _, change in context.changes), strict=True))
        with running_at(self.exposure, paths):
            reports = [
                train_routers(
                    graph,
                    {moe: inputs[moe] for moe in part},
                    context.data,
                    self.plan(),
                    context.settings,
                    key,
                    label=label,
                    exposed=bool(self.exposure),
                )
                for key, label, part in parts
            ]
        return FitReport.merged(reports)

    def finish(
        self, graph: TracedGraph, sites: Sequence[FFN], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        notes = []
        if changes and self.tau and fit is not None:  # a dry run has no routers to skip by
            set_tau(graph, {change.made[0]: self.tau for change in changes})
        if any(site.dropout for site in sites):
            notes.append("The experts drop the dropout between the linear layers. It only matters in training.")
        modules = [graph.get_submodule(change.made[0]) for change in changes]
        single = [
            change.path
            for change, module in zip(changes, modules, strict=True)
            if isinstance(module, MoE) and len(module.weights.w1) == 1
        ]
        if single:
            notes.append(
                f"{len(single)} of {len(changes)} layers have one expert, which always runs, so nothing is saved "
                f"there: {', '.join(single[:3])}{', ...' * (len(single) > 3)}. Give them a smaller expert_size."
            )
        names = {module.activation for module in modules if isinstance(module, MoE)}
        dense = sorted(name for name in names if not ACTIVATIONS[name].leaves_zeros)
        if dense:
            notes.append(
                f"The experts use {', '.join(dense)}, which leaves few values near zero: tau will skip little before "
                "the quality drops. To save more, run swap-activation and sparsify (with data) first."
            )
        return tuple(notes)

    def _parts(self, layers: Mapping[MoE, str]) -> list[tuple[str, str, list[MoE]]]:
        """Group the layers, given with their paths, that are fitted together: (key of the fit, label, layers)."""
        if not self.layer_by_layer:
            return [("moeify-routers", "moeify routers", list(layers))]
        parts = []
        groups = by_trunk(layers)
        for number, group in enumerate(groups, 1):
            first, others = layers[group[0]], f" and {len(group) - 1} more" if len(group) > 1 else ""
            label = f"moeify routers {number} of {len(groups)}, {first}{others}"
            parts.append((f"moeify-routers-{first}", label, group))
        return parts

    def _shape(self, site: FFN) -> tuple[int, int]:
        """The number of a layer's experts and of their neurons, filling included."""
        neurons = site.neurons
        experts, size = for_site(self.experts, site.path), for_site(self.expert_size, site.path)
        if experts is not None:
            return experts, math.ceil(neurons / experts)
        if size is None:
            size = usual_size(neurons)
        return math.ceil(neurons / size), size

    @property
    def _shares_trunks(self) -> bool:
        # Every layer has its own centres.
        return self.share_trunk and self.router_depth == 2 and self.router not in ("centres", "representatives")

    def _groups(self, graph: GraphModule, sites: Sequence[FFN]) -> Sequence[Sequence[FFN]]:
        """The layers whose routers have one trunk."""
        return trunk_groups(graph, sites) if self._shares_trunks else [[site] for site in sites]

    def _width(self, group: Sequence[FFN]) -> int | None:
        """Width of the trunk of a group of layers that share it, None if there is none."""
        if self.router_depth == 1 or self.router == "representatives":
            return None
        if self.router == "centres":
            return self._shape(group[0])[0] - self.shared
        if self.router_width is not None:
            return self.router_width
        routed = sum(site.multiply_adds for site in group)
        outputs = sum(self._shape(site)[0] - self.shared for site in group)
        return usual_width(routed, group[0].d_in, outputs)

    def _active(self, weights: FFNWeights, activation: str, x: Tensor) -> Tensor:
        """What neurons do on the data, [h, N]."""
        if self.split == "markers":
            return markers(weights, activation, x, self.marked)
        return output_sizes(weights, activation, x)

    def _router(self, site: FFN, weights: FFNWeights, experts: int, width: int | None) -> Router:
        neurons = self.router == "neurons"
        # A regression from neurons goes below zero where an expert is silent, and abs would make that a positive score.
        own: dict[str, Output] = {"log": "exp", "activation": "sigmoid"}
        usual: Output = "softplus" if neurons else own.get(self.objective, "abs")
        by_size = self.router == "representatives"
        return Router(
            site.d_in,
            width,
            experts - self.shared,
            bias=neurons or (by_size and any(bias is not None for bias in (weights.b1, weights.b_gate))),
            hidden="tanh" if self.objective == "activation" else "relu",
            output=usual if self.router_output == "auto" else self.router_output,
            activation=site.activation if by_size else None,
            gated=weights.gate is not None,
            goal=Goal(self.objective, self.labels, self.underestimate),
            like=weights.w1,
        )


def _read(graph: TracedGraph, path: str) -> list[str]:
    """Names of the nodes that an expert layer reads, one for every call."""
    calls = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == path]
    return [node.args[0].name for node in calls]
