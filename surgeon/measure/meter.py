"""Count the cost of a graph: parameters, multiply-adds, and the share of the experts that ran.

At an early exit, what counts as an expert is all that follows up to the next one, and a sample takes a token's place.
Where tokens halt, it is the block behind the place (`surgeon.measure.halting`). Both are measured with all samples and
tokens computed, whatever their form: then it is known what is skipped.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.dynamic.site import DynamicSite, find_dynamic, no_dynamic
from surgeon.exits.halting import HaltSite, tokens_that_stay
from surgeon.exits.site import ExitSite
from surgeon.graph.calls import as_args_kwargs, flat_inputs, unflatten_output
from surgeon.graph.traced import is_call, tensor_key
from surgeon.inputs.site import Skipping
from surgeon.inputs.skipping import SkippingSite
from surgeon.kernels.dynamic_k import selected
from surgeon.kernels.early_exit import exit_or, leaves
from surgeon.kernels.int8 import route
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.measure.cost import Cost, LayerRun
from surgeon.measure.halting import LiveTokens, attention_products
from surgeon.measure.multiply_adds import Counter
from surgeon.moe.int8 import parameter_sizes
from surgeon.moe.module import MoE
from surgeon.moe.ops import masked_ffn, selection_threshold
from surgeon.moe.router import expert_norms
from surgeon.moe.site import MoESite, find_moes


def parameter_count(model: nn.Module) -> int:
    """Count the numbers in the model's parameters. Parameters that share memory count once.

    A layer with 8-bit weights counts as the float layer that it was made of: see `surgeon.moe.int8.parameter_sizes`.
    """
    sizes = {tensor_key(parameter): parameter.numel() for parameter in model.parameters()}
    for site in find_moes(model):
        if site.form == "int8":
            layer = model.get_submodule(site.path)
            sizes |= {tensor_key(getattr(layer, name)): size for name, size in parameter_sizes(layer).items()}
    return sum(sizes.values())


def measure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Cost, dict[str, LayerRun]]:
    """Measure the cost of one call, and what each expert layer ran in it, by path.

    The model is run once, in its present mode.

    Args:
        model: a graph, a model with converted layers, or any other module.
        args, kwargs: the inputs of the call, on the model's device.

    Returns:
        The cost of the call, and for every layer that skips what it ran.
    """
    meter = ExpertMeter(model)
    with torch.no_grad(), _countable(model), Counter() as counter:
        meter.call(args, kwargs)
    counted = counter.multiply_adds
    # What the experts computed, filling included, is replaced by what counts.
    for site in meter.sites.values():
        layer = meter.layers[site.path]
        counted -= layer.multiply_adds if isinstance(site, ExitSite) else layer.computed
    everything = sum(layer.multiply_adds for layer in meter.layers.values())
    ran = sum(layer.executed_multiply_adds for layer in meter.layers.values())
    share = ran / everything if everything else None
    return Cost(parameter_count(model), counted + everything, counted + ran, share, counter.uncounted), meter.layers


@contextlib.contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients, and `nn.TransformerEncoderLayer` run op by op.

    torch's counter fails at a branch (`torch.cond`) with a parameter that requires them, and has no formula for the one
    op that such a layer is in evaluation.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def clock(device: torch.device) -> float:
    """Return the seconds since an arbitrary start, after the device has finished all its work.

    A GPU works asynchronously. Without waiting, only the time to launch a call would be measured.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and device.type == accelerator.type:
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def token_load(model: nn.Module, inputs: Any) -> Tensor:
    """Measure how much of the experts each token runs, from 0 to 1: Σ cost of those that ran / Σ cost of all.

    The sums are over the layers (D2DMoE, load maps of its section on spatial load). Inputs and neurons that layers can
    skip count like experts.

    Args:
        inputs: the inputs of one call: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Returns:
        float32 in the leading shape that most of these layers have, [B, T] for a transformer, with padding. Layers with
        another shape, such as a pooler, are left out.

    Raises:
        UsageError: the model has no layers that skip.
    """
    args, kwargs = as_args_kwargs(inputs)
    meter = ExpertMeter(model)
    if all(isinstance(site, ExitSite) for site in meter.sites.values()):
        raise no_dynamic("The model", "no token has a load")
    seen: list[tuple[Tensor, Tensor]] = []
    meter.on_selection = lambda site, ran: seen.append((ran, torch.tensor(site.costs).to(ran.device)))
    with torch.no_grad():
        meter.call(args, kwargs)
    usual = collections.Counter(ran.shape[:-1] for ran, _ in seen).most_common(1)[0][0]
    chosen = [(ran, costs) for ran, costs in seen if ran.shape[:-1] == usual]
    whole = sum(int(costs.sum()) for _, costs in chosen)
    return torch.stack([(ran * costs).sum(-1) for ran, costs in chosen]).sum(0).float() / whole


