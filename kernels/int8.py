"""The operator that routes tokens to experts with weights of 8 or 4 bits, integers or float8, and runs them.

`surgeon.kernels.panels` describes how the weights are stored.

`surgeon::routed_ffn_int8` scores the experts, selects them and adds up the outputs of those that are selected:

    x          [..., d_in]      floating
    tau        scalar           floating
    rule       a name of `surgeon.kernels.selection.RULES`
    shared     how many experts, the first ones, run for every token; the router scores the others
    x_scale    [d_in] or None
    fc1        the router's trunk [R, d_in] in panels, int16 [R / 16, d_in / 2, 16, 2], or None
    fc1_scale  [R], or None without a trunk
    fc1_bias   [R] or None
    fc2        [E - shared, R], or [E - shared, d_in] without a trunk, floating
    fc2_bias   [E - shared] or None
    hidden     "relu" or "tanh", the trunk's activation; output: as in `surgeon.kernels.scores.OUTPUT`
    w1         [E, s, d_in] in panels, int8 [E, s / 16, d_in / 4, 16, 4]
    w1_scale   [E, s]
    b1         [E, s] or None
    gate, gate_scale, b_gate: as w1, w1_scale and b1, or None: the FFN is gated
    w2         [E, d_out, s] in panels, int8 [E, d_out / 16, s / 4, 16, 4]
    w2_scale   [E, s]
    y_scale    [d_out]
    b2         [d_out] or None
    activation a name of `surgeon.kernels.activations.ACTIVATIONS`
    w1_group   the factors of weights of 4 bits, uint8 [E, s / 16, G, 16], or None: weights have 8 bits
    gate_group likewise, as w1_group, if the FFN is gated
    w2_group   likewise, uint8 [E, d_out / 16, G of their own, 16]

w1, gate and w2 may be float8_e4m3fn in place of int8, in the same panels, without factors. With factors, they are uint8
[E, s / 16, d_in / 8, 16, 4] and [E, d_out / 16, s / 8, 16, 4]. They stand for the 8-bit weights that everything below
is computed with.

All divisions round up. It returns [..., d_out] in the dtype of x. Scales, biases and tau are floating of any dtype and
are read as float32. In between it computes:

    z   = x · x_scale
    t   = hidden(s_t fc1_scale · (fc1 q_t) + fc1_bias), with q_t = z / s_t, rounded, and s_t = max |z| / 2047
    h   = act(s_x w1_scale · (w1 q_x) + b1) · w2_scale, with q_x = z / s_x, rounded, and s_x = max |z| / 127; gated as
          in `surgeon.kernels.dynamic_k`
    y   = y_scale · Σ over selected experts of s_h (w2 q_h), plus b2, with q_h = h / s_h, rounded, and s_h for each
          token and expert: max h / 255 if hidden values are never negative (see `most_hidden`), max |h| / 127 otherwise

With weights in float8, q_x and q_h are rounded to float16 in place of integers, and s_x = max |z| / 32768 and
s_h = max |h| / 32768, whatever sign h has: no value is too large for float16, and those that are too small for all its
digits do not count beside the largest. Sums are in float32.

The scores are output(fc2 t + fc2_bias), or output(fc2 x + fc2_bias) without a trunk. Sums of products of integers are
exact: int32 holds them for up to 65,536 inputs or neurons of an expert, and the weights of a trunk are made such that
it does (`quantise_trunk`). All else is in float32. A token with values that are not finite gives NaN.

`surgeon::router_scores_int8` takes x and the arguments from x_scale to output. It returns the scores alone,
[..., E - shared] in float32.

The gradient of x is that of the experts as they are stored, without the roundings of x and h. Nothing else has one.
Wrong shapes, dtypes, devices or names raise `UsageError`.

On CPUs native kernels compute it, but for weights in float8, on GPUs those in Triton. What neither takes, and other
devices, get torch code, which computes every expert and says so once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.utils.flop_counter import register_flop_formula

import surgeon.kernels.dynamic_k  # noqa: F401  (registers the gradient of the experts)
from surgeon.kernels import cpu
from surgeon.kernels.activations import activation as find_activation
from surgeon.kernels.backends import say_once
from surgeon.kernels.cpu.backend import say_if_float8
from surgeon.kernels.experts import selected
from surgeon.kernels.int8_arguments import Int8Call, check_call, check_router, most_hidden, most_inputs
from surgeon.kernels.panels import FLOAT8, MOST, MOST_HALF, MOST_TRUNK, unpack
from surgeon.kernels.scores import HIDDEN, OUTPUT, Output
from surgeon.kernels.selection import selection_threshold
from surgeon.kernels.triton import backend as triton

_EXACT = 2**24  # integers up to here are exact in float32


# --- the same in torch ------------------------------------------------------------------------------------------------


def _rounded(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Round every row of float32 x [..., d] to numbers up to `most`, in float32. Return them and scales [..., 1].

    They are integers, or float16 up to `MOST_HALF`.
    """
    scale = x.abs().amax(-1, keepdim=True) / most
    scaled = x / torch.where(scale == 0, 1.0, scale)
    return scaled.half().float() if most == MOST_HALF else scaled.round(), scale


