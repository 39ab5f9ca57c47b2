"""Refuse a model that cannot become a graph of its own weights, before anything reads them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from surgeon.errors import TraceError, UsageError
from surgeon.graph.weights import QUANTISED

_WRAPPERS = {
    "DistributedDataParallel": "Give the module inside it: {}.",
    "FullyShardedDataParallel": "It holds only its share of the weights. Save the full state dict, and load it "
    "into the plain module.",
}
READS_FLOAT8 = "reads_float8"
"""An attribute of modules whose own parameters may be in float8, because their operator reads them."""


def check_ready(model: Any) -> None:
    """Refuse a model whose weights are not all in memory as plain numbers, or whose names a graph cannot have.

    Raises:
        UsageError: `model` is not a module.
        TraceError: it is TorchScript, wrapped for distributed training, or quantised; a weight is on the device meta
            (offloaded), is sparse, or has no shape yet; or a name of its top level is an attribute of every graph. The
            message names the first such part and says what to do.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"The model is a {type(model).__name__}, not a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "The model is TorchScript, which contains no Python modules to trace. Give the model it was made from."
        )
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in _WRAPPERS:
            advice = _WRAPPERS[kind.__name__].format(".".join(filter(None, ("model", name, "module"))))
            raise TraceError(f"The model is wrapped in {kind.__name__}. {advice}")
        if "quantized" in kind.__module__.split("."):
            raise TraceError(f"The module '{name}' ({kind.__module__}.{kind.__name__}) is quantised. {QUANTISED}")
    if isinstance(model, GraphModule):
        ops = [node.target for node in model.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        if op := next((op for op in ops if op.namespace == "quantized_decomposed"), None):
            raise TraceError(f"The model is a graph that was quantised (it has {op}). {QUANTISED}")
    reading = [module for module in model.modules() if hasattr(module, READS_FLOAT8)]
    read = {id(tensor) for module in reading for tensor in module.parameters(recurse=False)}
    for name, tensor in _tensors(model):
        problem = _problem(tensor, float8=id(tensor) in read)
        if problem is not None:
            raise TraceError(f"The weight '{name}' {problem}")
    _check_names(model)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _problem(tensor: Tensor, *, float8: bool) -> str | None:
    """Say why a tensor cannot be a weight of a graph, or None if it can. float8: whether it may be in float8."""
    kind = type(tensor)
    if is_lazy(tensor):
        return "has no shape yet, because its module is lazy. Call the model once on example inputs first."
    if is_traceable_wrapper_subclass(tensor):
        where = f"is stored as {kind.__module__}.{kind.__name__}, not as plain numbers."
        if kind.__name__ == "DTensor":
            return f"{where} Gather it first: replace the parameter by one of its full_tensor()."
        return f"{where} {QUANTISED}"
    if isinstance(tensor, nn.Parameter) and kind is not nn.Parameter and not tensor.is_floating_point():
        return f"is stored as {kind.__module__}.{kind.__name__} in {tensor.dtype}. {QUANTISED}"
    if tensor.device.type == "meta":
        return (
            "is on the device meta, so it has no values. It was offloaded, or the model was built without weights. "
            "Load the model without device_map, or bring offloaded weights back: "
            "accelerate.hooks.remove_hook_from_submodules(model). A model without weights is filled with "
            "model.to_empty(device='cpu') and model.load_state_dict(...)."
        )
    if tensor.is_quantized:
        return f"is stored in {tensor.dtype}. {QUANTISED}"
    if tensor.is_inference():
        return "was made in inference mode and cannot be trained. Give a copy: copy.deepcopy(model)."
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout}). Make it dense: replace it by its to_dense()."
    if tensor.is_floating_point() and tensor.element_size() == 1 and not float8:
        return f"is stored in {tensor.dtype}. Convert the model first, for example with model.to(torch.bfloat16)."
    return None


def _check_names(model: nn.Module) -> None:
    modules = [name for name, _ in model.named_children()]
    tensors = [name for name, _ in _tensors(model) if "." not in name]
    for name in [*modules, *tensors]:
        if name in _graph_attributes() or (name == "self" and name in tensors):
            raise TraceError(
                f"The model's top level has a part named '{name}', which is an attribute of every torch.fx graph. "
                "Rename it, or wrap the model in a module that calls it."
            )


@functools.cache
def _graph_attributes() -> frozenset[str]:
    """Return the names that a graph from `torch.export` has already, whatever its model."""
    program = torch.export.export(nn.Identity(), (torch.zeros(1),))
    return frozenset(dir(program.module(check_guards=False)))
