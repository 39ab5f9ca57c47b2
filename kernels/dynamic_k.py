"""The operators that a rewritten FFN runs. Importing this module registers them; `torch.export.load` needs that first.

The operator that makes thresholds, `surgeon::selection_threshold` (see `selection`), is registered along with them.
`surgeon::dynamic_k_ffn` computes only the experts each token selected. `surgeon::masked_ffn` is its reference twin:
it computes every expert and masks, in ordinary differentiable PyTorch. Both have the same arguments:

    x          [..., d_in]        floating
    scores     [..., E]           floating, any dtype
    threshold  [...]              one per token
    w1         [E, s, d_in]       E experts of s neurons, one contiguous row per neuron
    b1         [E, s] or None
    gate       [E, s, d_in] or None: the FFN is gated
    b_gate     [E, s] or None
    w2         [E, s, d_out]
    b2         [d_out] or None
    activation a name of `surgeon.kernels.activations.ACTIVATIONS`

and return [..., d_out], in the dtype of `x`, which the weights share:

    h_e = act(x w1_eᵀ + b1_e), or act(x gate_eᵀ + b_gate_e) · (x w1_eᵀ + b1_e) if gated, with a ReLU on both sides for
          relu_relu
    y   = Σ over selected experts e of h_e w2_e, plus b2

Expert outputs are added with weight 1, so with every expert selected this is the dense FFN (D2DMoE, arXiv 2310.04361).
An expert runs for a token unless its score is below the token's threshold (`experts.selected`); a token that
selects nothing gives b2. If h of a neuron is exactly zero, its row of w2 may be left unread, so infinite values there
do not become NaN. Selection is a step function: `scores` and `threshold` get no gradient. Under autocast `x` and the
weights are cast, but scores and threshold are not. Forward-mode derivatives and all transforms of `torch.func` (jvp,
grad, vmap, ...) compute every expert, as `masked_ffn` does. So do second derivatives. Wrong shapes, dtypes, devices or
names raise `UsageError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from surgeon.errors import UsageError
from surgeon.kernels import selection as _selection  # noqa: F401  registers its op
from surgeon.kernels.activations import activation as find_activation
from surgeon.kernels.backends import Call, backends
from surgeon.kernels.cpu import backend as native
from surgeon.kernels.experts import Experts, hidden, keep_selected, selected
from surgeon.kernels.torch import backend as torch_backend

__all__ = ["dynamic_k_ffn", "masked_ffn", "selected"]


_SIGNATURE = (
    "(Tensor x, Tensor scores, Tensor threshold, Tensor w1, Tensor? b1, Tensor? gate, Tensor? b_gate, Tensor w2, "
    "Tensor? b2, str activation) -> Tensor"
)


class _Arguments(NamedTuple):
    """The arguments of the operators, as the module describes them."""

    x: Tensor
    scores: Tensor
    threshold: Tensor
    w1: Tensor
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str

    @property
    def experts(self) -> Experts:
        return Experts(*self[3:8])

    @property
    def call(self) -> Call:
        """The call with its tokens in one dimension."""
        x, scores, threshold, *_, b2, activation = self
        rows = x.reshape(-1, x.shape[-1]), scores.reshape(-1, scores.shape[-1]), threshold.reshape(-1)
        return Call(*rows, self.experts, b2, activation)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return (*self.x.shape[:-1], self.w2.shape[2])


@torch.library.custom_op("surgeon::dynamic_k_ffn", mutates_args=(), schema=_SIGNATURE)
def _dynamic_k_ffn(*given: Any) -> Tensor:
    args = _check(*given)
    call = args.call
    y = next(backend for backend in backends() if backend.takes(call)).forward(call)
    return y.view(args.shape)


def _masked(args: _Arguments) -> Tensor:
    flat = args.experts.flat()
    h = hidden(args.x, flat, find_activation(args.activation))
    return F.linear(keep_selected(h, selected(args.scores, args.threshold)), flat.w2.t(), args.b2)


@_dynamic_k_ffn.register_fake
def _(*given: Any) -> Tensor:
    args = _check(*given)
    return args.x.new_empty(args.shape)


@torch.library.custom_op("surgeon::dynamic_k_ffn_backward", mutates_args=())
def _dynamic_k_ffn_backward(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    gate: Tensor | None,
    b_gate: Tensor | None,
    w2: Tensor,
    activation: str,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w1, b1, gate, b_gate and w2: an empty tensor for each that is not needed or absent."""
    args = _Arguments(x, scores, threshold, w1, b1, gate, b_gate, w2, None, activation)
    call, grad = args.call, grad.reshape(-1, grad.shape[-1])
    backward = next(backend.backward for backend in backends() if backend.backward and backend.takes(call))
    gradients = backward(call, grad, need_x, need_weights)
    grad_x, *rest = (x.new_empty(0) if g is None else g for g in gradients)
    return (grad_x.view(x.shape) if need_x else grad_x, *rest)  # type: ignore[return-value]


