"""The operators of linear layers that read only the inputs that matter. Importing this module registers them.

An input of a token matters if it is far from what it usually is. `surgeon::sparse_linear` reads the rows of the weight
of these inputs alone. `surgeon::masked_linear` is its reference twin: it sets the others to zero and computes a dense
product, in ordinary differentiable PyTorch. The arguments are:

    x          [..., d_in]       floating
    weight     [d_out, d_in] in masked_linear, [d_in, d_out] in sparse_linear: one contiguous row per input. In the
               dtype of `x`, or int8 with w_scale
    bias       [d_out] or None, in the dtype of `x`
    scale      [d_in] or None, which stands for ones
    centre     [d_in] or None, which stands for zeros
    levels     [n], n of at least 2, ascending from levels[0] = 0: quantiles of the scores, the k-th of k / (n - 1)
    tau        scalar in [0, 1]: about which share of the inputs to skip
    w_scale    [d_out], what int8 weights are multiplied by, or None for other weights

scale, centre, levels, tau and w_scale are floating of any dtype and are read as float32. Both return [..., d_out] in
the dtype of `x`:

    t   = levels at place tau · (n - 1), interpolated linearly
    s_i = |x_i - centre_i| · scale_i, in float32
    y   = Σ over the inputs i that are kept of (x_i - centre_i) · weight of i, times w_scale, plus bias

An input is kept unless s_i ≤ t. So NaN is kept, and an input at its centre is skipped even at tau 0. To compute the
layer W x + b with a centre, the bias has to be b + W · centre. Scores without a scale are those of TEAL
(arXiv 2408.14690); with the norms of the weight's columns as the scale they are those of WINA (arXiv 2505.19427).

`surgeon::add_low_rank` adds what does not depend on which inputs are kept, in ordinary differentiable PyTorch:

    y          [..., d_out]      as the operators above return it, in the dtype of `x`
    x          [..., d_in]       floating
    low_in     [r, d_in], low_out [d_out, r], in the dtype of `x`
    returns    y + low_out low_in x (R-Sparse, arXiv 2504.19449, has a low rank beside the inputs that are kept)

The weights of an input that is skipped may be left unread, so infinite values there do not become NaN. Selection is a
step function: x, weight, bias and centre have a gradient through the inputs that are kept, the other arguments have
none. Under autocast x, weight and bias are cast before inputs are selected. Forward-mode derivatives and all transforms
of `torch.func` compute a dense product, as `masked_linear` does. Wrong shapes, dtypes or devices raise `UsageError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula

import surgeon.kernels.dynamic_k  # noqa: F401  (its operators are there before the native kernels are loaded)
from surgeon.errors import UsageError
from surgeon.kernels.arguments import check_tensor
from surgeon.kernels.backends import backends

__all__ = ["add_low_rank", "kept", "masked_linear", "ordinary_ops", "sparse_linear", "threshold"]


class LinearCall(NamedTuple):
    """The arguments of the operators, as the module describes them. weight: [d_out, d_in] in both."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    centre: Tensor | None
    levels: Tensor
    tau: Tensor
    w_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return (*self.x.shape[:-1], self.weight.shape[0])


# How many of the arguments autocast casts. What selects inputs is left alone.
_CAST = LinearCall._fields.index("scale")


# --- the definition, in torch -----------------------------------------------------------------------------------------


def threshold(levels: Tensor, tau: Tensor) -> Tensor:
    """Return the score up to which inputs are skipped: `levels` [n] at place tau · (n - 1), a float32 scalar tensor."""
    levels, last = levels.float(), levels.shape[0] - 1
    place = tau.float().clamp(0, 1) * last
    below = place.long().clamp(0, last - 1).reshape(1)
    low, high = levels.index_select(0, below), levels.index_select(0, below + 1)
    return torch.lerp(low, high, place - below).squeeze(0)


def kept(x: Tensor, scale: Tensor | None, centre: Tensor | None, levels: Tensor, tau: Tensor) -> Tensor:
    """Return which inputs of x [..., d_in] are kept, bool [..., d_in]."""
    with torch.no_grad():
        return _kept(_deviation(x, centre), scale, levels, tau)


def _kept(deviation: Tensor, scale: Tensor | None, levels: Tensor, tau: Tensor) -> Tensor:
    scores = deviation.detach().float().abs()
    scores = scores if scale is None else scores * scale.detach().float()
    return ~(scores <= threshold(levels.detach(), tau.detach()))


