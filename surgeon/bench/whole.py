"""Time a saved surgery end to end at several settings, and the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgeon.bench.timing import TimedCall, captured, median_seconds
from surgeon.display.choose import shows_progress
from surgeon.dynamic.knobs import Knobs, set_knobs, set_tau
from surgeon.dynamic.site import find_dynamic, no_dynamic
from surgeon.errors import UsageError, first_line
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.traced import TracedGraph, fork
from surgeon.inputs.neuron_site import masked_neurons, sparse_neurons
from surgeon.inputs.site import sparse_linear
from surgeon.inputs.skipping import find_skipping
from surgeon.kernels.cpu.crossover import threads as using_threads
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import executed_share, knobs_restored
from surgeon.moe.ops import dynamic_k_ffn, masked_ffn
from surgeon.progress import Progress, ShowProgress


@dataclass(frozen=True)
class TimedSetting:
    """Times of a call at one tau; tau is None for the stored setting.

    executed: share that ran of the multiply-adds that layers can skip. ours, compiled, torch: milliseconds with the
    operators, with the operators and `torch.compile` (None if that fails), and with the torch backend. gain: the faster
    of the dense times over the faster of ours; None without a dense model.
    """

    tau: float | None
    executed: float
    ours: float
    compiled: float | None
    torch: float
    gain: float | None


@dataclass(frozen=True)
class WholeTimes:
    """Times of the dense model and of every setting.

    dense, compiled: milliseconds of the dense model, eager and compiled; None if it was not timed. why: what could not
    be done, such as "The dense model was not compiled", with the reason.
    """

    dense: float | None
    compiled: float | None
    why: dict[str, str]
    settings: list[TimedSetting]


def repeated(inputs: Any, batch: int, length: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat example inputs to `batch` samples of `length` tokens. Returns positional and keyword arguments.

    Tokens are the second dimension of the first input that has one. A length of None leaves them unchanged.

    Raises:
        UsageError: no input has a first dimension, or a second one for `length`; batch or length is below 1.
    """
    args, kwargs = as_args_kwargs(inputs)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for dim, wanted, what in ((0, batch, "samples"), (1, length, "tokens")):
        if wanted is None:
            continue
        size = next((leaf.shape[dim] for leaf in leaves if leaf.dim() > dim), 0)
        if not size or wanted < 1:
            raise UsageError(
                f"The example inputs cannot be repeated to {wanted} {what}: they need a dimension of {what}, and the "
                "number must be at least 1."
            )
        repeat = partial(_repeated, dim=dim, size=size, wanted=wanted)
        args, kwargs = pytree.tree_map(repeat, (args, kwargs))
    return args, kwargs


