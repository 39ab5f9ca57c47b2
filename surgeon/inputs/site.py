"""A layer that skips by a threshold on its own values, in a graph or in a model: its place, its form and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import surgeon.kernels.sparse_linear  # noqa: F401  (it registers the ops)
from surgeon.described import Described, Facts
from surgeon.inputs.calibration import levels_of, scores
from surgeon.inputs.module import SparseLinear
from surgeon.kernels.sparse_linear import LinearCall, kept

masked_linear = torch.ops.surgeon.masked_linear.default
sparse_linear = torch.ops.surgeon.sparse_linear.default
add_low_rank = torch.ops.surgeon.add_low_rank.default


@dataclass(frozen=True, eq=False, repr=False)
class Skipping(Described):
    """A layer that skips by a threshold on its own values.

    path: the module path of its levels and tau. nodes: every execution in a graph.
    form: "masked" (reference op), "dynamic" (the op that reads only what it needs) or "module" (in a model).
    tau, levels, scale, centre: as in the operators of its kind.
    """

    path: str
    form: Literal["masked", "dynamic", "module"]
    nodes: tuple[Node, ...]
    tau: Tensor
    levels: Tensor
    scale: Tensor | None
    centre: Tensor | None

    unit: ClassVar[str]
    """What it skips, in words."""
    counts_skipped = True

    @property
    def output(self) -> Node:
        """Its value in the last of its executions."""
        return self.nodes[-1]

    @property
    def skips(self) -> bool:
        """Whether what is not needed is not read."""
        return self.form != "masked"

    @property
    def shown_form(self) -> str:
        """The form, for tables."""
        return self.form


@dataclass(frozen=True, eq=False, repr=False)
class SparseLinearSite(Skipping):
    """A linear layer that skips the inputs near their usual value.

    path: such as `encoder.layer.0.query.inputs`. biased: whether it has a bias. rank: of what is added whatever is
    skipped, 0 without.
    """

    d_in: int
    d_out: int
    biased: bool
    rank: int

    unit = "inputs"
    # As a mixture of experts has them: every input is an expert of one row of the weight.
    gate_multiply_adds = 0

    @property
    def output(self) -> Node:
        """Its value in the last of its executions, with its low rank."""
        return value_of(self.nodes[-1])

    @property
    def router_parameters(self) -> int:
        """Multiply-adds for one token that are never skipped: the low rank takes a router's place."""
        return self.rank * (self.d_in + self.d_out)

    @property
    def widths(self) -> tuple[int, ...]:
        """Input and output."""
        return self.d_in, self.d_out

    @property
    def costs(self) -> list[int]:
        """Multiply-adds of each input for one token."""
        return [self.d_out] * self.d_in

    @property
    def expert_multiply_adds(self) -> int:
        """Multiply-adds of one input for one token."""
        return self.d_out

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token when every input is read."""
        return self.d_in * self.d_out + self.router_parameters

    @property
    def parameters(self) -> int:
        """The number of weights, and of biases."""
        return self.multiply_adds + (self.d_out if self.biased else 0)

    @property
    def describe(self) -> str:
        """`768 inputs → 3072, rank 48`."""
        return f"{self.d_in} inputs → {self.d_out}" + (f", rank {self.rank}" if self.rank else "")

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        return {"kind": "skips-inputs", "d_in": self.d_in, "d_out": self.d_out, "rank": self.rank}

    def kept(self, x: Tensor) -> Tensor:
        """Return which inputs of tokens x [..., d_in] are kept, bool of the same shape."""
        return kept(x, self.scale, self.centre, self.levels, self.tau)

    def levels_on(self, x: Tensor) -> Tensor:
        """Return the quantiles of the scores of tokens x [N, d_in], float32 [257]."""
        return levels_of(scores(x.float(), self.scale, self.centre))


def value_of(node: Node) -> Node:
    """Return the node that has the value of an execution of a layer: what adds its low rank, if it has one."""
    return next((user for user in node.users if user.target is add_low_rank and user.args[0] is node), node)


_FORMS: dict[Any, Literal["masked", "dynamic"]] = {masked_linear: "masked", sparse_linear: "dynamic"}


def find_sparse_linears(model: nn.Module) -> list[SparseLinearSite]:
    """Return every linear layer that skips inputs, in topological order of a graph or in the order of the modules."""
    if not isinstance(model, GraphModule):
        return [
            SparseLinearSite(
                path, "module", (), module.tau, module.levels, module.scale, module.centre, module.shape.d_in,
                module.shape.d_out, module.bias is not None, module.shape.rank,
            )
            for path, module in model.named_modules()
            if isinstance(module, SparseLinear)
        ]  # fmt: skip
    found: dict[str, list[Node]] = {}
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target in _FORMS:
            levels = LinearCall(*node.args).levels
            assert isinstance(levels, Node)
            found.setdefault(str(levels.target).rpartition(".")[0], []).append(node)
    return [_site(model, path, nodes) for path, nodes in found.items()]


def _site(graph: GraphModule, path: str, nodes: list[Node]) -> SparseLinearSite:
    holder: Any = graph.get_submodule(path)
    form = _FORMS[nodes[0].target]
    call = LinearCall(*nodes[0].args)  # type: ignore[arg-type]
    weight: object = call.weight
    assert isinstance(weight, Node)
    rows, columns = weight.meta["val"].shape
    d_out, d_in = (int(rows), int(columns)) if form == "masked" else (int(columns), int(rows))
    scale, centre = (getattr(holder, name, None) for name in ("scale", "centre"))
    low_in = getattr(holder, "low_in", None)
    return SparseLinearSite(
        path, form, tuple(nodes), holder.tau, holder.levels, scale, centre, d_in, d_out, call.bias is not None,
        0 if low_in is None else low_in.shape[0],
    )  # fmt: skip
