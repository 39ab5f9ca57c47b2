"""Make activations sparse: put a tap on every FFN and fine-tune with a penalty on how many neurons are active.

The penalty is the square Hoyer measure or L1 (D2DMoE, section 3.1). Either all layers share one weight, or the weight
of each layer is adapted until the target share of its neurons is active.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.collective import mean
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.padding import real_tokens
from surgeon.described import Facts
from surgeon.errors import UsageError
from surgeon.graph.edit import set_path
from surgeon.graph.traced import TracedGraph, free_target
from surgeon.kernels.activations import ACTIVATIONS, active_share
from surgeon.passes.contract import FitContext, SiteKind
from surgeon.passes.options import PerSite, for_site, option
from surgeon.passes.report import SiteChange
from surgeon.passes.trained import FineTunedPass
from surgeon.sites.constants import name_of
from surgeon.sites.ffn import FFN, IdentityModule
from surgeon.sites.nonlinearity import HALVES, Halves
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_ffns
from surgeon.training.finetuning import finetune
from surgeon.training.loop import FitReport
from surgeon.training.observe import pre_activations
from surgeon.training.penalty import (
    PENALTIES,
    PENALTY_NAMES,
    AlphaControl,
    AlphaSchedule,
    Penalty,
    Sparsity,
    alpha_at,
    penalised_values,
)

# A layer has missed its target if it is more active than that by this factor.
_MISSED = 1.2


class SparsityTap(IdentityModule):
    """Mark the values that go into an activation, and measure how sparse they are. The tap returns its input."""

    def __init__(
        self,
        activation: str,
        gate_half: Halves | None,
        hidden: int,
        scale: float,
        displacement: float,
        *,
        projection: bool,
    ) -> None:
        """Tap a layer of `hidden` neurons. `projection`: whether it replaces an attention projection (see mlpify)."""
        super().__init__()
        self.projection = projection
        self.activation, self.gate_half, self.hidden, self.scale = activation, gate_half, hidden, scale
        self.displacement = displacement

    def penalised(self, z: Tensor) -> Tensor:
        """Return the non-negative values that should be sparse, [..., h], for the input z of the tap."""
        return penalised_values(self._input(z), self.activation, self.displacement)

    def activations(self, z: Tensor) -> Tensor:
        """Return the activation's values, [..., h]; in a gated layer, those of the gate."""
        return ACTIVATIONS[self.activation].fn(self._input(z))

    def _input(self, z: Tensor) -> Tensor:
        if self.gate_half is not None:
            z = z[..., HALVES[self.gate_half](self.hidden)]
        return z * self.scale


