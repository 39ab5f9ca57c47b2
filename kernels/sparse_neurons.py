"""The operators of gated layers that compute only the neurons that their gate keeps. Importing registers them.

A gated layer is down(act(gate x) · up x). Its gate is computed in full. A neuron whose gate is near zero is
skipped by `surgeon::sparse_neurons`: its row of up is not read, nor that of down. `surgeon::masked_neurons` is the
reference twin, which computes every neuron and masks, in ordinary differentiable PyTorch. Both have these arguments:

    x          [..., d_in]        floating
    gate       [h, d_in]          h neurons; the weights have the dtype of `x`
    b_gate     [h] or None
    w1         [h, d_in]          up
    b1         [h] or None
    w2         [h, d_out]         down, one row per neuron
    b2         [d_out] or None
    scale      [h] or None, which stands for ones
    centre     [h] or None, which stands for zeros: what gate times up usually is where a neuron is skipped
    levels     [n], n of at least 2, ascending: quantiles of the scores, the k-th of k / (n - 1); a first one below zero
               keeps everything at tau 0
    tau        scalar in [0, 1]: about which share of the neurons to skip
    activation a name of `surgeon.kernels.activations.ACTIVATIONS`

scale, centre, levels and tau are floating of any dtype and are read as float32. Both return [..., d_out] in the dtype
of `x`:

    a_i = act(gate_i x + b_gate_i)
    s_i = |a_i| · scale_i, in float32
    y   = Σ over the neurons i that are kept of (a_i · (w1_i x + b1_i) - centre_i) · w2_i, plus b2

A neuron is kept unless s_i is at most the threshold that `sparse_linear.threshold` gives for tau. relu_relu has a ReLU
on w1_i x + b1_i too. To compute the dense layer with centres, b2 has to hold w2ᵀ centre, and the first level to be
below zero: a gate of a ReLU is zero for many tokens. Without a scale, scores are those of CATS (arXiv 2404.08763).

Selection is a step function: scale, levels and tau have no gradient. Where a derivative is asked for, and inside
transforms of `torch.func`, `sparse_neurons` computes what its twin does. Otherwise it runs
`surgeon::selected_neurons`, which takes the gates a [..., h]. It has a native kernel for CPUs, which reads only the
rows of neurons that some token keeps, for up to 16 tokens. Wrong shapes, dtypes or devices raise `UsageError`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

import surgeon.kernels.dynamic_k  # noqa: F401  (its operators are there before the native kernels are loaded)
from surgeon.errors import UsageError
from surgeon.kernels import cpu
from surgeon.kernels.activations import activation as find_activation
from surgeon.kernels.arguments import check_tensor
from surgeon.kernels.sparse_linear import ORDINARY, autocast_to, kept

__all__ = ["NeuronsCall", "gates", "masked_neurons", "sparse_neurons"]


class NeuronsCall(NamedTuple):
    """The arguments of the operators, as the module describes them."""

    x: Tensor
    gate: Tensor
    b_gate: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    scale: Tensor | None
    centre: Tensor | None
    levels: Tensor
    tau: Tensor
    activation: str


# How many of the arguments autocast casts. What selects neurons is left alone.
_CAST = NeuronsCall._fields.index("scale")
_SIGNATURE = (
    "(Tensor x, Tensor gate, Tensor? b_gate, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? scale, Tensor? centre, Tensor levels, Tensor tau, str activation) -> Tensor"
)
_SELECTED = (
    "(Tensor x, Tensor a, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? scale, Tensor? centre, Tensor levels, "
    "Tensor tau, bool up_relu) -> Tensor"
)


def gates(x: Tensor, gate: Tensor, b_gate: Tensor | None, activation: str) -> Tensor:
    """Return the activated gates [..., h] of x [..., d_in]."""
    return find_activation(activation).fn(F.linear(x, gate, b_gate))


def _selected(
    x: Tensor,
    a: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    scale: Tensor | None,
    centre: Tensor | None,
    levels: Tensor,
    tau: Tensor,
    up_relu: bool,
) -> Tensor:
    """Compute every neuron, and mask. a: the gates, [..., h]."""
    up = F.linear(x, w1, b1)
    hidden = a * (F.relu(up) if up_relu else up)
    if centre is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        hidden = (hidden.to(wide) - centre.to(wide)).to(x.dtype)
    return F.linear(torch.where(kept(a, scale, None, levels, tau), hidden, 0.0), w2.t(), b2)


def _compute(call: NeuronsCall, selected: Any) -> Tensor:
    x, gate, b_gate, w1, b1, w2, b2, scale, centre, levels, tau, activation = call
    a = gates(x, gate, b_gate, activation)
    up_relu = find_activation(activation).up is not None
    y: Tensor = selected(x, a, w1, b1, w2, b2, scale, centre, levels, tau, up_relu)
    return y


_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registrations below: they last as long as it does."""

