"""The functions of routers, which turn a layer's input into scores of its experts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from surgeon.kernels.activations import activation as find

aten = torch.ops.aten

Hidden = Literal["relu", "tanh"]
Output = Literal["abs", "relu", "softplus", "exp", "sigmoid"]

HIDDEN: dict[str, Any] = {"relu": aten.relu.default, "tanh": aten.tanh.default}
"""The activations of a trunk, as ops."""
# Softplus is close to a ReLU on targets from 0 to 1, but positive down to -2, where float32 underflows. Scores that are
# all zero would be equal, and a rule could not rank them.
OUTPUT: dict[Output, tuple[Any, ...]] = {
    "abs": (aten.abs.default,),
    "relu": (aten.relu.default,),
    "softplus": (aten.softplus.default, 50.0),
    "exp": (aten.exp.default,),
    "sigmoid": (aten.sigmoid.default,),
}
"""Each function of the scores as an op and its further arguments."""


def _neuron_size(first: Tensor, up: Tensor | None, activation: str) -> Tensor:
    act = find(activation)
    hidden = act.fn(first)
    if up is not None:
        hidden = hidden * (up if act.up is None else act.up.fn(up))
    return hidden.abs()


_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registration below: it lasts as long as it does."""

_library.define("neuron_size(Tensor first, Tensor? up, str activation) -> Tensor")  # type: ignore[no-untyped-call]
# Composite: autograd and compilers see through it, yet export keeps it as one node, which names the activation.
_library.impl("neuron_size", _neuron_size, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

neuron_size = torch.ops.surgeon.neuron_size.default
"""The sizes of hidden values, from what goes into the activation and, in a gated layer, the outputs of the other
linear: |activation(first) · up|. All are [..., m]."""
