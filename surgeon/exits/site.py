"""An early exit in a graph: its place and its form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import surgeon.kernels.early_exit  # noqa: F401  (it registers the ops)
from surgeon.described import Described, Facts
from surgeon.graph.traced import aten, is_call, tensor_of

exit_or = torch.ops.surgeon.exit_or.default
rows_that_stay = torch.ops.surgeon.rows_that_stay.default


class Leaving(Described):
    """A place where samples leave or tokens halt.

    nodes: that put what left and what stayed together. form: "masked" or "dynamic".
    """

    form: Literal["masked", "dynamic"]
    nodes: tuple[Node, ...]

    # What a layer with experts has for every token.
    router_parameters = gate_multiply_adds = 0
    counts_skipped = True
    leaving: ClassVar[str]
    """What happens there, in words."""

    @property
    def output(self) -> Node:
        """What left and what stayed, together."""
        return self.nodes[-1]

    @property
    def skips(self) -> bool:
        """Whether the rest is not computed for what left."""
        return self.form == "dynamic"

    @property
    def shown_form(self) -> str:
        """The form, for tables."""
        return self.form


@dataclass(frozen=True, eq=False, repr=False)
class ExitSite(Leaving):
    """A place where samples leave.

    path: the module path of its head and its tau, `blocks.exits.0`. nodes: the node that puts the answers of the
    samples that leave and of the others together.
    form: "masked" (the rest is computed for all samples) or "dynamic" (only for those that stay).
    logits: the node with what the head answers, [B, C]. rows: in the dynamic form, the node with the samples that stay.
    classes: C.
    """

    path: str
    form: Literal["masked", "dynamic"]
    nodes: tuple[Node, ...]
    logits: Node
    rest: Node
    rows: Node | None
    classes: int
    tau: Tensor

    # Samples leave, and `surgeon.measure.meter` counts what the rest of the model costs.
    leaving = "samples leave"
    expert_multiply_adds = 0
    multiply_adds = 0

    @property
    def costs(self) -> list[int]:
        """Nothing for every token."""
        return []

    @property
    def describe(self) -> str:
        """`early exit, 10 classes`."""
        return f"early exit, {self.classes} classes"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        return {"kind": "early-exit", "classes": self.classes}


def find_exits(model: nn.Module) -> list[ExitSite]:
    """Return every early exit of a graph, in the order in which a sample comes to them. Other models have none."""
    if not isinstance(model, GraphModule):
        return []
    return [site for node in model.graph.nodes if (site := _site(model, node)) is not None]


def _site(graph: GraphModule, node: Node) -> ExitSite | None:
    """The exit whose samples are chosen at this node: that of the logits, which comes first."""
    for user in node.users:
        if is_call(user, exit_or) and user.args[0] is node:
            return _of(graph, user, "masked", (user, node, user.args[1], None, user.args[2]))
        if is_call(user, rows_that_stay) and user.args[0] is node:
            merged = next(one for one in user.users if is_call(one, aten.index_copy.default) and one.args[2] is user)
            return _of(graph, merged, "dynamic", (merged, node, merged.args[3], user, user.args[1]))
    return None


def _of(graph: GraphModule, node: Node, form: Literal["masked", "dynamic"], parts: tuple[object, ...]) -> ExitSite:
    output, logits, rest, rows, tau = parts
    assert isinstance(output, Node)
    assert isinstance(logits, Node)
    assert isinstance(rest, Node)
    assert rows is None or isinstance(rows, Node)
    assert isinstance(tau, Node)
    value = tensor_of(graph, tau)
    assert value is not None
    path = str(tau.target).rpartition(".")[0]
    return ExitSite(path, form, (output,), logits, rest, rows, int(logits.meta["val"].shape[1]), value)
