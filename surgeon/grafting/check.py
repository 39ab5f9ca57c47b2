"""Compare a grafted model with the model and the graph it was made from, and refuse graphs that have no place in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon.graph.agreement import relative_error, tolerance_for
from surgeon.graph.calls import flat_inputs, unflatten_inputs
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph, aten
from surgeon.tracing.narrowing import resized, sizes_of
from surgeon.tracing.setup import copied, run_alone, without_caches

Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """Return the example call and one at other sizes, as far as the graph takes others."""
    sizes = Sizes.parse(graph.meta["trace"].sizes)
    flat = flat_inputs(graph, args, kwargs)
    present = sizes_of(sizes, flat)
    wanted = {
        name: next((n for n in (size + axis.multiple, size - axis.multiple) if n > 0 and n in axis), size)
        for name, size in present.items()
        if (axis := sizes.axes[name])
    }
    calls = [(args, kwargs)]
    if wanted != present:
        other = unflatten_inputs(graph, resized(sizes, flat, wanted))
        try:
            flat_inputs(graph, *other)
        except ValueError:
            return calls  # the sizes depend on one another
        calls.append(other)
    return calls


def outputs(model: nn.Module, calls: list[Call], *, training: bool) -> Iterator[Any]:
    """Yield the model's output of every call. In training, dropout is left out."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        with without_caches(model), _WithoutDropout():  # type: ignore[no-untyped-call]
            for args, kwargs in calls:
                yield run_alone(model, *_on(device, copied((args, kwargs))))
    finally:
        for module, mode in modes.items():
            module.training = mode
        if isinstance(model, TracedGraph):
            model.train(modes[model])


def difference(actual: Iterator[Any], expected: Iterator[Any], model: nn.Module) -> float:
    """Return the largest error over the calls, as a multiple of the accepted one. Above 1 the models differ."""
    worst = 0.0
    for found, wanted in zip(actual, expected, strict=True):
        found, wanted = _common(found, wanted)
        error = relative_error(found, wanted) / tolerance_for(wanted, model)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _common(found: Any, wanted: Any) -> tuple[Any, Any]:
    """Leave out the entries of mappings that a graph has no values for, such as a cache that was not asked for."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = [key for key in wanted if wanted[key] is not None and found.get(key) is not None]
        return {key: found[key] for key in keys}, {key: wanted[key] for key in keys}
    return found, wanted


def _on(device: torch.device, call: Call) -> Call:
    moved: Call = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), call)
    return moved


class _WithoutDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets dropout keep every value as it is, also inside of attention."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is aten.bernoulli_.float:
            # torch's dropout divides by the probability afterwards. A half is the operator's default and is left out.
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        return func(*args, **kwargs)
