"""Make activations sparse: put a tap on every FFN and fine-tune with a penalty on how many neurons are active.

The penalty is the square Hoyer measure, (Σ|a|)² / Σa², which lies between 1 (one active neuron) and the width (all
equally active); D2DMoE, section 3.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgeon.batch import Batch, Data
from surgeon.errors import UsageError
from surgeon.fit import Settings, fit, loss_of, real_tokens
from surgeon.graph import TracedGraph, free_target
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.passes.base import SiteKind, TrainedPass, option
from surgeon.probe import HALVES, Halves
from surgeon.report import FitReport, SiteChange
from surgeon.rewrite import Capture, own_parameters, set_path
from surgeon.search import find_ffns
from surgeon.sites import FFN, PROJECTION_MLP, Rejection

AlphaSchedule = Literal["constant", "linear", "linear_warmup"]
EPSILON = 1e-15


def square_hoyer(a: Tensor) -> Tensor:
    """(Σ|a|)² / (Σa² + 1e-15) over the last dimension, [..., h] → [...] float32: from 1 to h, 0 if all are zero."""
    a = a.float()
    return a.abs().sum(-1).square() / (a.square().sum(-1) + EPSILON)


class SparsityTap(nn.Module):
    """Marks the values that go into an activation, and says how far from sparse they are. Returns its input.

    A ReLU's output is penalised as it is; for an activation that leaves no zeros (GELU, SiLU) the pre-activation z is,
    shifted to max(z, D) − D, so that values below D, where the activation is near zero, cost nothing.
    """

    surgeon_identity = True

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
        """Tap a layer of `hidden` neurons; `projection`: it stands in for an attention projection (see mlpify)."""
        super().__init__()
        self.projection = projection
        self.activation, self.gate_half, self.hidden, self.scale = activation, gate_half, hidden, scale
        self.displacement = displacement

    def forward(self, z: Tensor) -> Tensor:
        return z

    def penalised(self, z: Tensor) -> Tensor:
        """The non-negative values that should be sparse, [..., h], of what goes through the tap."""
        if self.gate_half is not None:
            z = z[..., HALVES[self.gate_half](self.hidden)]
        z = z * self.scale
        known = ACTIVATIONS[self.activation]
        return known.fn(z) if known.leaves_zeros else z.clamp_min(self.displacement) - self.displacement

    def active_share(self, z: Tensor) -> Tensor:
        """Share of neurons whose activation is above a hundredth of the token's largest, [..., h] → [...]."""
        if self.gate_half is not None:
            z = z[..., HALVES[self.gate_half](self.hidden)]
        a = ACTIVATIONS[self.activation].fn(z * self.scale).abs()
        return (a > 0.01 * a.amax(-1, keepdim=True)).float().mean(-1)


@dataclass(frozen=True, kw_only=True)
class Sparsify(TrainedPass[FFN]):
    """Put a square-Hoyer tap on each FFN's activation and fine-tune for task and sparsity (D2DMoE, section 3.1).

    Without data the taps are put in and nothing is trained: the output is unchanged.
    """

    name: ClassVar[str] = "sparsify"
    works_on: ClassVar[SiteKind] = "ffn"
    must_precede: ClassVar[frozenset[str]] = frozenset({"moeify", "lower"})
    preserves: ClassVar[bool] = True
    untrained: ClassVar[str] = (
        "Nothing was fine-tuned, so activations are as sparse as they were and the output is unchanged. "
        "Run again with --data to train."
    )

    alpha: float = option(1e-3, "Weight of the sparsity penalty beside the task loss.")
    alpha_schedule: AlphaSchedule = option("linear", "The weight over time: constant, linear or linear_warmup.")
    displacement: float = option(-10.0, "D: pre-activations below it count as zero where the activation leaves none.")
    epochs: float = option(3.0, "How often fine-tuning goes through the data.")
    lr: float = option(2e-5, "Learning rate of AdamW for all parameters.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise UsageError(f"sparsify: alpha is {self.alpha}, but must not be negative.")
        if self.alpha_schedule not in get_args(AlphaSchedule):
            raise UsageError(
                f"sparsify: alpha_schedule is '{self.alpha_schedule}'; it can be constant, linear or linear_warmup."
            )

    def keeps_output(self, fitted: bool) -> bool:
        return not fitted

    def find(self, graph: GraphModule) -> tuple[Sequence[FFN], list[Rejection]]:
        return find_ffns(graph)

    def match(self, graph: GraphModule, site: FFN) -> str | None:
        return "it has a sparsity tap already" if _tapped(graph, site) else None

    def rewrite(self, graph: TracedGraph, site: FFN) -> SiteChange:
        found = site.nonlinearity
        tap = SparsityTap(
            found.activation, found.fused, site.hidden, found.input_scale, self.displacement,
            projection=site.path.rpartition(".")[2].startswith(PROJECTION_MLP),
        )  # fmt: skip
        target = free_target(graph, site.path, "hoyer")
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
        count, cost, output = site.parameters(graph), site.multiply_adds, site.calls[-1].output.name
        where = "output" if ACTIVATIONS[found.activation].leaves_zeros else f"pre-activation, D = {self.displacement:g}"
        return SiteChange(
            site.path,
            site.describe,
            f"{site.describe} + square-Hoyer tap ({where})",
            (count, count),
            (cost, cost),
            (output, output),
            made=target,
        )

    def fit(
        self,
        graph: TracedGraph,
        before: TracedGraph,
        changes: Sequence[tuple[FFN, SiteChange]],
        data: Data,
        settings: Settings,
    ) -> FitReport | None:
        """Fine-tune all parameters with task loss + alpha · mean over layers of mean over tokens of square Hoyer."""
        own_parameters(graph)
        taps: dict[str, SparsityTap] = {}
        for node in graph.graph.nodes:
            if node.op == "call_module" and isinstance(tap := graph.get_submodule(str(node.target)), SparsityTap):
                taps[node.name] = tap
        tapped = Capture(graph, list(taps), keep_output=True)
        tapped.graph.train()
        task = loss_of(graph, data)

        def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
            outputs, values = tapped(*batch.args, **batch.kwargs)
            task_value = task(outputs, batch)
            groups: dict[bool, list[Tensor]] = defaultdict(list)
            shares = []
            for name, tap in taps.items():
                z = real_tokens(batch, values[name])
                groups[tap.projection].append(square_hoyer(tap.penalised(z)).mean())
                with torch.no_grad():
                    shares.append(tap.active_share(z).mean())
            # Feed-forward layers and replaced projections are averaged apart, both with the same weight.
            hoyer = torch.stack([torch.stack(group).mean() for group in groups.values()]).sum()
            total = task_value + self._alpha(done) * hoyer
            return total, {
                "task loss": task_value.item(),
                "square Hoyer": hoyer.item(),
                "active": float(torch.stack(shares).mean()),
            }

        parameters = [parameter for parameter in graph.parameters() if parameter.requires_grad]
        if not parameters:
            raise UsageError("sparsify: every parameter of the model is frozen (requires_grad is False).")
        return fit(parameters, loss, data, self.plan(), settings, "sparsify")

    def _alpha(self, done: float) -> float:
        if self.alpha_schedule == "linear":
            return self.alpha * done
        if self.alpha_schedule == "linear_warmup":
            return self.alpha * min(1.0, 2.0 * done)
        return self.alpha


def _tapped(graph: GraphModule, site: FFN) -> bool:
    return any(
        node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), SparsityTap)
        for call in site.calls
        for node in call.cone
    )