@dataclass(frozen=True, kw_only=True)
class Sparsify(FineTunedPass[FFN]):
    """Put a sparsity tap on each FFN's activation and fine-tune for task and sparsity (D2DMoE, section 3.1).

    The square Hoyer measure of a token is (Σ|a|)² / Σa². For a ReLU, a is its output. For a GELU or SiLU, a is
    max(z, D) − D, where z is its input. In a gated layer, a is that of the gate. Feed-forward layers and
    replaced projections are averaged separately, with the same weight.

    Without data the pass inserts the taps and trains nothing: the output is unchanged.
    """

    name: ClassVar[str] = "sparsify"
    works_on: ClassVar[SiteKind] = "ffn"
    must_precede: ClassVar[frozenset[str]] = frozenset(
        {"moeify", "early-exit", "sparsify-inputs", "sparsify-neurons", "lower", "quantize"}
    )
    preserves: ClassVar[bool] = True
    untrained: ClassVar[str] = (
        "Nothing was fine-tuned, so activations are as sparse as they were and the output is unchanged. "
        "Run again with data to train."
    )

    penalty: Penalty = option(
        "hoyer",
        "Sparsity penalty: hoyer (square Hoyer measure) or l1 (sum). It applies to the outputs of a ReLU, or to the "
        "shifted inputs of a GELU or SiLU.",
    )
    alpha: float = option(
        1e-3, "Weight of the sparsity penalty, added to the task loss. With a target it is the initial weight.", least=0
    )
    alpha_schedule: AlphaSchedule = option(
        "linear",
        "How the weight changes over time. constant: always alpha. linear: from 0 to alpha over the whole training. "
        "linear_warmup: from 0 to alpha over the first half, then constant.",
    )
    target: PerSite[float] | None = option(
        None,
        "Share of neurons that should be active. A neuron is active if its value is above a hundredth of the token's "
        "largest. The weight of each layer then adapts automatically, instead of by alpha_schedule. Layers that match "
        "no pattern are not penalised.",
        above=0,
        below=1,
    )
    displacement: float = option(
        -10.0, "D: for activations that are never exactly zero, pre-activations below D count as zero."
    )
    epochs: float = option(3.0, "Number of fine-tuning epochs.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and self.alpha_schedule != type(self).alpha_schedule:
            raise UsageError(
                "sparsify: with a target the weight adapts automatically, so alpha_schedule would be ignored. "
                "Give one of them."
            )
        if self.target is not None and self.alpha == 0:
            raise UsageError("sparsify: with a target, alpha is the initial weight and must be above 0.")

    def keeps_output(self, fitted: bool) -> bool:
        return not fitted

    def match(self, graph: GraphModule, site: FFN) -> Rejection | None:
        if _tapped(graph, site):
            return Rejection("already-done", "it already has a sparsity tap")
        before = [factor.node for factor in site.nonlinearity.factors if factor.at != "after"]
        if site.nonlinearity.slopes is not None:
            before.append(site.nonlinearity.slopes.node)
        if before:
            name = name_of(graph, before[0])
            return Rejection("parameter-between", f"a parameter ('{name}') stands where its sparsity would be measured")
        return None

    def rewrite(self, graph: TracedGraph, site: FFN, seen: None) -> SiteChange:
        found = site.nonlinearity
        tap = SparsityTap(
            found.activation, found.fused, site.hidden, found.input_scale, self.displacement,
            projection=site.is_projection,
        )  # fmt: skip
        target = free_target(graph, site.path, "sparsity_tap")
        graph.add_submodule(target, tap)
        for call in site.calls:
            z = call.first[0].output
            readers = list(z.users)
            with graph.graph.inserting_after(z):
                node = graph.graph.call_module(target, (z,))
            node.meta["val"] = z.meta["val"]
            set_path(node, target)
            for reader in readers:
                reader.replace_input_with(z, node)
        displacement = None if ACTIVATIONS[found.activation].leaves_zeros else self.displacement
        where = "output" if displacement is None else f"pre-activation, D = {displacement:g}"
        words = f"{site.describe} + {PENALTY_NAMES[self.penalty]} tap ({where})"
        added: Facts = {"penalty": self.penalty, "displacement": displacement}
        return SiteChange.same_cost(graph, site, words, made=(target,), added=added)

    def fit(self, context: FitContext[FFN]) -> FitReport | None:
        """Fine-tune all parameters with task loss + Σ over layers of alpha / L · mean over tokens of the penalty."""
        graph, data = context.graph, context.data
        # An earlier sparsify may have left taps on other sites.
        sites = {change.made[0]: site.path for site, change in context.changes}
        taps: dict[str, SparsityTap] = {}
        paths: dict[str, str] = {}
        for node in graph.graph.nodes:
            if node.op == "call_module" and node.target in sites:
                tap = graph.get_submodule(str(node.target))
                assert isinstance(tap, SparsityTap)
                taps[node.name], paths[node.name] = tap, sites[node.target]
        # Feed-forward layers and replaced projections are averaged separately, with the same weight.
        groups = Counter(tap.projection for tap in taps.values())
        shares = torch.tensor([1.0 / groups[tap.projection] for tap in taps.values()])
        control = self._control(list(paths.values()))
        measure = PENALTIES[self.penalty]

        def penalise(batch: Batch, values: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, float]]:
            sizes, active = [], []
            for name, tap in taps.items():
                z = real_tokens(batch, values[name])
                sizes.append(mean(measure(tap.penalised(z))))
                with torch.no_grad():
                    active.append(mean(active_share(tap.activations(z))))
            size, active_now = torch.stack(sizes), torch.stack(active)
            if control is None:
                alphas = torch.full_like(size, alpha_at(self.alpha_schedule, self.alpha, done))
            else:
                control.observe(active_now, done)
                alphas = control.alphas.to(size)
            weighted = size * shares.to(size)
            return (alphas * weighted).sum(), {
                PENALTY_NAMES[self.penalty]: weighted.sum().item(),
                "active": float(active_now.mean()),
            }

        tapped = [site for site in find_ffns(graph)[0] if site.path in sites.values()]
        by_path = {paths[name]: tap for name, tap in taps.items()}
        before_training, penalty_before = self._look(graph, tapped, by_path, data)
        report = finetune(
            graph,
            data,
            self.plan(),
            context.settings,
            "sparsify",
            watched=list(taps),
            penalise=penalise,
            distill=self.distill,
            distill_layers=self.distill_layers,
            augmentation=self.augmentation,
            stateful=() if control is None else (control,),
        )
        after_training, penalty_after = self._look(graph, tapped, by_path, data)
        sparsity = {path: (before_training[path], after_training[path]) for path in before_training}
        penalty = None if penalty_before is None or penalty_after is None else (penalty_before, penalty_after)
        return dataclasses.replace(report, sparsity=sparsity, penalty=penalty)

    def finish(
        self, graph: TracedGraph, sites: Sequence[FFN], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        if fit is None:
            return ()
        return self._missed(fit) if self.target is not None else self._not_fallen(fit)

    def _missed(self, fit: FitReport) -> tuple[str, ...]:
        """Name the layer that is farthest from its target, if any missed it."""
        wanted = {path: self._goal(path) for path in fit.sparsity}
        missed = {
            path: (new.active, goal)
            for path, (_, new) in fit.sparsity.items()
            if (goal := wanted[path]) is not None and new.active > _MISSED * goal
        }
        if not missed:
            return ()
        path, (active, goal) = max(missed.items(), key=lambda item: item[1][0] / item[1][1])
        aimed = sum(goal is not None for goal in wanted.values())
        return (
            f"{len(missed)} of {aimed} layers missed the target. The worst is {path} with {active:.1%} of its neurons "
            f"active instead of {goal:.1%}. Train longer (epochs), raise lr, or start from a larger alpha.",
            *self._not_fallen(fit),
        )

    def _not_fallen(self, fit: FitReport) -> tuple[str, ...]:
        """Warn if what was to fall did not: the share of active neurons or the penalty, on the same tokens."""
        if fit.penalty is None:
            return ()
        pairs = [pair for path, pair in fit.sparsity.items() if self._goal(path) is not None]
        active = [sum(sparsity[place].active for sparsity in pairs) / len(pairs) for place in (0, 1)]
        moved = {
            "The share of active neurons": [f"{value:.1%}" for value in active],
            f"The {PENALTY_NAMES[self.penalty]} penalty": [f"{value:.4g}" for value in fit.penalty],
        }
        rose = (active[1] >= active[0], fit.penalty[1] >= fit.penalty[0])
        stayed = [
            f"{what} stayed at {new}." if old == new else f"{what} rose from {old} to {new}."
            for (what, (old, new)), did in zip(moved.items(), rose, strict=True)
            if did
        ]
        if not stayed:
            return ()
        trained = "" if self.target is not None else ", or set a target, for example target=0.05"
        return (f"{' '.join(stayed)} Try a larger alpha (now {self.alpha:g}), more epochs or steps{trained}.",)

    def _goal(self, path: str) -> float | None:
        """The largest share of active neurons that this run wants of a layer; None if the layer is not penalised."""
        return 1.0 if self.target is None else for_site(self.target, path)

    def _look(
        self, graph: TracedGraph, sites: Sequence[FFN], taps: Mapping[str, SparsityTap], data: Data
    ) -> tuple[dict[str, Sparsity], float | None]:
        """Measure the sparsity of every layer, and the mean penalty of the layers that are penalised, if any are."""
        values = pre_activations(graph, sites, data)
        sparsity = {site.path: Sparsity.of(site.activations(graph, values[site.path])) for site in sites}
        if self.alpha == 0:
            return sparsity, None
        with torch.no_grad():
            sizes = [
                float(PENALTIES[self.penalty](taps[path].penalised(z)).mean())
                for path, z in values.items()
                if self._goal(path) is not None
            ]
        return sparsity, sum(sizes) / len(sizes) if sizes else None

    def _control(self, paths: Sequence[str]) -> AlphaControl | None:
        if self.target is None:
            return None
        goals = [self._goal(path) for path in paths]
        return AlphaControl(goals, self.alpha, per_step=self.accumulate)


def _tapped(graph: GraphModule, site: FFN) -> bool:
    return any(
        node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), SparsityTap)
        for call in site.calls
        for node in call.cone
    )