@_dynamic_k_ffn_backward.register_fake
def _(grad: Tensor, x: Tensor, scores: Tensor, threshold: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *weights, _activation, need_x, need_weights = rest
    needed = [(x, need_x), *((weight, need_weights) for weight in weights)]
    return tuple(t.new_empty(t.shape) if need and t is not None else x.new_empty(0) for t, need in needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _b2, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, _, _, *need_weights, need_b2, _ = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 6
    if need_x or any(need_weights):
        found = torch.ops.surgeon.dynamic_k_ffn_backward(
            grad, *ctx.saved_tensors, ctx.activation, need_x, any(need_weights)
        )
        grads = [g if need else None for g, need in zip(found, (need_x, *need_weights), strict=True)]
    grad_x, *grad_weights = grads
    grad_b2 = grad.reshape(-1, grad.shape[-1]).sum(0) if need_b2 else None
    return (grad_x, None, None, *grad_weights, grad_b2, None)


_dynamic_k_ffn.register_autograd(_autograd_backward, setup_context=_setup_context)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.need_x, ctx.need_weights = inputs
    ctx.save_for_backward(*tensors)


def _second_backward(ctx: Any, *found: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients once more, by transforms of the masked operator."""
    grad, x, scores, threshold, *weights = ctx.saved_tensors
    given = (x, *weights)
    there = [index for index, value in enumerate(given) if value is not None]
    needed = [index for index in there if (ctx.need_weights if index else ctx.need_x)]

    def layer(*values: Tensor) -> Tensor:
        x, *weights = (values[there.index(index)] if index in there else None for index in range(len(given)))
        return masked_ffn(x, scores, threshold, *weights, None, ctx.activation)  # type: ignore[no-any-return]

    def gradients(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        pulled = torch.func.vjp(layer, *values)[1](grad)
        return tuple(pulled[there.index(index)] for index in needed)

    pull = torch.func.vjp(gradients, grad, *(given[index] for index in there))[1]
    of_grad, *rest = pull(tuple(found[index] for index in needed))
    of_x, *of_weights = (rest[there.index(index)] if index in there else None for index in range(len(given)))
    return (of_grad, of_x, None, None, *of_weights, None, None, None)


_dynamic_k_ffn_backward.register_autograd(_second_backward, setup_context=_setup_second)

_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registrations below: they last as long as it does."""

_library.define("masked_ffn" + _SIGNATURE)  # type: ignore[no-untyped-call]
_library.define("dynamic_k_ffn_torch" + _SIGNATURE)  # type: ignore[no-untyped-call]


def _dynamic_k_ffn_torch(*given: Any) -> Tensor:
    # The native kernels hand on what they do not take: dtypes and activations that they do not have, wrong arguments.
    args = _check(*given)
    call = args.call
    native.say_if_unknown(call)
    return torch_backend.BACKEND.forward(call).view(args.shape)


_library.impl("dynamic_k_ffn_torch", _dynamic_k_ffn_torch, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _masked_ffn(*given: Any) -> Tensor:
    # Autocast casts inside this operator, so the dtypes may still differ here.
    args = _check(*given, same_dtype=not _autocasts(given[0]))
    return _masked(args)


def _masked_twin(*given: Any) -> Tensor:
    return masked_ffn(*given)  # type: ignore[no-any-return]


# Composite: autograd and autocast see through it, yet export keeps it as one node.
_library.impl("masked_ffn", _masked_ffn, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def _autocast_rule(device_type: str) -> Callable[..., Tensor]:
    """Return a rule that leaves scores and threshold alone. PyTorch's own would cast them and select other experts."""

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    def rule(x: Tensor, scores: Tensor, threshold: Tensor, *weights: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        *tensors, activation = weights
        with torch.autocast(device_type, enabled=False):
            y: Tensor = dynamic_k_ffn(
                cast(x, dtype), scores, threshold, *(cast(tensor, dtype) for tensor in tensors), activation
            )
        return y

    return rule


def _autocasts(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


# Transforms of `torch.func` and forward-mode derivatives see through the operator's twin, but not through itself.
_library.impl("dynamic_k_ffn", _masked_twin, "FuncTorchDynamicLayerFrontMode")  # type: ignore[no-untyped-call]
_reverse_mode = make_autograd_impl(_dynamic_k_ffn._opoverload, _dynamic_k_ffn)


def _autograd(keyset: Any, *given: Any) -> Tensor:
    tensors = [value for value in given if isinstance(value, Tensor)] if forward_ad._current_level >= 0 else []
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):  # type: ignore[no-untyped-call]
        return _masked_twin(*given)
    return _reverse_mode(keyset, *given)  # type: ignore[no-any-return]


# The native kernels have a kernel of their own here, which does the same.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
    _library.impl("dynamic_k_ffn", _autograd, "Autograd", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]

for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("dynamic_k_ffn", _autocast_rule(_type), _key)  # type: ignore[no-untyped-call]

dynamic_k_ffn = torch.ops.surgeon.dynamic_k_ffn
masked_ffn = torch.ops.surgeon.masked_ffn


def _check(*given: Any, same_dtype: bool = True) -> _Arguments:
    """Return the arguments by name. Raise `UsageError` unless they are as the module describes."""
    args = _Arguments(*given)
    x, scores, threshold, w1, b1, gate, b_gate, w2, b2, activation = args
    find_activation(activation)
    if x.dim() < 1 or w1.dim() != 3 or w2.dim() != 3:
        raise UsageError(
            f"dynamic-k FFN: x needs at least 1 dimension, w1 and w2 need 3 [E, s, d]; got x {tuple(x.shape)}, "
            f"w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}"
        )
    if gate is None and b_gate is not None:
        raise UsageError("dynamic-k FFN: b_gate was given without gate")
    (experts, neurons, _), lead = w1.shape, x.shape[:-1]
    per_neuron = (experts, neurons)
    _check_one("scores", scores, (*lead, experts), x, scores.dtype)
    _check_one("threshold", threshold, lead, x, threshold.dtype)
    for name, tensor, shape in (
        ("w1", w1, (*per_neuron, x.shape[-1])),
        ("b1", b1, per_neuron),
        ("gate", gate, (*per_neuron, x.shape[-1])),
        ("b_gate", b_gate, per_neuron),
        ("w2", w2, (*per_neuron, w2.shape[2])),
        ("b2", b2, (w2.shape[2],)),
    ):
        if tensor is not None:
            _check_one(name, tensor, shape, x, x.dtype if same_dtype else tensor.dtype)
    return args


def _check_one(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor, dtype: torch.dtype) -> None:
    # The usual case comes first, because the other checks are slow. Sizes of other types of tensors may be symbolic.
    fits = tensor.device == x.device and tensor.dtype == dtype and dtype.is_floating_point
    if fits and type(tensor) in (Tensor, torch.nn.Parameter) and tensor.shape == shape:
        return

    def wrong_shape() -> str:
        return f"dynamic-k FFN: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} for x {tuple(x.shape)}"

    if tensor.dim() != len(shape):
        raise UsageError(wrong_shape())
    for size, wanted in zip(tensor.shape, shape, strict=True):
        same = size == wanted
        if isinstance(same, torch.SymBool):  # A symbolic size: this becomes a condition of the graph.
            torch._check(same, wrong_shape)
        elif not same:
            raise UsageError(wrong_shape())
    if tensor.device != x.device:
        raise UsageError(f"dynamic-k FFN: {name} is on {tensor.device}, x on {x.device}")
    if tensor.dtype != dtype or not dtype.is_floating_point:
        wanted_dtype = dtype if dtype.is_floating_point else "a floating dtype"
        raise UsageError(f"dynamic-k FFN: {name} is {tensor.dtype}, expected {wanted_dtype}")


@register_flop_formula(dynamic_k_ffn, get_raw=True)
def _flops(
    x: Any, scores: Any, threshold: Any, w1: Any, b1: Any, gate: Any, b_gate: Any, w2: Any, *_: Any, **__: Any
) -> int:
    """2 FLOP per multiply-add of the selected experts; of all experts if the tensors hold no values."""
    matrices = 1 if gate is None else 2
    return int(_pairs(scores, threshold) * 2 * w1.shape[1] * (matrices * w1.shape[2] + w2.shape[2]))


@register_flop_formula(torch.ops.surgeon.dynamic_k_ffn_backward, get_raw=True)
def _backward_flops(
    grad: Any,
    x: Any,
    scores: Any,
    threshold: Any,
    w1: Any,
    b1: Any,
    gate: Any,
    b_gate: Any,
    w2: Any,
    activation: str,
    need_x: bool,
    need_weights: bool,
    **_: Any,
) -> int:
    """Count like the forward: the hidden activations again, their gradient, and the gradients that are needed."""
    into_hidden = (1 if gate is None else 2) * w1.shape[2]
    out_of_hidden = w2.shape[2]
    per_neuron = into_hidden + out_of_hidden + need_x * into_hidden + need_weights * (into_hidden + out_of_hidden)
    return int(_pairs(scores, threshold) * 2 * w1.shape[1] * per_neuron)


def _pairs(scores: Tensor, threshold: Tensor) -> int:
    """How many (token, expert) pairs run; all of them if the tensors hold no values."""
    if type(scores) in (Tensor, torch.nn.Parameter) and scores.device.type != "meta":
        return int(selected(scores, threshold).sum())
    return scores.numel()
