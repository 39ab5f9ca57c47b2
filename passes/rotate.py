"""Turn residual streams into the basis of their principal components, folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.collective import send
from surgeon.data.data import Data
from surgeon.described import was_and_is
from surgeon.graph.edit import emit, erase_unread, get_attr
from surgeon.graph.fold import Fold, add_parameter, fold
from surgeon.graph.traced import TracedGraph, aten, module_path, tensor_of, tidy
from surgeon.graph.walk import walk_sources
from surgeon.inputs.calibration import in_groups
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind, SiteRefused
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.sites.linear import Linear
from surgeon.sites.norms import Norm
from surgeon.sites.rejection import Rejection
from surgeon.sites.soundness import not_finite
from surgeon.sites.stream import Stream
from surgeon.sites.stream_search import find_streams
from surgeon.sites.values import ValueHeads, find_value_heads
from surgeon.training.distillation import OTHER_BASIS
from surgeon.training.loop import RunSettings
from surgeon.training.observe import collect

# Tokens to find the components on.
_TOKENS = 4096
# Of norms that have no eps, so that what is zero stays zero.
_NO_EPS = 1e-30


@dataclass(frozen=True)
class Basis:
    """Orthogonal vectors in float64, the columns of [d, d], or of [G, h, h] for heads, by growing energy.

    share: of the energy in the upper half.
    """

    vectors: Tensor
    share: float

    @classmethod
    def principal(cls, moments: Tensor) -> Basis:
        """The principal components of second moments [..., d, d], float64; NaN of those that are not finite."""
        if not bool(torch.isfinite(moments).all()):
            return cls(torch.full_like(moments, torch.nan), 0.0)
        energies, vectors = torch.linalg.eigh(moments)
        upper = energies[..., energies.shape[-1] // 2 :].sum()
        return cls(vectors, float(upper / energies.sum().clamp_min(1e-300)))


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass[Stream | ValueHeads, Basis]):
    """Turn the residual stream into its principal components. The output stays the same, and nothing costs more.

    sparsify-inputs skips inputs that are near their usual value. In the stream of a trained model, all inputs are about
    equally far from it. In the basis of the principal components few are, so that more can be skipped with less error.

    What writes into the stream is multiplied by the basis, and what reads it by its inverse, all in the weights (after
    SliceGPT, arXiv 2401.15024, and LaRoSA, arXiv 2507.01299). The gain and the bias of a norm become part of the linear
    layers behind it. A LayerNorm becomes an RMSNorm: the mean is taken away from what is written. A head that shares
    its weight with an embedding gets its own.

    The values of each head of attention get a basis of their own, folded into the value and the output projection.

    Put it before sparsify-inputs, and refit after that. This pass is not part of D2DMoE.
    """

    name: ClassVar[str] = "rotate"
    works_on: ClassVar[SiteKind] = "stream"
    must_precede: ClassVar[frozenset[str]] = frozenset(
        {"moeify", "halt-tokens", "early-exit", "sparsify-inputs", "sparsify-neurons", "lower"}
    )
    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    heads: bool = option(True, "Turn the values of each head of attention too.")

    def find(self, graph: GraphModule) -> tuple[Sequence[Stream | ValueHeads], list[Rejection]]:
        # Values come first: a stream may give linear layers biases that they had not.
        values, unfit = find_value_heads(graph) if self.heads else ([], [])
        streams, refused = find_streams(graph)
        return [*(_in_stream(site, streams) for site in values), *streams], [*unfit, *refused]

    def match(self, graph: GraphModule, site: Stream | ValueHeads) -> Rejection | None:
        return not_finite(graph, site.linears)

    def observe(
        self, graph: TracedGraph, sites: Sequence[Stream | ValueHeads], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Basis]:
        if data is None:
            return {}
        heads = [site for site in sites if isinstance(site, ValueHeads)]
        streams = [site for site in sites if isinstance(site, Stream)]
        moments = {site.path: torch.zeros(site.width, site.width, dtype=torch.float64) for site in streams}
        readers = [(site.path, norm) for site in streams for norm in site.norms]
        seen: Sequence[Norm | ValueHeads] = [*heads, *(norm for _, norm in readers)]
        for part in in_groups(seen, _TOKENS):
            names = {one: one.x.name if isinstance(one, Norm) else one.out.input.name for one in part}
            values = collect(graph, names.values(), data, tokens=_TOKENS, progress=settings.progress)
            for one in part:
                if isinstance(one, ValueHeads):
                    moments[one.path] = one.moments(values[names[one]])
            for path, norm in readers:
                if norm in names:  # of all that read a stream, each counts alike
                    x = norm.normalised(values[norm.x.name])
                    moments[path] += (x.t() @ x / len(x)).cpu()
        found = {path: Basis.principal(moment) for path, moment in moments.items()}
        send([basis.vectors for basis in found.values()])
        if settings.original is not None:
            _follow(settings.original, {site.path: found[site.path] for site in streams})
        return found

    @torch.no_grad()
    def rewrite(self, graph: TracedGraph, site: Stream | ValueHeads, seen: Basis | None) -> SiteChange:
        if seen is not None and not bool(torch.isfinite(seen.vectors).all()):
            raise SiteRefused("not-finite", "its values on the data contain NaN or infinity")
        device = next(graph.parameters()).device
        all_before, before = _parameters(graph), _parameters(graph, site)
        if isinstance(site, ValueHeads):
            if seen is not None:
                _turn_heads(graph, site, seen.vectors.to(device))
            outputs: dict[Node, Node] = {}
        else:
            basis = torch.eye(site.width, dtype=torch.float64) if seen is None else seen.vectors
            outputs = _turn_stream(graph, site, basis.to(device))
        after = before + _parameters(graph) - all_before
        words = "to be turned" if seen is None else f"turned: {seen.share:.0%} of the energy in half of the channels"
        output, cost = site.output, site.multiply_adds
        now = outputs.get(output, output).name
        share = None if seen is None else seen.share
        return SiteChange(
            site.path, site.describe, words, (before, after), (cost, cost), (output.name, now),
            facts=was_and_is(site.facts, {**site.facts, "energy_in_half": share}),
        )  # fmt: skip


@torch.no_grad()
def _follow(original: TracedGraph, bases: Mapping[str, Basis]) -> None:
    """Turn the streams of the model that later passes learn from, so that these compare layers in one basis."""
    device = next(original.parameters()).device
    sites = {site.path: site for site in find_streams(original)[0]}
    for path, basis in bases.items():
        if path not in sites:
            original.meta[OTHER_BASIS] = path
        elif bool(torch.isfinite(basis.vectors).all()):
            _turn_stream(original, sites[path], basis.vectors.to(device))
    tidy(original)


def _in_stream(site: ValueHeads, streams: Sequence[Stream]) -> ValueHeads:
    """Values that a stream carries on show in what reads the stream next, since the stream is turned too."""
    written = site.out.output
    for stream in streams:
        after = [reader.linear.output for reader in stream.readers if reader.linear.output > written]
        if after and any(writer.linear.output is written for writer in stream.writers):
            return replace(site, output=min(after))
    return site


def _turn_heads(graph: TracedGraph, site: ValueHeads, basis: Tensor) -> None:
    """Fold a basis [G, h, h] for each head of values into both projections."""
    value, out = site.value, site.out
    rows = site.rows.to(basis.device)
    columns, repeats = site.columns.to(basis.device), site.columns.shape[1]
    folds = [
        Fold(
            *(_user_of(out, out.weight), out.weight, 0 if out.transposed else 1),
            matrix=basis.repeat_interleave(repeats, 0),
            groups=columns.flatten(0, 1),
        )
    ]
    for node, axis in ((value.weight, 1 if value.transposed else 0), (value.bias, -1)):
        if node is not None:
            folds.append(Fold(_user_of(value, node), node, axis, matrix=basis, groups=rows))
    fold(graph, folds)


def _turn_stream(graph: TracedGraph, site: Stream, basis: Tensor) -> dict[Node, Node]:
    """Fold a basis [d, d] into all that reads and writes a stream; returns new outputs of linear layers by old ones."""
    parameters = [(linear, node) for linear in site.linears for node in (linear.weight, linear.bias)]
    users = {(linear, node): _user_of(linear, node) for linear, node in parameters if node is not None}
    folded = _fold_readers(graph, site, basis, users)
    _fold_writers(graph, site, basis, users, folded)
    for norm in site.norms:
        _make_plain(graph, norm)
    graph.graph.eliminate_dead_code()  # gains that were computed
    return folded.outputs


_Users: TypeAlias = Mapping[tuple[Linear, Node], Node]
"""The nodes by which linear layers read their weights and biases."""


@dataclass(frozen=True)
class _Folded:
    """What readers got. nodes: the `get_attr` nodes of new weights, by reader and former node. biases: of those that
    had none. outputs: what adds these, by what it is added to, where the linear layer itself does not."""

    nodes: dict[tuple[Node, Node], Node] = field(default_factory=dict)
    biases: dict[Linear, Node] = field(default_factory=dict)
    outputs: dict[Node, Node] = field(default_factory=dict)


def _fold_readers(graph: TracedGraph, site: Stream, basis: Tensor, users: _Users) -> _Folded:
    """Fold norms and basis into the linear layers that read."""
    folds, biases = [], {}
    for reader in site.readers:
        norm, linear = reader.norm, reader.linear
        gain = None if norm is None or norm.gain is None else norm.gain.to(basis.device)
        axis = 0 if linear.transposed else 1
        folds.append(Fold(users[linear, linear.weight], linear.weight, axis, gain, basis))
        if norm is None or norm.shift is None:
            continue
        moved = linear.weight_rows(graph).double() @ norm.shift.to(basis.device)
        if linear.bias is None:
            biases[linear] = moved
        else:
            bias = tensor_of(graph, linear.bias)
            assert bias is not None
            axis, moved = bias.dim() - 1, moved.reshape(bias.shape)
            folds.append(Fold(users[linear, linear.bias], linear.bias, axis, added=moved))
    folded = _Folded()
    for linear, moved in biases.items():
        _add_bias(graph, linear, moved, folded)
    folded.nodes.update(fold(graph, folds))
    return folded


def _fold_writers(graph: TracedGraph, site: Stream, basis: Tensor, users: _Users, folded: _Folded) -> None:
    """Fold the basis into what writes, which loses its mean if the norms took that away."""
    matrix = basis - basis.mean(0) if site.centred else basis
    folds = [Fold(table.user, table.node, table.axis, matrix=matrix) for table in site.tables]
    for writer in site.writers:
        linear, gain = writer.linear, writer.gain
        gain = None if gain is None else gain.to(basis.device)
        given = folded.biases.get(linear, linear.bias)
        for node, axis in ((linear.weight, 1 if linear.transposed else 0), (given, -1)):
            if node is not None:
                user = users.get((linear, node)) or next(iter(node.users))
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
        made = emit(graph, aten.rms_norm.default, norm.x, [norm.d_in], None, max(norm.eps, _NO_EPS), path=norm.path)
        dtype = norm.y.meta["val"].dtype
        if made.meta["val"].dtype != dtype:
            made = emit(graph, aten.to.dtype, made, dtype, path=norm.path)
    norm.y.replace_all_uses_with(made)
    erase_unread(graph, norm.nodes)


def _parameters(graph: TracedGraph, site: Stream | ValueHeads | None = None) -> int:
    """The number of parameters that the graph reads, or of those that a site consists of."""
    nodes: list[Node] = [node for node in graph.graph.nodes if node.op == "get_attr" and node.users]
    if site is not None:
        inside = {node for linear in site.linears for node in (linear.weight, linear.bias) if node is not None}
        if isinstance(site, Stream):
            inside |= {table.node for table in site.tables}
            inside |= {source for norm in site.norms for node in norm.constants for source in walk_sources(node)}
        nodes = [node for node in nodes if node in inside]
    found = {id(tensor): tensor.numel() for node in nodes if isinstance(tensor := tensor_of(graph, node), nn.Parameter)}
    return sum(found.values())
