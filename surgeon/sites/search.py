"""Find the sites that a pass can operate on: feed-forward layers and standalone linear layers.

From every linear layer the search walks back through pointwise ops to the one or two linear layers before it. Then
`surgeon.sites.identify` identifies what the nodes in between compute. A refused candidate comes with the first
condition that failed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from itertools import islice

from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.graph.given import check_graph
from surgeon.graph.ops import (
    CREATION_OPS,
    DROPOUTS,
    LINEAR_OPS,
    PRODUCTS,
    SHAPE_OPS,
    activates,
    barrier,
    carries_values,
    equal_size,
    is_copy,
    is_pointwise,
    op_name,
)
from surgeon.graph.traced import aten, common_path, is_call, module_path, shape_of, tensor_key, tensor_of
from surgeon.graph.walk import walk_sources, walk_users
from surgeon.sites.cone import Cone
from surgeon.sites.constants import is_constant, name_of
from surgeon.sites.ffn import FFN, IdentityModule, LayerCall, projections
from surgeon.sites.identify import identify
from surgeon.sites.linear import Linear, OpaqueLinear, find_linears
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.regions import refused_in_regions
from surgeon.sites.rejection import Rejection
from surgeon.sites.soundness import unsound

# Poolers and classifier heads use these. They leave no neuron near zero.
_SATURATING = {"tanh", "sigmoid", "softsign", "hardtanh"}
# Most nodes that a walk back visits. It is enough to find a normalisation or a convolution between two linears.
_MAX_WALK = 400


def find_ffns(graph: GraphModule) -> tuple[list[FFN], list[Rejection]]:
    """Return the feed-forward layers of the graph in topological order, and the refused candidates with reasons.

    Raises:
        UsageError: it is no graph of ATen ops.
    """
    check_graph(graph, "find_ffns")
    sites, rejections = _Search(graph).run()
    return sites, [*rejections, *refused_in_regions(graph, lambda copy: _Search(copy).run())]


def find_linear_sites(graph: GraphModule) -> tuple[list[LinearSite], list[Rejection]]:
    """Return the linear layers outside feed-forward layers, grouped by weight, and the refused candidates.

    Raises:
        UsageError: it is no graph of ATen ops.
    """
    check_graph(graph)
    sites, rejections = _standalone(graph)
    return sites, [*rejections, *refused_in_regions(graph, _standalone)]


def find_all_linears(graph: GraphModule) -> tuple[list[LinearSite], list[Rejection]]:
    """Return every linear layer, also those in feed-forward layers and heads, grouped by weight, and refused ones.

    Raises:
        UsageError: it is no graph of ATen ops.
    """
    check_graph(graph)
    sites, rejections = _every_linear(graph)
    return sites, [*rejections, *refused_in_regions(graph, _every_linear)]


def _every_linear(graph: GraphModule) -> tuple[list[LinearSite], list[Rejection]]:
    linears, opaque = find_linears(graph)
    uses = WeightUses(graph)
    groups: dict[tuple[object, ...], list[Linear]] = defaultdict(list)
    for linear in linears:
        groups[uses.key(linear.weight)].append(linear)
    sites = []
    rejections = [Rejection("unreadable-linear", one.why, one.path, one.output.name) for one in opaque]
    for calls in groups.values():
        refused = unsound(graph, calls[:1])
        if refused is None:
            sites.append(LinearSite(calls[0].path, tuple(calls)))
        else:
            rejections.append(replace(refused, path=calls[0].path, node=calls[0].output.name))
    return _unique(sites), rejections


def _unique(sites: list[LinearSite]) -> list[LinearSite]:
    """Name layers whose weights lie in the same module by their weights."""
    count = Counter(site.path for site in sites)
    return [replace(site, path=str(site.calls[0].weight.target)) if count[site.path] > 1 else site for site in sites]


def _standalone(graph: GraphModule) -> tuple[list[LinearSite], list[Rejection]]:
    linears, _ = find_linears(graph)
    ffns, _ = _Search(graph).run()
    in_ffn = {part.output for ffn in ffns for call in ffn.calls for part in (*call.first, call.down)}
    uses = WeightUses(graph)
    groups: dict[tuple[object, ...], list[Linear]] = defaultdict(list)
    for linear in linears:
        if linear.output not in in_ffn:
            groups[uses.key(linear.weight)].append(linear)
    sites, rejections = [], []
    for calls in groups.values():
        path = calls[0].path
        outside = uses.outside(calls[0].weight, {node for call in calls for node in call.nodes})
        if outside is not None:
            what = f"its weight is also used by {_user_name(outside)}"
            rejections.append(Rejection("weight-is-shared", what, path, outside.name))
        elif any(_is_head(call) for call in calls):
            what = "it computes the model's output (a head)"
            rejections.append(Rejection("head", what, path, calls[0].output.name))
        elif (refused := unsound(graph, calls[:1])) is not None:
            rejections.append(replace(refused, path=path, node=calls[0].output.name))
        else:
            sites.append(LinearSite(path, tuple(calls)))
    return sites, rejections


class WeightUses:
    """The nodes that read each tensor of the graph, under all names of the tensor."""

    def __init__(self, graph: GraphModule) -> None:
        self._graph = graph
        self._users: dict[tuple[object, ...], list[Node]] = defaultdict(list)
        for node in graph.graph.nodes:
            if tensor_of(graph, node) is not None:
                self._users[self.key(node)].extend(node.users)

    def key(self, node: Node) -> tuple[object, ...]:
        """Identify the memory that a `get_attr` node reads."""
        tensor = tensor_of(self._graph, node)
        assert tensor is not None
        return tensor_key(tensor)

    def outside(self, weight: Node, inside: set[Node]) -> Node | None:
        """Return a node that reads the weight and is not in `inside`, or None."""
        return next((user for user in self._users[self.key(weight)] if user not in inside), None)


def _is_head(linear: Linear) -> bool:
    """Whether the output reaches the graph's output through nothing but views, copies and casts."""
    return any(user.op == "output" for user in walk_users(linear.output, carries_values))