for _name in ("masked_neurons", "sparse_neurons"):
    _library.define(_name + _SIGNATURE)  # type: ignore[no-untyped-call]
_library.define("selected_neurons" + _SELECTED)  # type: ignore[no-untyped-call]
_library.impl("selected_neurons", _selected, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
selected_neurons = torch.ops.surgeon.selected_neurons


@torch.library.register_fake("surgeon::selected_neurons", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, a: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w2.shape[1]))


def _masked_neurons(*given: Any) -> Tensor:
    return _compute(_check("masked neurons", *autocast_to(_CAST, *given)), _selected)


def _sparse_neurons(*given: Any) -> Tensor:
    call = _check("sparse neurons", *autocast_to(_CAST, *given))
    if _differentiates(call):
        return _compute(call, _selected)
    if call.x.device.type == "cpu":
        cpu.ready()  # it loads the native kernel of the operator
    return _compute(call, selected_neurons)


def _differentiates(call: NeuronsCall) -> bool:
    """Whether a derivative may be asked for, or a transform of `torch.func` is at work."""
    tensors = [value for value in call if isinstance(value, Tensor)]
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return backward or forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


# Composite: autograd and autocast see through them, yet export keeps each as one node.
_library.impl("masked_neurons", _masked_neurons, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("sparse_neurons", _sparse_neurons, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

masked_neurons = torch.ops.surgeon.masked_neurons
sparse_neurons = torch.ops.surgeon.sparse_neurons


def _ordinary(*given: Any) -> Tensor:
    return _compute(_check("masked neurons", *given), _selected)


ORDINARY.update(dict.fromkeys((masked_neurons, sparse_neurons), _ordinary))


def _check(op: str, *given: Any) -> NeuronsCall:
    """Return the arguments by name. Raise `UsageError` unless they are as the module describes."""
    call = NeuronsCall(*given)
    x, gate, w2, levels = call.x, call.gate, call.w2, call.levels
    find_activation(call.activation)
    if x.dim() < 1 or not x.is_floating_point():
        raise UsageError(f"{op}: x must be floating with at least 1 dimension, got {x.dtype} {tuple(x.shape)}")
    if gate.dim() != 2 or w2.dim() != 2 or levels.dim() != 1 or levels.shape[0] < 2:
        raise UsageError(
            f"{op}: gate and w2 need 2 dimensions and levels 1 of at least 2 values, got gate {tuple(gate.shape)}, "
            f"w2 {tuple(w2.shape)} and levels {tuple(levels.shape)}"
        )
    d_in, neurons, d_out = x.shape[-1], gate.shape[0], w2.shape[1]
    for name, shape, dtype in (
        ("gate", (neurons, d_in), x.dtype),
        ("b_gate", (neurons,), x.dtype),
        ("w1", (neurons, d_in), x.dtype),
        ("b1", (neurons,), x.dtype),
        ("w2", (neurons, d_out), x.dtype),
        ("b2", (d_out,), x.dtype),
        ("scale", (neurons,), None),
        ("centre", (neurons,), None),
        ("levels", (levels.shape[0],), None),
        ("tau", (), None),
    ):
        check_tensor(op, name, getattr(call, name), shape, x, dtype)
    return call


@register_flop_formula(selected_neurons, get_raw=True)
def _flops(x: Tensor, a: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *_: Any, **__: Any) -> int:
    """2 FLOP per multiply-add of all neurons, also of those that are skipped, as of the twin."""
    return int(2 * a.numel() * (w1.shape[1] + w2.shape[1]))
