"""The modules of a graph that only hold parameters under the names of the model's modules."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Holder(nn.Module):
    """A module of a graph that is never called, because the graph runs its operators. Hooks on it warn.

    path: its own, in the graph.
    """

    path: str = ""

    def _warn(self) -> None:
        warnings.warn(
            f"'{self.path}' only holds parameters of a graph and is never called, so a hook on it never runs. Put the "
            "hook on the graph itself or on a module that the graph calls (the targets of its call_module nodes).",
            stacklevel=3,
        )

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Warn that the hook never runs."""
        self._warn()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Warn that the hook never runs."""
        self._warn()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Warn that the hook never runs."""
        self._warn()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Warn that the hook never runs."""
        self._warn()
        return super().register_full_backward_pre_hook(*args, **kwargs)


def parameters_only(module: nn.Module) -> nn.Module:
    """Return a tree of plain modules that holds the same parameters and buffers under the same names."""
    holder = nn.Module()
    holder._parameters, holder._buffers = dict(module._parameters), dict(module._buffers)
    for name, child in module.named_children():
        holder.add_module(name, parameters_only(child))
    return holder


def mark_holders(graph: nn.Module) -> None:
    """Make a `Holder` of every module of a graph that torch.fx made for the path of a parameter."""
    for path, module in graph.named_modules():
        if type(module) in (nn.Module, Holder):
            module.__class__ = Holder
            module.path = path
