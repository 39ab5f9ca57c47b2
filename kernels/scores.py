"""The functions of routers, which turn a layer's input into scores of its experts."""

from __future__ import annotations

from typing import Any, Literal

import torch

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