class ExpertMeter:
    """Runs a model and counts the expert-token pairs that ran in every expert layer. Counts add up over calls.

    token_mask: a function from the leading dimensions of a layer's tokens to a mask that is True for tokens that count.
        None counts all tokens.
    stay: bool [B], the samples of the present call that have left at no early exit so far. None before the first exit.
    live: the tokens of the present call that have not halted, while one of the blocks runs that they can halt before.
    on_selection: called with each layer and its selected experts, bool [..., E].
    on_tokens: called with each layer, the inputs [N, d_in] of tokens that count and their selected experts, [N, E].
    on_scores: called with each layer with a router, the same, and the scores, [N, E].
    """

    def __init__(self, model: nn.Module, *, oracle: bool = False) -> None:
        """Prepare to run a graph, or a model with converted layers.

        oracle: the true norms of the experts' outputs replace the router's scores.
        """
        self.module, self.oracle = model, oracle
        self.sites: dict[str, DynamicSite] = {site.path: site for site in find_dynamic(model)}
        self.layers = {
            path: LayerRun(per_token=site.router_parameters, gate=site.gate_multiply_adds)
            for path, site in self.sites.items()
        }
        self.token_mask: Callable[[Sequence[int]], Tensor | None] | None = None
        self.stay: Tensor | None = None
        self.live: LiveTokens | None = None
        self.on_selection: Callable[[DynamicSite, Tensor], None] | None = None
        self.on_tokens: Callable[[DynamicSite, Tensor, Tensor], None] | None = None
        self.on_scores: Callable[[MoESite, Tensor, Tensor, Tensor], None] | None = None
        self._run = _GraphRun(model, self) if isinstance(model, GraphModule) else None

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model with its own arguments and return its output."""
        self.stay = self.live = None
        if self._run is not None:
            graph = self._run.module
            assert isinstance(graph, GraphModule)
            flat = self._run.run(*flat_inputs(graph, args, kwargs), enable_io_processing=False)
            return unflatten_output(graph, flat)
        with self.counting():
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what every call of a model that is not a graph runs, for example inside of `generate`."""
        modules: dict[str, Any] = {path: self.module.get_submodule(path) for path in self.sites}
        for path, module in modules.items():
            module.forward = functools.partial(self._forward, self.sites[path], module, module.forward)
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward

    def _forward(self, site: DynamicSite, module: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        assert not isinstance(site, ExitSite | HaltSite), "only graphs have early exits"
        if isinstance(site, Skipping):
            return self.skipping(site, x, lambda: forward(x))
        return self.layer(site, x, lambda: module.route(x), lambda: forward(x), lambda: module.output_bias)

    def layer(
        self,
        site: MoESite,
        x: Tensor,
        route: Callable[[], tuple[Tensor, Tensor]],
        run: Callable[[], Tensor],
        b2: Callable[[], Tensor | None],
    ) -> Tensor:
        """Run one expert layer and count the selected experts.

        route: returns the scores and the threshold of its router. run: runs it. b2: returns its output bias.
        """
        # The flop counter must not count what the meter itself computes.
        with _disable_current_modes(), torch.no_grad():
            scores, threshold = _oracle(site, x) if self.oracle else route()
            self._count(site, x, selected(scores, threshold), scores)
            if self.oracle:
                return masked_ffn(x, scores, threshold, *site.weights, b2(), site.activation)  # type: ignore[no-any-return]
        return self._timed(site, x, run)

    def skipping(self, site: SkippingSite, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run one layer that skips inputs or neurons and count those that it keeps. run: runs it."""
        with _disable_current_modes(), torch.no_grad():
            self._count(site, x, site.kept(x))
        return self._timed(site, x, run)

    def _timed(self, site: DynamicSite, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        started = clock(x.device)
        result = run()
        self.layers[site.path].seconds += clock(x.device) - started
        return result

    def leave(self, site: ExitSite, logits: Tensor) -> None:
        """Count the samples that stay at an early exit. logits: what its head answers, [B, C]."""
        with _disable_current_modes(), torch.no_grad():
            stay = ~leaves(logits, site.tau)
            self.stay = stay if self.stay is None else self.stay & stay
            layer = self.layers[site.path]
            layer.tokens += len(stay)
            layer.pairs += len(stay)
            layer.ran += int(self.stay.sum())

    def follow(self, site: ExitSite, multiply_adds: int) -> None:
        """Count what follows an early exit up to the next one. multiply_adds: of all samples of the present call."""
        assert self.stay is not None
        layer = self.layers[site.path]
        layer.multiply_adds += multiply_adds
        layer.executed_multiply_adds += multiply_adds * int(self.stay.sum()) // max(1, len(self.stay))

    def halt(self, site: HaltSite, x: Tensor, total: Tensor) -> LiveTokens:
        """Count the tokens that have not halted. x: [B, T, d]. total: the sum of their scores, [B, T]."""
        with _disable_current_modes(), torch.no_grad():
            found = LiveTokens(total, None if self.token_mask is None else self.token_mask(total.shape))
            layer, ran = self.layers[site.path], found.live.unsqueeze(-1)
            if self.on_selection is not None:
                self.on_selection(site, ran)
            if self.on_tokens is not None:
                self.on_tokens(site, x[found.real], ran[found.real])
            tokens = int(found.real.sum())
            layer.tokens += tokens
            layer.pairs += tokens
            layer.ran += int(ran.sum())
            return found

    def compute(self, site: HaltSite, found: LiveTokens, multiply_adds: int, *, squared: bool) -> None:
        """Count a part of the block behind a place where tokens halt.

        multiply_adds: of all tokens of the present call. squared: whether they are those of an attention.
        """
        layer = self.layers[site.path]
        real, live = found.shares(squared=squared)
        layer.computed += multiply_adds
        layer.multiply_adds += round(real * multiply_adds)
        layer.executed_multiply_adds += round(live * multiply_adds)

    def _count(self, site: MoESite | SkippingSite, x: Tensor, ran: Tensor, scores: Tensor | None = None) -> None:
        if not (self.oracle and isinstance(site, MoESite)):  # what stands in for the layer then is not counted
            pairs = ran.numel() if site.counts_skipped else int(ran.sum())
            self.layers[site.path].computed += pairs * site.expert_multiply_adds
        if self.stay is not None:
            ran = ran & _of_tokens(self.stay, ran)
        if self.live is not None:
            ran = ran & self.live.live.reshape(*ran.shape[:-1], 1)
        if self.on_selection is not None:
            self.on_selection(site, ran)
        mask = None if self.token_mask is None else self.token_mask(ran.shape[:-1])
        if mask is not None:
            x, ran, scores = x[mask], ran[mask], None if scores is None else scores[mask]
        if self.on_tokens is not None:
            self.on_tokens(site, _rows(x), _rows(ran))
        if self.on_scores is not None and scores is not None:
            assert isinstance(site, MoESite)
            self.on_scores(site, _rows(x), _rows(ran), _rows(scores))
        layer, costs = self.layers[site.path], site.costs
        tokens = math.prod(ran.shape[:-1])
        of_experts: list[int] = ran.reshape(-1, len(costs)).sum(0).tolist()
        layer.tokens += tokens
        layer.pairs += tokens * len(costs)
        layer.ran += sum(of_experts)
        layer.multiply_adds += tokens * sum(costs)
        layer.executed_multiply_adds += sum(map(operator.mul, of_experts, costs))


def _rows(values: Tensor) -> Tensor:
    """Values [..., n] as [N, n]."""
    return values.reshape(-1, values.shape[-1])


def _of_tokens(stay: Tensor, ran: Tensor) -> Tensor:
    """Whether each token's sample stays, for a layer that ran [B, ..., E] or, flattened, [B · T, E]."""
    times = 1 if ran.dim() > 2 else len(ran) // max(1, len(stay))
    return stay.repeat_interleave(times).reshape(-1, *[1] * (ran.dim() - 1))


def _oracle(site: MoESite, x: Tensor) -> tuple[Tensor, Tensor]:
    norms = expert_norms(x.reshape(-1, x.shape[-1]), site.routed, site.activation).reshape(*x.shape[:-1], -1)
    threshold = selection_threshold(norms, site.tau, site.rule)
    return F.pad(norms, (site.shared, 0), value=math.inf), threshold


class _GraphRun(Interpreter):
    """Runs a graph node by node, and its expert layers through a meter."""

    def __init__(self, graph: GraphModule, meter: ExpertMeter) -> None:
        super().__init__(graph)
        self.meter = meter
        self._site_of: dict[Node, DynamicSite] = {node: site for site in meter.sites.values() for node in site.nodes}
        self._exits = {site.logits: site for site in meter.sites.values() if isinstance(site, ExitSite)}
        self._rows = {site.rows for site in self._exits.values() if site.rows is not None}
        halts = [site for site in meter.sites.values() if isinstance(site, HaltSite)]
        self._halts = {site.total: site for site in halts}
        self._rows |= {site.rows for site in halts if site.rows is not None}
        self._block_of = {node: site for site in halts for node in site.block}
        self._attention = attention_products(graph, halts)
        self._live: dict[HaltSite, LiveTokens] = {}
        # The last exit that samples came to, the multiply-adds up to there, and those that layers count themselves.
        self._last: ExitSite | None = None
        self._before = self._apart = 0
        self._counter: Counter | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph. With early exits or token halting, count the multiply-adds of what can be left out."""
        if not self._exits and not self._halts:
            return super().run(*args, **kwargs)
        self._last, self._before, self._apart = None, 0, 0
        with Counter() as self._counter:
            result = super().run(*args, **kwargs)
            self._close()
        return result

    def _close(self, following: ExitSite | None = None) -> None:
        """Count what followed the last exit. following: the exit that samples come to now, None at the end."""
        assert self._counter is not None
        computed = self._counter.multiply_adds - self._apart
        if self._last is not None:
            self.meter.follow(self._last, computed - self._before)
        self._last, self._before = following, computed

    def run_node(self, n: Node) -> Any:
        """Run one node. Count its multiply-adds if it belongs to a block that tokens can halt before."""
        block = self._block_of.get(n)
        if block is None:
            return self._run_node(n)
        assert self._counter is not None
        self.meter.live = self._live[block]
        before = self._counter.multiply_adds - self._apart
        result = self._run_node(n)
        spent = self._counter.multiply_adds - self._apart - before
        self.meter.compute(block, self.meter.live, spent, squared=n in self._attention)
        self.meter.live = None
        return result

    def _run_node(self, n: Node) -> Any:
        """Run one node. If it is an expert layer, count the selected experts first."""
        site = self._site_of.get(n)
        if site is None and n in self._rows:  # every sample, or every token of each
            (value, *_), _ = self.fetch_args_kwargs_from_env(n)
            if is_call(n, tokens_that_stay):
                return torch.arange(value.shape[1], device=value.device).expand(value.shape)
            return torch.arange(len(value), device=value.device)
        if site is None or isinstance(site, HaltSite):
            result = super().run_node(n)
            if (reached := self._exits.get(n)) is not None:
                self._close(reached)
                self.meter.leave(reached, result)
            if (halting := self._halts.get(n)) is not None:
                self._live[halting] = self.meter.halt(halting, self.env[halting.tokens], result)
            return result
        args, _ = self.fetch_args_kwargs_from_env(n)
        if isinstance(site, ExitSite):
            return exit_or(args[0], args[1 if site.rows is None else 3], site.tau)
        run = functools.partial(super().run_node, n)
        layer = self.meter.layers[site.path]
        before = layer.computed
        result = self._metered(site, n, args, run)
        # What the layer computed is its own, and what its router did is not.
        self._apart += layer.computed - before
        return result

    def _metered(
        self, site: MoESite | SkippingSite, n: Node, args: tuple[Any, ...], run: Callable[[], Tensor]
    ) -> Tensor:
        if isinstance(site, Skipping):
            return self.meter.skipping(site, args[0], run)
        if site.form == "module":
            moe = self.submodules[str(n.target)]
            assert isinstance(moe, MoE)
            return self.meter.layer(site, args[0], lambda: moe.route(args[0]), run, lambda: moe.output_bias)
        if site.form == "int8":
            call = Int8Call(*args)
            return self.meter.layer(site, args[0], lambda: route(call), run, lambda: call.b2)
        return self.meter.layer(site, args[0], lambda: args[1:3], run, lambda: args[8])
