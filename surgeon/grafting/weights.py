"""Give a grafted model its weights: those of the graph, and the model's own where the graph has none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgeon.errors import UsageError
from surgeon.graph.traced import TracedGraph


@torch.no_grad()
def take_weights(
    made: nn.Module,
    graph: TracedGraph,
    layers: Mapping[str, nn.Module],
    trained: Mapping[str, nn.Parameter],
    *,
    share: bool,
) -> tuple[str, ...]:
    """Give the copy the graph's weights, and the model's where the graph has none. Tied weights stay tied.

    trained: weights that the graph has in another form, by their names in the model.

    Returns:
        The names of the weights that stay the model's.
    """
    of_graph: dict[str, Tensor] = {
        **dict(graph.named_buffers(remove_duplicate=False)),
        **dict(graph.named_parameters(remove_duplicate=False)),
        **trained,
    }
    of_layers = {f"{path}.{name}" for path, module in layers.items() for name in _names(module)}
    tensors = [*made.named_parameters(remove_duplicate=False), *made.named_buffers(remove_duplicate=False)]
    device = next((tensor.device for name, tensor in tensors if name not in of_layers), torch.device("cpu"))
    new: dict[int, Tensor] = {}
    taken: set[int] = set()
    for name, old in tensors:
        if name in of_layers:
            # Trunks that routers share in the graph become each router's own, since they are not tied in the model.
            fresh = old if share and id(old) not in taken else _cloned(old)
            taken.add(id(old))
            owner, _, field_name = name.rpartition(".")
            setattr(made.get_submodule(owner), field_name, _to(fresh, device))
            continue
        own = of_graph.get(name)
        if own is None:
            continue  # a tied weight has several names, of which the graph may know another
        if own.shape != old.shape:
            shapes = f"the shape {tuple(old.shape)}, and in the graph {tuple(own.shape)}"
            raise UsageError(f"In the model {name} has {shapes}. Give the model that the graph was made from.")
        if id(old) not in new:
            new[id(old)] = _to(own if share else _cloned(own), device)
    kept = []
    for name, old in tensors:
        if name in of_layers:
            continue
        if id(old) not in new:
            new[id(old)] = _cloned(old)
            kept += [name] * isinstance(old, nn.Parameter)
        owner, _, field_name = name.rpartition(".")
        setattr(made.get_submodule(owner), field_name, new[id(old)])
    return tuple(kept)


def _cloned(tensor: Tensor) -> Tensor:
    fresh = tensor.detach().clone()
    return nn.Parameter(fresh, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    if moved.data_ptr() == tensor.data_ptr():
        return tensor
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]]
