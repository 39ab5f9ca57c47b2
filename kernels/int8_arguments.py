"""The arguments of the operator for experts with weights of 8 or 4 bits (`surgeon.kernels.int8`), and their check."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.kernels.activations import activation as find_activation
from surgeon.kernels.arguments import check_tensor
from surgeon.kernels.panels import (
    FLOAT8,
    MOST,
    MOST_HALF,
    WIDEST,
    Int8Experts,
    factors_shape,
    group_size,
    groups_of,
    halves_shape,
    panels_shape,
)
from surgeon.kernels.scores import HIDDEN, OUTPUT
from surgeon.kernels.selection import check_rule

# Activations that are never negative.
_POSITIVE = ("relu", "relu2", "relu6", "sigmoid", "softplus")


class Int8Call(NamedTuple):
    """The arguments of `surgeon::routed_ffn_int8`, as the module describes them."""

    x: Tensor
    tau: Tensor
    rule: str
    shared: int
    x_scale: Tensor | None
    fc1: Tensor | None
    fc1_scale: Tensor | None
    fc1_bias: Tensor | None
    fc2: Tensor
    fc2_bias: Tensor | None
    hidden: str
    output: str
    w1: Tensor
    w1_scale: Tensor
    b1: Tensor | None
    gate: Tensor | None
    gate_scale: Tensor | None
    b_gate: Tensor | None
    w2: Tensor
    w2_scale: Tensor
    y_scale: Tensor
    b2: Tensor | None
    activation: str
    w1_group: Tensor | None = None
    gate_group: Tensor | None = None
    w2_group: Tensor | None = None

    @property
    def router(self) -> tuple[Any, ...]:
        """The arguments of `surgeon::router_scores_int8`."""
        return (
            self.x,
            self.x_scale,
            self.fc1,
            self.fc1_scale,
            self.fc1_bias,
            self.fc2,
            self.fc2_bias,
            self.hidden,
            self.output,
        )

    @property
    def experts(self) -> Int8Experts:
        """The experts' weights."""
        return Int8Experts(*(getattr(self, name) for name in Int8Experts._fields))


def most_inputs(call: Int8Call) -> int:
    """Return the largest of a token's rounded inputs: of integers, or `MOST_HALF` of float16."""
    return MOST_HALF if call.experts.float8 else MOST


def most_hidden(call: Int8Call) -> int:
    """Return the same of hidden values: 255 of integers that are never negative, so that they have no sign."""
    positive = call.activation == "relu_relu" or (call.activation in _POSITIVE and call.gate is None)
    return 255 if positive and not call.experts.float8 else most_inputs(call)