def _scaled(x: Tensor, x_scale: Tensor | None) -> Tensor:
    return x if x_scale is None else x * x_scale.float()


def _product(q: Tensor, matrix: Tensor) -> Tensor:
    """Multiply q [..., K] with a matrix [..., N, K]: float32 [..., N], of integers the exact sums rounded."""
    small = matrix.dtype == torch.int8 and q.shape[-1] * 255 * MOST < _EXACT
    exact = torch.float32 if small or matrix.dtype == FLOAT8 else torch.float64
    return (q.to(exact) @ matrix.to(exact).transpose(-2, -1)).float()


def _trunk(x: Tensor, x_scale: Tensor | None, fc1: Tensor, fc1_scale: Tensor, fc1_bias: Tensor | None) -> Tensor:
    """Return what goes into a trunk's activation, float32 [N, R], for x [N, d_in]."""
    q, scale = _rounded(_scaled(x.float(), x_scale), MOST_TRUNK)
    found = _product(q, unpack(fc1, len(fc1_scale), x.shape[-1])) * (scale * fc1_scale.float())
    return found if fc1_bias is None else found + fc1_bias.float()


def _scores(
    x: Tensor,
    x_scale: Tensor | None,
    fc1: Tensor | None,
    fc1_scale: Tensor | None,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    hidden: str,
    output: str,
    *,
    trunk: Callable[..., Tensor] = _trunk,
) -> Tensor:
    """Return the scores [N, E - shared] of x [N, d_in]. trunk: what computes that part."""
    t = x
    if fc1 is not None and fc1_scale is not None:
        t = HIDDEN[hidden](trunk(x, x_scale, fc1, fc1_scale, fc1_bias))
    op, *rest = OUTPUT[cast(Output, output)]
    scores: Tensor = op(F.linear(t.float(), fc2.float(), None if fc2_bias is None else fc2_bias.float()), *rest)
    return scores