def _deviation(x: Tensor, centre: Tensor | None) -> Tensor:
    """x - centre, in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide if centre is None else wide - centre.to(wide.dtype)


def _weight(weight: Tensor, w_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [d_out, d_in] in the dtype of the product. Sums of int8 would not fit into float16."""
    if w_scale is None:
        return weight
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(wide) * w_scale.detach().to(wide).unsqueeze(1)).to(dtype)


def _linear(call: LinearCall) -> Tensor:
    x, weight, bias, scale, centre, levels, tau, w_scale = call
    deviation = _deviation(x, centre)
    deviation = torch.where(_kept(deviation, scale, levels, tau), deviation, 0.0).to(x.dtype)
    return F.linear(deviation, _weight(weight, w_scale, x.dtype), bias)


# --- the operators ----------------------------------------------------------------------------------------------------

_SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? centre, Tensor levels, Tensor tau, "
    "Tensor? w_scale=None) -> Tensor"
)


def _by_rows(x: Tensor, weight: Tensor, *rest: Tensor | None) -> LinearCall:
    """The checked arguments of sparse_linear."""
    return _check("sparse linear", x, weight.t() if weight.dim() == 2 else weight, *rest)


@torch.library.custom_op("surgeon::sparse_linear", mutates_args=(), schema=_SIGNATURE)
def _sparse_linear(*given: Any) -> Tensor:
    call = _by_rows(*given)
    for backend in backends():
        found = None if backend.sparse_linear is None else backend.sparse_linear(*given)
        if found is not None:
            return found
    return _linear(call)


