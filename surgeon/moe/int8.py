"""A feed-forward layer whose experts have weights of 8 or 4 bits: what `quantize` makes of an `MoE`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon.kernels.experts import Experts
from surgeon.kernels.int8 import route
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.panels import (
    FLOAT8,
    Int8Experts,
    factors_shape,
    groups_of,
    halves_shape,
    pack,
    panels_shape,
    quantise_trunk,
)
from surgeon.moe.module import SKIPPED_MEAN, MoE, MoEShape, output_bias
from surgeon.moe.ops import routed_ffn_int8

TENSORS = (
    "x_scale", "fc1", "fc1_scale", "fc1_bias", "fc2", "fc2_bias",
    "w1", "w1_scale", "b1", "gate", "gate_scale", "b_gate", "w2", "w2_scale", "y_scale", "b2",
    "w1_group", "gate_group", "w2_group",
)  # fmt: skip
"""The names of a layer's tensors, in the order of the operator's arguments."""
_SCALES = (
    "x_scale", "fc1_scale", "w1_scale", "gate_scale", "w2_scale", "y_scale", "w1_group", "gate_group", "w2_group"
)  # fmt: skip
INTEGERS = {"fc1": torch.int16, "w1": torch.int8, "gate": torch.int8, "w2": torch.int8}
"""The dtypes of those that are not float32, for weights that are integers of 8 bits."""
_HALVES = dict.fromkeys(("w1", "gate", "w2", "w1_group", "gate_group", "w2_group"), torch.uint8)
_FLOAT8 = dict.fromkeys(("w1", "gate", "w2"), FLOAT8)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def parameter_sizes(layer: nn.Module) -> dict[str, int]:
    """How many numbers of the float layer each parameter of an 8-bit layer stands for, by its name.

    Scales stand for none, and what fills up panels does not count, so that the sum is the float layer's.

    Args:
        layer: an `Int8MoE`, or a module that holds its parameters.
    """
    tensors: dict[str, Tensor] = {
        name: tensor for name in TENSORS if isinstance(tensor := getattr(layer, name, None), Tensor)
    }
    d_in, d_out, rows = len(tensors["x_scale"]), len(tensors["y_scale"]), tensors["w1_scale"].numel()
    whole = {"fc1": tensors["fc2"].shape[1] * d_in, "w1": rows * d_in, "gate": rows * d_in, "w2": rows * d_out}
    whole |= dict.fromkeys(_SCALES, 0)
    return {name: whole.get(name, tensor.numel()) for name, tensor in tensors.items()}


class Int8MoE(nn.Module):
    """A mixture of experts with weights of 8 or 4 bits: x [..., d_in] → [..., d_out], by `surgeon::routed_ffn_int8`.

    Its parameters have the names and shapes of the operator's arguments (`surgeon.kernels.int8`), and None where there
    is none. They cannot be trained; gradients flow to x. They keep their dtypes if the model is cast to another one.
    tau, rule, shared, filling and skipped_mean: as in `MoE`.
    """

    tau: Tensor
    x_scale: Tensor
    fc1: Tensor | None
    fc2: Tensor
    fc2_bias: Tensor | None
    w1_scale: Tensor
    gate: Tensor | None
    y_scale: Tensor
    b2: Tensor | None
    form: Literal["int8"] = "int8"
    reads_float8 = True  # for `surgeon.models.readiness`

    @classmethod
    def of(cls, moe: MoE, x_scale: Tensor | None = None, group: int | None = None, *, float8: bool = False) -> Int8MoE:
        """Quantise a layer.

        Args:
            x_scale: float32 [d_in], what inputs are multiplied by before they are rounded; None for 1.
            group, float8: as in `Int8Experts.of`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        first, router = moe.weights.w1, moe.router
        if x_scale is None:
            x_scale = torch.ones(first.shape[2], device=first.device)
        with torch.no_grad():
            tensors: dict[str, Tensor | None] = {"x_scale": x_scale, "fc2": router.fc2.weight.float()}
            tensors |= {"fc2_bias": _float(router.fc2.bias), "b2": _float(moe.b2)}
            if router.fc1 is not None:
                trunk, tensors["fc1_scale"] = quantise_trunk(router.fc1.weight.float() / x_scale)
                tensors |= {"fc1": pack(trunk), "fc1_bias": _float(router.fc1.bias)}
            tensors |= Int8Experts.of(moe.weights, x_scale, group, float8=float8)._asdict()
            made._fill(moe.shape, tensors, moe.tau.detach().clone())
            if isinstance(mean := getattr(moe, SKIPPED_MEAN, None), Tensor):
                made.register_buffer(SKIPPED_MEAN, mean.float())
        return made

    @classmethod
    def with_tensors(cls, shape: MoEShape, tensors: dict[str, Tensor | None], tau: Tensor) -> Int8MoE:
        """Make a layer of tensors that it shares, by the names of `TENSORS`, and `skipped_mean` if it has one."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._fill(shape, tensors, tau)
        if shape.compensated:
            made.register_buffer(SKIPPED_MEAN, tensors[SKIPPED_MEAN])
        return made

    @classmethod
    def empty(cls, shape: MoEShape, *, device: torch.device | str | None) -> Int8MoE:
        """Make a layer whose weights are still to be loaded."""
        experts, size, d_in, d_out = shape.experts, shape.size, shape.d_in, shape.d_out
        rows, halves = (experts, size), shape.group is not None

        def panels(outputs: int, inputs: int) -> tuple[int, ...]:
            one = halves_shape(outputs, inputs) if halves else panels_shape(outputs, inputs, torch.int8)
            return experts, *one

        scored, width = experts - shape.shared, shape.router_width
        sizes: dict[str, tuple[int, ...] | None] = {
            "x_scale": (d_in,),
            "fc2": (scored, d_in if width is None else width),
            "fc2_bias": (scored,) if shape.router_bias else None,
            "w1": panels(size, d_in), "w1_scale": rows, "w2": panels(d_out, size), "w2_scale": rows,
            "y_scale": (d_out,),
            "b1": rows if "b1" in shape.biases else None,
            "b2": (d_out,) if "b2" in shape.biases else None,
        }  # fmt: skip
        if width is not None:
            sizes |= {"fc1": panels_shape(width, d_in, torch.int16), "fc1_scale": (width,)}
            sizes["fc1_bias"] = (width,) if shape.router_bias else None
        if shape.gated:
            sizes |= {"gate": sizes["w1"], "gate_scale": rows, "b_gate": rows if "b_gate" in shape.biases else None}
        if shape.group is not None:
            sizes["w1_group"] = (experts, *factors_shape(size, groups_of(d_in, shape.group)))
            sizes["gate_group"] = sizes["w1_group"] if shape.gated else None
            sizes["w2_group"] = (experts, *factors_shape(d_out, groups_of(size, shape.group)))
        dtypes = INTEGERS | (_HALVES if halves else _FLOAT8 if shape.float8 else {})
        tensors: dict[str, Tensor | None] = {
            name: torch.empty(size, device=device, dtype=dtypes.get(name, torch.float32))
            for name, size in sizes.items()
            if size is not None
        }
        if shape.compensated:
            tensors[SKIPPED_MEAN] = torch.zeros(d_out, device=device, dtype=torch.float32)
        return cls.with_tensors(shape, tensors, torch.zeros((), dtype=torch.float32, device=device))

    def _fill(self, shape: MoEShape, tensors: dict[str, Tensor | None], tau: Tensor) -> None:
        for name in TENSORS:
            tensor = tensors.get(name)
            fixed = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, fixed)
        self.activation, self.shared, self.rule, self.filling = (
            shape.activation,
            shape.shared,
            shape.rule,
            shape.filling,
        )
        self.hidden, self.output = shape.router_hidden, shape.router_output
        self.register_buffer("tau", tau)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8MoE:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # From the tensor itself, since what was rounded to another dtype does not come back.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def call(self) -> tuple[Any, ...]:
        """The arguments of the operator after x."""
        return tuple(self.output_bias if name == "b2" else getattr(self, name) for name in Int8Call._fields[1:])

    @property
    def shape(self) -> MoEShape:
        """Its shape, as `empty` takes it."""
        (experts, size), scored = self.w1_scale.shape, self.fc2
        return MoEShape(
            len(self.x_scale), len(self.y_scale), experts, size, self.activation, self.gate is not None,
            tuple(name for name in ("b1", "b_gate", "b2") if getattr(self, name) is not None),
            self.shared, self.rule, "int8", self.filling, hasattr(self, SKIPPED_MEAN),
            None if self.fc1 is None else scored.shape[1], self.fc2_bias is not None, self.hidden, self.output,
            self.experts.group(len(self.x_scale)), self.experts.float8,
        )  # fmt: skip

    @property
    def experts(self) -> Int8Experts:
        """The experts' weights as they are stored."""
        return Int8Experts(*(getattr(self, name) for name in Int8Experts._fields))

    @property
    def weights(self) -> Experts:
        """The experts' weights as numbers, float32, as in `MoE`."""
        return self.experts.floats(self.x_scale, len(self.x_scale))

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the experts' outputs, [d_out]."""
        return output_bias(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        return routed_ffn_int8(x, *self.call)  # type: ignore[no-any-return]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [..., E] and the threshold [...] below which an expert is skipped, for x [..., d_in]."""
        return route(Int8Call(x, *self.call))

    def extra_repr(self) -> str:
        """`48 experts × 32, 384→384 relu, max, int8`, `int4 in groups of 32`, `fp8`."""
        return self.shape.describe
