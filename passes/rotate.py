"""Turn residual streams into the basis of their principal components, folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.data.data import Data
from surgeon.graph.edit import emit, erase_unread, get_attr
from surgeon.graph.fold import Fold, add_parameter, fold
from surgeon.graph.traced import TracedGraph, aten, module_path, tensor_of
from surgeon.graph.walk import walk_sources
from surgeon.inputs.calibration import in_groups
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind
from surgeon.passes.report import SiteChange
from surgeon.sites.linear import Linear
from surgeon.sites.norms import Norm
from surgeon.sites.rejection import Rejection
from surgeon.sites.soundness import not_finite
from surgeon.sites.stream import Stream, find_streams
from surgeon.training.loop import RunSettings
from surgeon.training.observe import collect

# Tokens to find the components on.
_TOKENS = 4096


@dataclass(frozen=True)
class Basis:
    """Orthogonal vectors, the columns of float64 [d, d], by growing energy. share: of the energy in the upper half."""

    vectors: Tensor
    share: float


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass[Stream, Basis]):
    """Turn the residual stream into its principal components. The output stays the same, and nothing costs more.

    sparsify-inputs skips inputs that are near their usual value. In the stream of a trained model, all inputs are about
    equally far from it. In the basis of the principal components few are, so that more can be skipped with less error.

    What writes into the stream is multiplied by the basis, and what reads it by its inverse, all in the weights (after
    SliceGPT, arXiv 2401.15024, and LaRoSA, arXiv 2507.01299). The gain and the bias of a norm become part of the linear
    layers behind it. A LayerNorm becomes an RMSNorm: the mean is taken away from what is written. A head that shares
    its weight with an embedding gets its own.

    Put it before sparsify-inputs, and refit after that. This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "rotate"
    works_on: ClassVar[SiteKind] = "stream"
    must_precede: ClassVar[frozenset[str]] = frozenset(
        {"moeify", "halt-tokens", "early-exit", "sparsify-inputs", "sparsify-neurons", "lower"}
    )
    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    def find(self, graph: GraphModule) -> tuple[Sequence[Stream], list[Rejection]]:
        return find_streams(graph)

    def match(self, graph: GraphModule, site: Stream) -> Rejection | None:
        if not any(norm.centred or norm.gain is not None for norm in site.norms):
            return Rejection("already-done", "its norms are RMSNorms without gains, as this pass makes them")
        return not_finite(graph, site.linears)

    def observe(
        self, graph: TracedGraph, sites: Sequence[Stream], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Basis]:
        if data is None:
            return {}
        return {site.path: _components(graph, site, data, settings) for site in sites}

    @torch.no_grad()
    def rewrite(self, graph: TracedGraph, site: Stream, seen: Basis | None) -> SiteChange:
        before, cost, output = _parameters(graph), site.multiply_adds, site.output
        count = _parameters(graph, site)
        basis = torch.eye(site.width, dtype=torch.float64) if seen is None else seen.vectors
        basis = basis.to(next(graph.parameters()).device)
        folded = _fold_readers(graph, site, basis)
        _fold_writers(graph, site, basis, folded)
        for norm in site.norms:
            _make_plain(graph, norm)
        words = f"{site.describe.partition(',')[0]}, {len(site.norms)} norms without gain"
        if seen is not None:
            words += f", {seen.share:.0%} of the energy in half of the inputs"
        after = count + _parameters(graph) - before
        now = folded.outputs.get(output, output).name
        return SiteChange(site.path, site.describe, words, (count, after), (cost, cost), (output.name, now))


def _components(graph: TracedGraph, site: Stream, data: Data, settings: RunSettings) -> Basis:
    """The principal components of what the norms of a stream give, before their gains: all norms count alike."""
    moment = torch.zeros(site.width, site.width, dtype=torch.float64)
    for part in in_groups(site.norms, _TOKENS):
        names = [norm.x.name for norm in part]
        values = collect(graph, names, data, tokens=_TOKENS, progress=settings.progress)
        for norm in part:
            x = norm.normalised(values[norm.x.name].flatten(0, -2))
            moment += (x.t() @ x / len(x)).cpu()
    return principal(moment)