def check_call(*given: Any) -> Int8Call:
    """Return the arguments by name.

    Raises:
        UsageError: they are not as the module describes.
    """
    call = Int8Call(*given)
    check_rule(call.rule)
    find_activation(call.activation)
    check_router(*call.router)
    x, weights = call.x, call.experts
    if weights.w1_scale.dim() != 2:
        raise UsageError(f"int8 FFN: w1_scale needs 2 dimensions [E, s], got {tuple(weights.w1_scale.shape)}")
    if weights.y_scale.dim() != 1:
        raise UsageError(f"int8 FFN: y_scale needs 1 dimension [d_out], got {tuple(weights.y_scale.shape)}")
    (experts, neurons), d_in, d_out = weights.w1_scale.shape, x.shape[-1], weights.y_scale.shape[0]
    neuron = (experts, neurons)
    if max(neurons, d_in) > WIDEST and not weights.float8:
        raise UsageError(f"int8 FFN: at most {WIDEST} inputs, and neurons of an expert, got {d_in} and {neurons}")
    if call.fc2.shape[0] + call.shared != experts:
        raise UsageError(
            f"int8 FFN: the router scores {call.fc2.shape[0]} experts and {call.shared} are shared, but there are "
            f"{experts}"
        )
    gated = weights.gate is not None
    if gated != (weights.gate_scale is not None) or (not gated and weights.b_gate is not None):
        raise UsageError("int8 FFN: gate and gate_scale belong together, and b_gate needs them")
    first, second = (neurons, d_in), (d_out, neurons)
    halves = weights.w1_group is not None
    if (weights.w2_group is not None) != halves or (weights.gate_group is not None) != (halves and gated):
        raise UsageError("int8 FFN: w1_group, gate_group if there is a gate, and w2_group belong together")
    shape_of, dtype = (halves_shape, torch.uint8) if halves else (_panels, FLOAT8 if weights.float8 else torch.int8)
    ups, downs = ((experts, *shape_of(*matrix)) for matrix in (first, second))
    for name, tensor, shape, wanted in (
        ("tau", call.tau, (), None),
        ("w1", weights.w1, ups, dtype),
        ("w1_scale", weights.w1_scale, neuron, None),
        ("b1", weights.b1, neuron, None),
        ("gate", weights.gate, ups, dtype),
        ("gate_scale", weights.gate_scale, neuron, None),
        ("b_gate", weights.b_gate, neuron, None),
        ("w2", weights.w2, downs, dtype),
        ("w2_scale", weights.w2_scale, neuron, None),
        ("y_scale", weights.y_scale, (d_out,), None),
        ("b2", call.b2, (d_out,), None),
    ):
        check_tensor("int8 FFN", name, tensor, shape, x, wanted)
    for name, factors, (rows, columns) in (
        ("w1_group", weights.w1_group, first),
        ("gate_group", weights.gate_group, first),
        ("w2_group", weights.w2_group, second),
    ):
        # Any number of groups that some size gives; w1 and the gate have the same.
        like = weights.w1_group if name == "gate_group" else factors
        groups = like.shape[2] if like is not None and like.dim() == 4 else 1
        there = groups_of(columns, group_size(columns, max(1, groups)))
        check_tensor("int8 FFN", name, factors, (experts, *factors_shape(rows, there)), x, torch.uint8)
    return call


def _panels(rows: int, columns: int) -> tuple[int, ...]:
    return panels_shape(rows, columns, torch.int8)


def check_router(
    x: Tensor,
    x_scale: Tensor | None,
    fc1: Tensor | None,
    fc1_scale: Tensor | None,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    hidden: str,
    output: str,
) -> None:
    """Check the arguments of `surgeon::router_scores_int8`.

    Raises:
        UsageError: they are not as `surgeon.kernels.int8` describes.
    """
    if not x.is_floating_point() or x.dim() < 1:
        raise UsageError(f"int8 FFN: x must be floating with at least 1 dimension, got {x.dtype} {tuple(x.shape)}")
    if hidden not in HIDDEN or output not in OUTPUT:
        raise UsageError(f"int8 FFN: no router with hidden {hidden!r} and output {output!r}")
    if fc2.dim() != 2:
        raise UsageError(f"int8 FFN: fc2 needs 2 dimensions, got {tuple(fc2.shape)}")
    if (fc1 is None) != (fc1_scale is None) or (fc1 is None and fc1_bias is not None):
        raise UsageError("int8 FFN: fc1 and fc1_scale belong together, and fc1_bias needs them")
    (experts, width), d_in = fc2.shape, x.shape[-1]
    if fc1 is not None:
        check_tensor("int8 FFN", "fc1", fc1, panels_shape(width, d_in, torch.int16), x, torch.int16)
    check_tensor("int8 FFN", "x_scale", x_scale, (d_in,), x, None)
    check_tensor("int8 FFN", "fc1_scale", fc1_scale, (width,), x, None)
    check_tensor("int8 FFN", "fc1_bias", fc1_bias, (width,), x, None)
    check_tensor("int8 FFN", "fc2", fc2, (experts, d_in if fc1 is None else width), x, None)
    check_tensor("int8 FFN", "fc2_bias", fc2_bias, (experts,), x, None)