def _repeated(leaf: Any, dim: int, size: int, wanted: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() <= dim or leaf.shape[dim] != size:
        return leaf
    times = [-(-wanted // size) if at == dim else 1 for at in range(leaf.dim())]
    return leaf.repeat(times).narrow(dim, 0, wanted)


@shows_progress
def time_whole(
    graph: TracedGraph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    taus: Sequence[float | None],
    *,
    dense: GraphModule | None = None,
    seconds: float,
    threads: int,
    progress: ShowProgress = None,
) -> WholeTimes:
    """Time one call at every tau, on the device of the graph. Masked experts are skipped as `lower` would do.

    The graph's own tau is restored afterwards. On a GPU, calls are captured in CUDA graphs, except those of the torch
    backend and those that cannot be captured: see `why`.

    Args:
        args, kwargs, dense: on the device of the graph. dense: the model before the surgery.
        taus: None means the stored setting. seconds: average time spent on each call.

    Raises:
        UsageError: the graph has no layers that skip, or does not take these inputs.
    """
    if not find_dynamic(graph):
        raise no_dynamic("The model", "there is nothing to compare", ", then lower")
    ours = _with_ops(graph, dynamic_k_ffn, sparse_linear, sparse_neurons)
    ops = torch.ops.surgeon  # the plain graph shares tau with `ours`, as forks do
    plain = _with_ops(graph, ops.dynamic_k_ffn_torch.default, ops.sparse_linear_torch.default, masked_neurons)
    device = next(graph.parameters()).device
    calls: dict[str, TimedCall] = {}
    why: dict[str, str] = {}
    if not all(site.skips for site in find_skipping(graph)):
        why["Layers that are not lowered read everything"] = "run the pass lower"
    done, steps = 0, 2 + len(taus) + 2 * (dense is not None)
    if callable(progress):
        progress(Progress("bench", 0, 0))

    def report() -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(Progress("bench", done, steps, {}))

    with knobs_restored(ours) as own, torch.inference_mode(), using_threads(threads):
        if dense is not None:
            model = dense
            _try(model, *args, **kwargs)
            as_it_is: Callable[[], object] = partial(model, *args, **kwargs)
            calls["dense"] = TimedCall(as_it_is, waits=_waits("dense model", as_it_is, device, why))
            report()
            compiled = _compiled("dense model", model, args, kwargs, why)
            if compiled is not None:
                calls["compiled"] = TimedCall(compiled, waits=_waits("compiled dense model", compiled, device, why))
            report()
        shares = []
        _try(ours, *args, **kwargs)
        ways: dict[str, Callable[[], object] | None] = {
            "ours": partial(ours, *args, **kwargs),
            "torch": partial(plain, *args, **kwargs),
            "compiled": _compiled("rewritten model", ours, args, kwargs, why),
        }
        waits = {"torch": True}
        for name, what in (("ours", "rewritten model"), ("compiled", "compiled rewritten model")):
            if (call := ways[name]) is not None:
                waits[name] = _waits(what, call, device, why)
        report()
        for index, tau in enumerate(taus):
            around = _choosing(ours, own, tau)
            with around():
                meter = ExpertMeter(ours)
                meter.call(args, kwargs)
                shares.append(executed_share(meter.layers))
                for name, call in ways.items():
                    if call is not None:
                        call()
                        calls[f"{name} {index}"] = TimedCall(call, around, waits[name])
            report()
        found = median_seconds(calls, device, seconds=seconds, threads=threads)
    times = {name: 1000 * taken for name, taken in found.items()}
    best = min((times[name] for name in ("dense", "compiled") if name in times), default=None)
    settings = []
    for index, (tau, share) in enumerate(zip(taus, shares, strict=True)):
        eager, compiled_ours = times[f"ours {index}"], times.get(f"compiled {index}")
        fastest = eager if compiled_ours is None else min(eager, compiled_ours)
        gain = None if best is None else best / fastest
        settings.append(TimedSetting(tau, share, eager, compiled_ours, times[f"torch {index}"], gain))
    return WholeTimes(times.get("dense"), times.get("compiled"), why, settings)


def _with_ops(graph: TracedGraph, experts: Any, linear: Any, neurons: Any) -> TracedGraph:
    """The graph with its experts and its lowered layers that skip inputs or neurons run by these operators."""
    copied = fork(graph)
    for node in copied.graph.nodes:
        if node.op == "call_function" and node.target in (dynamic_k_ffn, masked_ffn):
            node.target = experts
        elif node.op == "call_function" and node.target is sparse_linear:
            node.target = linear
        elif node.op == "call_function" and node.target is sparse_neurons:
            node.target = neurons
    copied.recompile()
    return copied.eval()


def _try(call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except Exception as error:  # a model may raise anything
        raise UsageError(
            f"The model cannot be called with this number of samples or tokens ({first_line(error)}).",
            python="Give other numbers of them.",
            command="Give another --batch or --length.",
        ) from error


def _compiled(
    name: str, model: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: dict[str, str]
) -> Callable[[], object] | None:
    """Compile a model and call it once. If that fails, write the reason to `why`."""
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    try:
        compiled(*args, **kwargs)
    except Exception as error:  # compilers raise many types
        why[f"The {name} was not compiled"] = first_line(error)
        return None
    return lambda: compiled(*args, **kwargs)


def _waits(name: str, call: Callable[[], object], device: torch.device, why: dict[str, str]) -> bool:
    """Whether a call cannot be captured on this device. If so, write the reason to `why`."""
    if device.type == "cpu":
        return False
    try:
        captured(call)
    except RuntimeError as error:
        torch.cuda.synchronize()
        why[f"Calls of the {name} are started from Python, not from a CUDA graph"] = first_line(error)
        return True
    return False


def _choosing(graph: TracedGraph, own: Knobs, tau: float | None) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def chosen() -> Iterator[None]:
        set_knobs(graph, own)
        if tau is not None:
            set_tau(graph, tau)
        yield

    return chosen