def _routed(call: Int8Call) -> Tensor:
    """Compute the operator with every expert and a mask, in float32: [N, d_out]."""
    x = _rows(call.x).float()
    mask = selected(*_with_threshold(_scores(x, *call.router[1:]), call))
    d_in, act = x.shape[-1], find_activation(call.activation)
    weights = call.experts.in_8_bits(d_in)
    experts, neurons = weights.w1_scale.shape
    q, scale = _rounded(_scaled(x, call.x_scale), most_inputs(call))

    def up(panels: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        found = _product(q, unpack(panels, neurons, d_in).flatten(0, 1)) * (scale * scales.float().flatten())
        return found if bias is None else found + bias.float().flatten()

    h = up(weights.w1, weights.w1_scale, weights.b1)
    if weights.gate is None or weights.gate_scale is None:
        h = act.fn(h)
    else:
        h = act.fn(up(weights.gate, weights.gate_scale, weights.b_gate)) * (h if act.up is None else act.up.fn(h))
    h = (h * weights.w2_scale.float().flatten()).view(-1, experts, neurons)
    h, scales = _rounded(h, most_hidden(call))
    h = (h * scales).masked_fill(~mask.unsqueeze(-1), 0)  # one product for all experts
    w2 = unpack(weights.w2, len(call.y_scale), neurons).transpose(1, 2).flatten(0, 1)
    y = (h.flatten(1) @ w2.float()) * call.y_scale.float()
    y = y if call.b2 is None else y + call.b2.float()
    return y.masked_fill(~x.isfinite().all(-1, keepdim=True), float("nan"))


def _with_threshold(scores: Tensor, call: Int8Call) -> tuple[Tensor, Tensor]:
    """Return the scores of all experts and the threshold."""
    threshold = selection_threshold(scores, call.tau, call.rule)
    return F.pad(scores, (call.shared, 0), value=float("inf")), threshold


# --- the operators ----------------------------------------------------------------------------------------------------

_ROUTER = (
    "Tensor? x_scale, Tensor? fc1, Tensor? fc1_scale, Tensor? fc1_bias, Tensor fc2, Tensor? fc2_bias, str hidden, "
    "str output"
)
_SIGNATURE = (
    f"(Tensor x, Tensor tau, str rule, int shared, {_ROUTER}, Tensor w1, Tensor w1_scale, Tensor? b1, "
    "Tensor? gate, Tensor? gate_scale, Tensor? b_gate, Tensor w2, Tensor w2_scale, Tensor y_scale, Tensor? b2, "
    "str activation, Tensor? w1_group=None, Tensor? gate_group=None, Tensor? w2_group=None) -> Tensor"
)


def _routed_ffn_int8_torch(*given: Any) -> Tensor:
    call = check_call(*given)
    say_if_float8(call)
    return _routed(call).to(call.x.dtype).view(*call.x.shape[:-1], len(call.y_scale))


@torch.library.custom_op("surgeon::routed_ffn_int8", mutates_args=(), schema=_SIGNATURE)
def _routed_ffn_int8(*given: Any) -> Tensor:
    call = check_call(*given)
    if _natively(call.x):
        return routed_ffn_int8(*given)  # type: ignore[no-any-return]
    if not triton.takes_int8(call):
        return _routed_ffn_int8_torch(*given)
    x = _rows(call.x)
    scores = _scores(x, *call.router[1:], trunk=triton.trunk_int8)
    return triton.forward_int8(call, *_with_threshold(scores, call)).view(*call.x.shape[:-1], len(call.y_scale))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _natively(x: Tensor) -> bool:
    """Whether the native kernels compute a call. The first one loads them; the dispatcher sends later ones there."""
    if x.device.type not in ("cpu", "cuda"):
        say_once("kernels for 8-bit experts", f"there are none for {x.device.type}, so every expert is computed")
    return x.device.type == "cpu" and cpu.ready()


@_routed_ffn_int8.register_fake
def _(*given: Any) -> Tensor:
    call = check_call(*given)
    return call.x.new_empty((*call.x.shape[:-1], len(call.y_scale)))


def _router_scores_int8_torch(x: Tensor, *router: Any) -> Tensor:
    check_router(x, *router)
    return _scores(_rows(x), *router).view(*x.shape[:-1], len(router[4]))


@torch.library.custom_op("surgeon::router_scores_int8", mutates_args=(), schema=f"(Tensor x, {_ROUTER}) -> Tensor")
def _router_scores_int8(x: Tensor, *router: Any) -> Tensor:
    check_router(x, *router)
    if _natively(x):
        return router_scores_int8(x, *router)  # type: ignore[no-any-return]
    if not triton.takes_router(x):
        return _router_scores_int8_torch(x, *router)
    return _scores(_rows(x), *router, trunk=triton.trunk_int8).view(*x.shape[:-1], len(router[4]))


@_router_scores_int8.register_fake
def _(x: Tensor, *router: Any) -> Tensor:
    check_router(x, *router)
    return x.new_empty((*x.shape[:-1], router[4].shape[0]), dtype=torch.float32)


_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registrations below: they last as long as it does."""

# What the native kernels hand on: dtypes and activations that they do not have, wrong arguments.
for _name, _op, _arguments in (
    ("routed_ffn_int8_torch", _routed_ffn_int8_torch, _SIGNATURE),
    ("router_scores_int8_torch", _router_scores_int8_torch, f"(Tensor x, {_ROUTER}) -> Tensor"),
):
    _library.define(_name + _arguments)  # type: ignore[no-untyped-call]
    _library.impl(_name, _op, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

routed_ffn_int8 = torch.ops.surgeon.routed_ffn_int8
router_scores_int8 = torch.ops.surgeon.router_scores_int8


def route(call: Int8Call) -> tuple[Tensor, Tensor]:
    """Return the scores [..., E] by which the operator selects, and the threshold [...]."""
    return _with_threshold(router_scores_int8(*call.router), call)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.given = tuple(None if isinstance(value, Tensor) else (value,) for value in inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = iter(ctx.saved_tensors)
    call = Int8Call(*(next(tensors) if value is None else value[0] for value in ctx.given))
    weights = call.experts.floats(call.x_scale, call.x.shape[-1])
    grad_x, *_ = torch.ops.surgeon.dynamic_k_ffn_backward(
        grad.float(), call.x.float(), *route(call), *weights, call.activation, True, False
    )
    return (grad_x.to(call.x.dtype), *(None for _ in call[1:]))


_routed_ffn_int8.register_autograd(_backward, setup_context=_setup_context)
# The native kernels hand on calls with a gradient, which come back below autograd.
_library.define("routed_ffn_int8_differentiable" + _SIGNATURE)  # type: ignore[no-untyped-call]
_library.impl(  # type: ignore[no-untyped-call]
    "routed_ffn_int8_differentiable",
    make_autograd_impl(_routed_ffn_int8._opoverload, _routed_ffn_int8),
    "Autograd",
    with_keyset=True,
)


@register_flop_formula(routed_ffn_int8, get_raw=True)
def _flops(*given: Any, **_: Any) -> int:
    """2 FLOP per multiply-add of the router and of the selected experts; of all experts if there are no values."""
    call = Int8Call(*given)
    x, (experts, neurons) = call.x, call.w1_scale.shape
    pairs = x[..., 0].numel() * experts
    if type(x) is Tensor and x.device.type != "meta":
        pairs = int(selected(*route(call)).sum())
    per_neuron = x.shape[-1] * (1 if call.gate is None else 2) + call.y_scale.shape[0]
    return 2 * pairs * neurons * per_neuron + _router_flops(*call.router)


@register_flop_formula(router_scores_int8, get_raw=True)
def _router_flops(x: Any, x_scale: Any, fc1: Any, fc1_scale: Any, fc1_bias: Any, fc2: Any, *_: Any, **__: Any) -> int:
    """2 FLOP per multiply-add."""
    trunk = 0 if fc1 is None else fc2.shape[1] * x.shape[-1]
    return int(2 * x[..., 0].numel() * (trunk + fc2.numel()))