def _user_name(node: Node) -> str:
    return f"'{module_path(node) or node.name}'"


@dataclass
class _Walk:
    """The nodes found on a walk back from a second linear."""

    nodes: set[Node] = field(default_factory=set)
    leaves: list[Linear] = field(default_factory=list)
    barriers: list[tuple[Node, str]] = field(default_factory=list)
    outside: list[Node] = field(default_factory=list)
    parameters: list[Node] = field(default_factory=list)
    attention: bool = False

    @property
    def has_activation(self) -> bool:
        return any(
            op_name(node).rstrip("_") not in (LINEAR_OPS | CREATION_OPS)
            for node in self.nodes
            if node.op == "call_function"
            and node.target not in (SHAPE_OPS - {aten.glu.default})
            and node.target not in DROPOUTS
            and not is_copy(node)
            and node not in self.barrier_nodes
        )

    @property
    def barrier_nodes(self) -> set[Node]:
        """The barrier nodes, except those that also act as activations."""
        return {node for node, _ in self.barriers if not activates(node)}


class _Search:
    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.graph.nodes)}
        self.linears, self.opaque = find_linears(graph)
        self.by_output = {linear.output: linear for linear in self.linears}
        self.opaque_outputs = {linear.output: linear for linear in self.opaque}
        self.uses = WeightUses(graph)
        self.from_inputs = self._reached_by_inputs()
        self.rejections: list[Rejection] = []

    def run(self) -> tuple[list[FFN], list[Rejection]]:
        found: list[FFN] = []
        taken: dict[Linear, FFN] = {}
        candidates: list[Linear | OpaqueLinear] = sorted(
            [*self.linears, *self.opaque], key=lambda linear: self.order[linear.output]
        )
        for down in candidates:
            site = self._candidate(down)
            if site is None:
                continue
            if isinstance(site, FFN):
                call = site.calls[0]
                clash = next((taken[part] for part in (*call.first, call.down) if part in taken), None)
                if clash is not None:
                    site = self._reject(
                        down, call.first, "shares-a-linear", f"it shares a linear with the FFN at '{clash.path}'"
                    )
                elif call.x not in self.from_inputs:
                    site = self._reject(
                        down, call.first, "constant", "it computes a constant: it does not depend on the model's input"
                    )
            if isinstance(site, Rejection):
                self.rejections.append(site)
                continue
            found.append(site)
            taken.update(dict.fromkeys((*site.calls[0].first, site.calls[0].down), site))
        marked = projections(self.graph)
        sites = _with_unique_paths(self._group(found))
        return [replace(site, is_projection=site.path in marked) for site in sites], self.rejections

    def _reached_by_inputs(self) -> set[Node]:
        reached: set[Node] = set()
        for node in self.graph.graph.nodes:
            if node.op == "placeholder" or any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return reached

    def _candidate(self, down: Linear | OpaqueLinear) -> FFN | Rejection | None:
        """Return the site that ends in `down`, a rejection if it only looks like a site, or None if it does not."""
        walk = self._walk(down.input)
        if walk.leaves and walk.barriers and walk.outside:
            # The first linear's own input, if it is read again between the two, is a value from outside.
            walk = self._walk(down.input, stops={leaf.input for leaf in walk.leaves})
        if walk.attention or not walk.leaves or (walk.barriers and walk.outside):
            return None
        leaves = sorted(walk.leaves, key=lambda leaf: self.order[leaf.output])
        plain_chain = not walk.barriers and not walk.outside and not walk.parameters and len(leaves) == 1
        product = len(leaves) == 2 and any(op_name(node) in ("mul", "mul_") for node in walk.nodes)
        if not walk.has_activation and not plain_chain and not product:
            return None
        if walk.barriers:
            node, what = walk.barriers[0]
            return self._reject(down, leaves, "barrier", f"{what} ({op_name(node)}) stands between the linears", node)
        if walk.outside:
            node = walk.outside[0]
            what = f"a value from outside, computed by {_user_name(node)} ({op_name(node)}), enters between the linears"
            return self._reject(down, leaves, "value-from-outside", what, node)
        if isinstance(down, OpaqueLinear):
            return self._reject(down, leaves, "unreadable-linear", f"the second linear: {down.why}")
        opaque = next((self.opaque_outputs[leaf.output] for leaf in leaves if leaf.output in self.opaque_outputs), None)
        if opaque is not None:
            return self._reject(down, leaves, "unreadable-linear", f"the first linear: {opaque.why}")
        if len(leaves) > 2:
            return self._reject(
                down, leaves, "too-many-linears", f"{len(leaves)} linears feed the second one; a gated FFN has two"
            )
        nodes, constants = (tuple(sorted(part, key=self.order.__getitem__)) for part in (walk.nodes, walk.parameters))
        cone = Cone(nodes, tuple(leaves), down.input, down.in_features, constants)
        used_outside = self._escape(cone, down)
        if used_outside is not None:
            value, user = used_outside
            what = f"the hidden values ({value.name}) are also used outside the FFN, by {_user_name(user)}"
            return self._reject(down, leaves, "escapes", what, user)
        found = unsound(self.graph, (*leaves, down)) or identify(self.graph, cone)
        if isinstance(found, Rejection):
            if constants and found.code not in ("weights-differ", "unusable-weights"):
                name = name_of(self.graph, constants[0])
                what = f"a parameter ('{name}') stands between the linears and does more than scale the neurons"
                return self._reject(down, leaves, "parameter-between", what)
            return self._reject(down, leaves, found.code, found.reason)
        if found.gate_leaf == 1:
            leaves = leaves[::-1]
            found = replace(found, gate_leaf=0)
        if len({leaf.input for leaf in leaves}) > 1:
            return self._reject(down, leaves, "different-inputs", "gate and up read different inputs")
        if not _keeps_tokens(leaves[0].input, down.output):
            return self._reject(
                down, leaves, "tokens-reshaped", "the leading (token) dimensions change between the linears"
            )
        first = leaves[0]
        if found.activation in _SATURATING and not found.gated and down.in_features <= first.in_features:
            widths = f"{first.in_features}→{down.in_features}→{down.out_features}"
            what = f"{found.activation} between linears {widths} is a pooler or a classifier head, not an FFN"
            return self._reject(down, leaves, "pooler", what)
        dropout = max((float(node.args[1]) for node in cone.nodes if node.target in DROPOUTS), default=0.0)  # type: ignore[arg-type]
        call = LayerCall(tuple(leaves), cone.nodes, down)
        return FFN(_ffn_path(leaves, down), (call,), found, down.in_features, dropout)

    def _walk(self, start: Node, stops: Set[Node] = frozenset()) -> _Walk:
        """Walk back from a second linear's input to the linears it comes from, and no further than `stops`."""
        walk = _Walk()
        # A layer that depends on no input at all is refused as a whole.
        fold = start in self.from_inputs
        # The walk continues through the nodes that are added to `walk.nodes`.
        tensors = (node for node in walk_sources(start, walk.nodes.__contains__) if _is_tensor(node))
        for node in islice(tensors, _MAX_WALK):
            if node in stops:
                walk.outside.append(node)
            elif node in self.by_output:
                walk.leaves.append(self.by_output[node])
            elif node in self.opaque_outputs:
                opaque = self.opaque_outputs[node]
                width = int(node.meta["val"].shape[-1])
                walk.leaves.append(Linear(node, node, None, False, 0, width, opaque.nodes, node, unflattens=False))
            elif node.op == "get_attr":
                if is_constant(self.graph, node):
                    walk.parameters.append(node)
            elif fold and node not in self.from_inputs and is_constant(self.graph, node):
                walk.parameters.append(node)
            elif node.op == "call_function" and node.target in PRODUCTS:
                walk.attention = True
            elif (what := barrier(node)) is not None:
                walk.barriers.append((node, what))
                walk.nodes.add(node)
            elif self._passes_through(node):
                walk.nodes.add(node)
            else:
                walk.outside.append(node)
        return walk

    def _passes_through(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.graph.get_submodule(str(node.target)), IdentityModule)
        if node.op != "call_function":
            return False
        target = node.target
        return target in SHAPE_OPS or target in DROPOUTS or is_copy(node) or is_pointwise(node)

    def _escape(self, cone: Cone, down: Linear) -> tuple[Node, Node] | None:
        """Return (value, user) if a node outside the layer reads a value between its input and its output."""
        inside = set(cone.nodes).union(*(leaf.nodes for leaf in cone.leaves))
        for node in sorted(inside, key=self.order.__getitem__):
            for user in node.users:
                if user not in inside and user not in down.nodes and not is_call(user, aten.sym_size.int):
                    return node, user
        return None

    def _group(self, found: list[FFN]) -> list[FFN]:
        """Join executions that share weights into one site, and refuse weights that other nodes use as well."""
        groups: dict[tuple[object, ...], list[FFN]] = defaultdict(list)
        for ffn in found:
            call = ffn.calls[0]
            parts = (*call.first, call.down)
            tensors = [*(part.weight for part in parts), *(part.bias for part in parts)]
            groups[tuple(None if tensor is None else self.uses.key(tensor) for tensor in tensors)].append(ffn)
        sites = []
        for members in groups.values():
            calls = tuple(member.calls[0] for member in members)
            inside = {node for call in calls for part in (*call.first, call.down) for node in part.nodes}
            weights = [part.weight for part in (*calls[0].first, calls[0].down)]
            outside = next(((w, user) for w in weights if (user := self.uses.outside(w, inside)) is not None), None)
            if outside is not None:
                weight, user = outside
                what = (
                    f"its weight '{weight.target}' is also used by {_user_name(user)}, which is not converted with it"
                )
                self.rejections.extend(
                    Rejection("weight-is-shared", what, member.path, user.name) for member in members
                )
            elif len({self.uses.key(weight) for weight in weights}) < len(weights):
                what = "two of its linears share one weight"
                self.rejections.extend(Rejection("one-weight-twice", what, member.path) for member in members)
            elif len({member.nonlinearity for member in members}) > 1:
                what = "its weights are used in several places with different activations"
                self.rejections.extend(Rejection("different-activations", what, member.path) for member in members)
            else:
                sites.append(replace(members[0], calls=calls))
        return sites

    def _reject(
        self, down: Linear | OpaqueLinear, leaves: Iterable[Linear], code: str, reason: str, node: Node | None = None
    ) -> Rejection:
        return Rejection(code, reason, _ffn_path(leaves, down), (node or down.output).name)


def _keeps_tokens(x: Node, output: Node) -> bool:
    """Whether the output has the input's leading dimensions, or all of them flattened into one."""
    before, after = shape_of(x), shape_of(output)
    if before is None or after is None:
        return False
    if len(before) == len(after):
        return all(map(equal_size, before[:-1], after[:-1]))
    return len(after) == 2


def _ffn_path(leaves: Iterable[Linear], down: Linear | OpaqueLinear) -> str:
    paths = [module_path(leaf.output) if leaf.weight is leaf.output else leaf.path for leaf in leaves]
    return common_path([*paths, down.path]) or paths[0] or down.path


def _with_unique_paths(sites: list[FFN]) -> list[FFN]:
    """Name sites that lie under the same module by their first linear."""
    count = Counter(site.path for site in sites)
    return [replace(site, path=site.calls[0].first[0].path) if count[site.path] > 1 else site for site in sites]


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    if node.op == "get_attr" or isinstance(value, Tensor):
        return True
    return isinstance(value, list | tuple)  # the pieces of a split