@_sparse_linear.register_fake
def _(*given: Any) -> Tensor:
    call = _by_rows(*given)
    return call.x.new_empty(call.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In torch throughout, so that it can be differentiated again."""
    x, weight, _, scale, centre, levels, tau, w_scale = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_centre, *_ = ctx.needs_input_grad
    deviation = _deviation(x, centre)
    mask = _kept(deviation, scale, levels, tau)
    to_x = torch.where(mask, grad @ _weight(weight.t(), w_scale, x.dtype), 0.0) if need_x or need_centre else None
    to_weight = None
    if need_weight:
        deviation = torch.where(mask, deviation, 0.0).to(x.dtype)
        to_weight = deviation.reshape(-1, x.shape[-1]).t() @ grad.reshape(-1, grad.shape[-1])
    to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
    to_centre = -to_x.reshape(-1, x.shape[-1]).sum(0).to(centre.dtype) if need_centre and to_x is not None else None
    return (to_x if need_x else None, to_weight, to_bias, None, to_centre, None, None, None)


_sparse_linear.register_autograd(_backward, setup_context=_setup_context)

_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registrations below: they last as long as it does."""

for _name in ("masked_linear", "sparse_linear_torch", "sparse_linear_differentiable"):
    _library.define(_name + _SIGNATURE)  # type: ignore[no-untyped-call]


def _sparse_linear_torch(*given: Any) -> Tensor:
    # What the native kernels hand on: other dtypes, wrong arguments.
    return _linear(_by_rows(*given))


_library.impl("sparse_linear_torch", _sparse_linear_torch, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _masked_linear(*given: Any) -> Tensor:
    return _linear(_check("masked linear", *autocast_to(_CAST, *given)))


# Composite: autograd and autocast see through it, yet export keeps it as one node.
_library.impl("masked_linear", _masked_linear, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def _twin(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
    return masked_linear(x, weight.t() if weight.dim() == 2 else weight, *rest)  # type: ignore[no-any-return]


def autocast_to(first: int, *given: Any) -> tuple[Any, ...]:
    """Return arguments with the first ones as autocast gives them to products, if it is on for the device of x."""
    device = given[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return _cast(torch.get_autocast_dtype(device), first, *given)
    return given


def _cast(dtype: torch.dtype, first: int, *given: Any) -> tuple[Any, ...]:
    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return (*(cast(tensor) for tensor in given[:first]), *given[first:])


def _autocast_rule(device_type: str) -> Callable[..., Tensor]:
    def rule(*given: Any) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            y: Tensor = sparse_linear(*_cast(torch.get_autocast_dtype(device_type), _CAST, *given))
        return y

    return rule


for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("sparse_linear", _autocast_rule(_type), _key)  # type: ignore[no-untyped-call]

# Transforms of `torch.func` and forward-mode derivatives see through the operator's twin, but not through itself.
_library.impl("sparse_linear", _twin, "FuncTorchDynamicLayerFrontMode")  # type: ignore[no-untyped-call]
_reverse_mode = make_autograd_impl(_sparse_linear._opoverload, _sparse_linear)


def _autograd(keyset: Any, *given: Any) -> Tensor:
    tensors = [value for value in given if isinstance(value, Tensor)] if forward_ad._current_level >= 0 else []
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):  # type: ignore[no-untyped-call]
        return _twin(*given)
    return _reverse_mode(keyset, *given)  # type: ignore[no-any-return]


# The native kernels have a kernel of their own here, which hands calls with a derivative on; they come back below it.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
    _library.impl("sparse_linear", _autograd, "Autograd", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]
_library.impl("sparse_linear_differentiable", _autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _add_low_rank(y: Tensor, x: Tensor, low_in: Tensor, low_out: Tensor) -> Tensor:
    fits = low_in.dim() == low_out.dim() == 2 and low_in.shape[0] == low_out.shape[1]
    if not fits or x.shape[-1:] != low_in.shape[1:] or y.shape != (*x.shape[:-1], low_out.shape[0]):
        raise UsageError(
            "add low rank: y [..., d_out], x [..., d_in], low_in [r, d_in] and low_out [d_out, r] do not fit together: "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in (y, x, low_in, low_out))}"
        )
    return y + F.linear(F.linear(x, low_in), low_out)


_library.define("add_low_rank(Tensor y, Tensor x, Tensor low_in, Tensor low_out) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("add_low_rank", _add_low_rank, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

add_low_rank = torch.ops.surgeon.add_low_rank
masked_linear = torch.ops.surgeon.masked_linear
sparse_linear = torch.ops.surgeon.sparse_linear


ORDINARY: dict[Any, Callable[..., Tensor]] = {
    sparse_linear: lambda *given: _linear(_by_rows(*given)),
    masked_linear: lambda *given: _linear(_check("masked linear", *given)),
    add_low_rank: _add_low_rank,
}
"""What computes each operator of layers that skip inputs or neurons by ordinary ops of torch."""


class ordinary_ops(TorchFunctionMode):  # noqa: N801  (a context manager)
    """Inside the block, calls of the operators in `ORDINARY` run ordinary ops of torch: a trace has these instead.

    Everything is computed then, and a mask leaves out what is skipped.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func
        ordinary = ORDINARY.get(operator) if isinstance(operator, torch._ops.OpOverloadPacket) else None
        return func(*args, **(kwargs or {})) if ordinary is None else ordinary(*args)


def _check(op: str, *given: Tensor | None) -> LinearCall:
    """Return the arguments by name. Raise `UsageError` unless they are as the module describes."""
    call = LinearCall(*given)  # type: ignore[arg-type]
    x, weight, bias, scale, centre, levels, tau, w_scale = call
    if x.dim() < 1 or not x.is_floating_point():
        raise UsageError(f"{op}: x must be floating with at least 1 dimension, got {x.dtype} {tuple(x.shape)}")
    if weight.dim() != 2 or levels.dim() != 1 or levels.shape[0] < 2:
        raise UsageError(
            f"{op}: weight needs 2 dimensions and levels 1 of at least 2 values, got weight {tuple(weight.shape)} and "
            f"levels {tuple(levels.shape)}"
        )
    if (weight.dtype == torch.int8) != (w_scale is not None):
        raise UsageError(f"{op}: w_scale belongs to an int8 weight and to no other, got weight {weight.dtype}")
    d_out, d_in = weight.shape
    if d_in != x.shape[-1]:
        raise UsageError(f"{op}: weight has {d_in} inputs, but x is {tuple(x.shape)}")
    for name, tensor, shape, dtype in (
        ("weight", weight, (d_out, d_in), x.dtype if w_scale is None else torch.int8),
        ("bias", bias, (d_out,), x.dtype),
        ("scale", scale, (d_in,), None),
        ("centre", centre, (d_in,), None),
        ("levels", levels, (levels.shape[0],), None),
        ("tau", tau, (), None),
        ("w_scale", w_scale, (d_out,), None),
    ):
        check_tensor(op, name, tensor, shape, x, dtype)
    return call


@register_flop_formula(sparse_linear, get_raw=True)
def _flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """2 FLOP per multiply-add of all inputs, also of those that are skipped: as of the twin, whose product is dense."""
    return int(2 * x.numel() * weight.shape[1])