def principal(moment: Tensor) -> Basis:
    """The principal components of a second moment [d, d], float64."""
    energies, vectors = torch.linalg.eigh(moment)
    upper = energies[len(energies) // 2 :].sum()
    return Basis(vectors, float(upper / energies.sum().clamp_min(1e-300)))


@dataclass(frozen=True)
class _Folded:
    """What readers got. nodes: the `get_attr` nodes of new weights, by reader and former node. biases: of those that
    had none. outputs: what adds these, by what it is added to, where the linear layer itself does not."""

    nodes: dict[tuple[Node, Node], Node] = field(default_factory=dict)
    biases: dict[Linear, Node] = field(default_factory=dict)
    outputs: dict[Node, Node] = field(default_factory=dict)


def _fold_readers(graph: TracedGraph, site: Stream, basis: Tensor) -> _Folded:
    """Fold norms and basis into the linear layers that read."""
    folds, biases = [], {}
    for reader in site.readers:
        norm, linear = reader.norm, reader.linear
        gain = None if norm is None or norm.gain is None else norm.gain.to(basis.device)
        axis = 0 if linear.transposed else 1
        folds.append(Fold(_user_of(linear, linear.weight), linear.weight, axis, gain, basis))
        if norm is None or norm.shift is None:
            continue
        moved = linear.weight_rows(graph).double() @ norm.shift.to(basis.device)
        if linear.bias is None:
            biases[linear] = moved
        else:
            bias = tensor_of(graph, linear.bias)
            assert bias is not None
            axis, moved = bias.dim() - 1, moved.reshape(bias.shape)
            folds.append(Fold(_user_of(linear, linear.bias), linear.bias, axis, added=moved))
    folded = _Folded()
    for linear, moved in biases.items():
        _add_bias(graph, linear, moved, folded)
    folded.nodes.update(fold(graph, folds))
    return folded


def _fold_writers(graph: TracedGraph, site: Stream, basis: Tensor, folded: _Folded) -> None:
    """Fold the basis into what writes, which loses its mean if the norms took that away."""
    matrix = basis - basis.mean(0) if site.centred else basis
    folds = [Fold(table.user, table.node, table.axis, matrix=matrix) for table in site.tables]
    for writer in site.writers:
        linear, gain = writer.linear, writer.gain
        gain = None if gain is None else gain.to(basis.device)
        given = linear.bias if linear not in folded.biases else folded.biases[linear]
        for node, axis in ((linear.weight, 1 if linear.transposed else 0), (given, -1)):
            if node is not None:
                user = _user_of(linear, node)
                folds.append(Fold(user, folded.nodes.get((user, node), node), axis, gain, matrix))
        if writer.scaled is not None:
            value = next(one for one in writer.scaled.all_input_nodes if linear.output in walk_sources(one))
            writer.scaled.replace_all_uses_with(value)
            erase_unread(graph, [writer.scaled])
    fold(graph, folds)


def _user_of(linear: Linear, parameter: Node) -> Node:
    """The node by which a linear layer reads its weight or bias."""
    if len(parameter.users) == 1:
        return next(iter(parameter.users))
    own = [*linear.nodes, *(node for node in walk_sources(linear.core) if node > parameter)]
    return next(node for node in own if parameter in node.all_input_nodes)


def _add_bias(graph: TracedGraph, linear: Linear, value: Tensor, folded: _Folded) -> None:
    """Give a linear layer a bias."""
    weight, core = tensor_of(graph, linear.weight), linear.core
    assert weight is not None
    path = module_path(core) or linear.path
    parameter = nn.Parameter(value.to(weight.dtype), requires_grad=weight.requires_grad)
    target = add_parameter(graph, path, "bias", parameter)
    with graph.graph.inserting_before(core):
        bias = folded.biases[linear] = get_attr(graph, target)
    if core.target is aten.linear.default:
        core.args = (*core.args[:2], bias)
        return
    output = linear.output
    with graph.graph.inserting_after(output):
        added = folded.outputs[output] = emit(graph, aten.add.Tensor, output, bias, path=path)
    output.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def _make_plain(graph: TracedGraph, norm: Norm) -> None:
    """Replace a norm by an RMSNorm without gain."""
    first = min(norm.nodes)
    with graph.graph.inserting_before(first):
        made = emit(graph, aten.rms_norm.default, norm.x, [norm.d_in], None, norm.eps, path=norm.path)
        dtype = norm.y.meta["val"].dtype
        if made.meta["val"].dtype != dtype:
            made = emit(graph, aten.to.dtype, made, dtype, path=norm.path)
    norm.y.replace_all_uses_with(made)
    erase_unread(graph, norm.nodes)


def _parameters(graph: TracedGraph, site: Stream | None = None) -> int:
    """The number of parameters that the graph reads, or of those that a stream consists of."""
    nodes: list[Node] = [node for node in graph.graph.nodes if node.op == "get_attr" and node.users]
    if site is not None:
        inside = {table.node for table in site.tables}
        inside |= {node for linear in site.linears for node in (linear.weight, linear.bias) if node is not None}
        inside |= {node for norm in site.norms for part in norm.nodes for node in part.all_input_nodes}
        nodes = [node for node in nodes if node in inside]
    found = {id(tensor): tensor.numel() for node in nodes if isinstance(tensor := tensor_of(graph, node), nn.Parameter)}
    return sum(found.values())
