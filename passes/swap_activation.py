"""Replace activation functions, so that hidden neurons can be exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from surgeon.errors import UsageError
from surgeon.graph import TracedGraph, aten, shape_of
from surgeon.passes.base import Pass, SiteKind, option
from surgeon.probe import HALVES, OTHER
from surgeon.report import SiteChange
from surgeon.rewrite import emit, emit_dropout, erase_unread
from surgeon.search import find_ffns
from surgeon.sites import FFN, Call, Rejection

Emit = Callable[..., Node]
# How each target activation is written in ATen ops.
TARGETS: dict[str, Callable[[Emit, Node], Node]] = {
    "relu": lambda step, z: step(aten.relu.default, z),
    "relu2": lambda step, z: step(aten.square.default, step(aten.relu.default, z)),
    "gelu": lambda step, z: step(aten.gelu.default, z),
    "silu": lambda step, z: step(aten.silu.default, z),
}


@dataclass(frozen=True, kw_only=True)
class SwapActivation(Pass[FFN]):
    """Replace each FFN's activation by ReLU, the gate's in a gated FFN (D2DMoE, section 3.1).

    This changes what the model computes: fine-tune afterwards (sparsify does, with data).
    """

    name: ClassVar[str] = "swap-activation"
    works_on: ClassVar[SiteKind] = "ffn"
    must_precede: ClassVar[frozenset[str]] = frozenset({"sparsify", "moeify", "lower"})
    preserves: ClassVar[bool] = False

    to: str = option("relu", "The new activation: relu, relu2, gelu or silu.")

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise UsageError(f"swap-activation: to is '{self.to}', but must be one of {', '.join(TARGETS)}.")

    def find(self, graph: GraphModule) -> tuple[Sequence[FFN], list[Rejection]]:
        return find_ffns(graph)

    def match(self, graph: GraphModule, site: FFN) -> str | None:
        if site.activation == self.to:
            return f"its activation is {self.to} already"
        for call in site.calls:
            hidden, first = shape_of(call.down.input), shape_of(call.first[0].output)
            if hidden is None or first is None or len(hidden) != len(first):
                return "its values change shape between the linears"
        return None

    def rewrite(self, graph: TracedGraph, site: FFN) -> SiteChange:
        output = ("", "")
        for call in site.calls:
            output = (call.output.name, call.output.name)
            self._swap(graph, site, call)
        count, cost = site.parameters(graph), site.multiply_adds
        return SiteChange(site.path, site.activation, self.to, (count, count), (cost, cost), output)

    def _swap(self, graph: TracedGraph, site: FFN, call: Call) -> None:
        """Write the cone anew in its plainest form: act(scale · z) · up · scale, then dropout."""
        found, old = site.nonlinearity, call.down.input
        reader = next(iter(node for node in old.users if node in call.down.nodes))
        with graph.graph.inserting_before(reader):

            def step(target: Any, *args: Any) -> Node:
                return emit(graph, target, *args, path=site.path)

            z, up = call.first[0].output, call.first[-1].output
            if found.fused is not None:
                rows = HALVES[found.fused](site.hidden), HALVES[OTHER[found.fused]](site.hidden)
                z, up = (step(aten.slice.Tensor, z, -1, part.start, part.stop, part.step or 1) for part in rows)
            if found.input_scale != 1.0:
                z = step(aten.mul.Tensor, z, found.input_scale)
            value = TARGETS[self.to](step, z)
            if found.gated:
                value = step(aten.mul.Tensor, value, up)
            if found.output_scale != 1.0:
                value = step(aten.mul.Tensor, value, found.output_scale)
            value = emit_dropout(graph, value, site.dropout, path=site.path)
        for user in list(old.users):
            if user in call.down.nodes:
                user.replace_input_with(old, value)
        erase_unread(graph, call.cone)
