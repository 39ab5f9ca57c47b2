"""Which calls Triton's kernels take, and which way through them; what computes is imported when it is first called."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from surgeon.kernels.backends import Backend, Call, say_once
from surgeon.kernels.experts import Experts, Gradients
from surgeon.kernels.gpu_model import cost as cost_model
from surgeon.kernels.gpu_model.cost import Way
from surgeon.kernels.gpu_model.devices import model_of
from surgeon.kernels.int8_arguments import Int8Call

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MOST_TOKENS = 16  # that linear layers skip inputs for: with more, nearly every row of the weight is read
_MOST_SCORES = 8192  # of a token, which a program holds in registers


@cache
def available() -> bool:
    """Whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


def supports(x: Tensor, experts: Experts, activation: str) -> str | None:
    """Say why the kernels cannot compute this, or None if they can.

    Args:
        x: [N, d_in].
        experts: the weights, same dtype and device as `x`.
        activation: a name of `surgeon.kernels.activations.ACTIVATIONS`.
    """
    return _computes_nowhere(x, (*experts.w1.shape, experts.w2.shape[2]), activation)


def supports_int8(call: Int8Call) -> str | None:
    """Say the same of a call of `surgeon::routed_ffn_int8` whose arguments fit together."""
    return _computes_nowhere(call.x, (*call.w1_scale.shape, call.x.shape[-1], len(call.y_scale)), call.activation)


def supports_router(x: Tensor) -> str | None:
    """Say the same of the trunk of a router with 12-bit weights."""
    why = _runs_nowhere(x.device)
    if why is None and x.dtype not in _DTYPES:
        return f"Triton's kernels compute in float32, float16 and bfloat16, not in {x.dtype}"
    return why


def _computes_nowhere(x: Tensor, sizes: tuple[int, ...], activation: str) -> str | None:
    why = supports_router(x)
    if why is not None:
        return why
    from surgeon.kernels.triton.elementwise import ACTIVATIONS

    if activation not in ACTIVATIONS:
        return f"Triton's kernels know the activations {', '.join(ACTIVATIONS)}, not {activation}"
    if 0 in sizes:
        return "Triton's kernels need every dimension of the weights to be at least 1"
    return None


def _runs_nowhere(device: torch.device) -> str | None:
    """Say why no kernel runs on a device, or None if they do."""
    if not available():
        return "Triton is not installed"
    from surgeon.kernels.triton import launch

    if device.type != "cuda" and not launch.INTERPRETED:
        return f"Triton's kernels run on CUDA and ROCm devices, not on {device.type}"
    found = launch.chip(device)
    if found.backend == "cuda" and found.capability < 80:
        return f"Triton's kernels need compute capability 8.0, this device has {found.capability / 10}"
    return None


def takes(call: Call) -> bool:
    """Whether these kernels are to compute this: on a GPU, unless `SURGEON_GPU=torch` is set, if they can.

    On a processor only in Triton's interpreter (`TRITON_INTERPRET=1`) with `SURGEON_GPU=triton`, for tests.
    """
    return _wanted(call.x.device) and _or_say(supports(call.x, call.experts, call.activation))


def takes_int8(call: Int8Call) -> bool:
    """The same of a call of `surgeon::routed_ffn_int8`."""
    return _wanted(call.x.device) and _or_say(supports_int8(call))


def takes_router(x: Tensor) -> bool:
    """The same of the trunk of a router with 12-bit weights."""
    return _wanted(x.device) and _or_say(supports_router(x))


def sorts(scores: Tensor, tau: Tensor) -> bool:
    """The same of `host.sorted_threshold`, of which float64 and more than 8,192 scores of a token are left to torch."""
    small = scores.dim() > 0 and 0 < scores.shape[-1] <= _MOST_SCORES and scores.numel() > 0
    fits = small and scores.dtype == tau.dtype == torch.float32 and tau.device == scores.device
    return fits and _wanted(scores.device) and _or_say(_runs_nowhere(scores.device))


def skips_inputs(x: Tensor, weight: Tensor) -> bool:
    """The same of `linear_host.sparse_linear`: up to 16 tokens. Its sums change in their last bits from run to run."""
    tokens = x.shape[:-1].numel()
    fits = 0 < tokens <= _MOST_TOKENS and 0 not in weight.shape and x.dtype in _DTYPES
    fits = fits and not torch.are_deterministic_algorithms_enabled()
    return fits and _wanted(x.device) and _or_say(_runs_nowhere(x.device))


def _wanted(device: torch.device) -> bool:
    asked = os.environ.get("SURGEON_GPU")
    if device.type == "cpu":
        return asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and asked != "torch"  # nothing to be said of devices that other backends are for


def _or_say(why: str | None) -> bool:
    """Whether there is no reason against; a reason is said, once."""
    if why is not None:
        say_once("Triton's kernels", why)
    return why is None


def fastest_way(x: Tensor, experts: Experts) -> Way:
    """The way that should be fastest by `cost_model`, on a GPU that `devices` has a model of; on others by expert.

    That depends on how much is selected, which the host does not know: a fifth is assumed. `SURGEON_GPU=triton` asks
    for expert by expert in any case.
    """
    if x.device.type != "cuda" or os.environ.get("SURGEON_GPU") == "triton":
        return "experts"
    gated, dtype = experts.gate is not None, str(x.dtype).removeprefix("torch.")
    return _fastest_way(x.device, x.shape[0], *experts.w1.shape, gated, dtype)


@lru_cache(4096)
def _fastest_way(gpu: torch.device, tokens: int, count: int, neurons: int, width: int, gated: bool, dtype: str) -> Way:
    device = model_of(gpu)
    if device is None or tokens == 0:
        return "experts"
    return cost_model.fastest_way(device, cost_model.LayerShape(width, count * neurons, neurons, gated), tokens, dtype)


def _forward(call: Call) -> Tensor:
    from surgeon.kernels.triton import host

    return host.forward(*call, **_how(call))


def _backward(call: Call, grad: Tensor, need_x: bool, need_weights: bool) -> Gradients:
    from surgeon.kernels.triton import host

    x, scores, threshold, experts, _, activation = call
    return host.backward(grad, x, scores, threshold, experts, activation, need_x, need_weights, **_how(call))


def _how(call: Call) -> dict[str, Any]:
    return {"way": fastest_way(call.x, call.experts), "ordered": torch.are_deterministic_algorithms_enabled()}


def forward_int8(call: Int8Call, scores: Tensor, threshold: Tensor) -> Tensor:
    """Compute a call that `takes_int8` accepts, for scores [N, E] and thresholds [N]: [N, d_out] in the dtype of x."""
    from surgeon.kernels.triton import int8_host

    return int8_host.forward(call, scores, threshold, ordered=torch.are_deterministic_algorithms_enabled())


def trunk_int8(x: Tensor, x_scale: Tensor | None, fc1: Tensor, fc1_scale: Tensor, fc1_bias: Tensor | None) -> Tensor:
    """Compute what goes into a trunk's activation, for x [N, d_in] that `takes_router` accepts: float32 [N, R]."""
    from surgeon.kernels.triton import int8_host

    return int8_host.trunk(x, x_scale, fc1, fc1_scale, fc1_bias)


def _sorted_threshold(scores: Tensor, tau: Tensor, rule: str) -> Tensor | None:
    if not sorts(scores, tau):
        return None
    from surgeon.kernels.triton import host

    return host.sorted_threshold(scores, tau, rule)


def _sparse_linear(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor | None:
    if not skips_inputs(x, weight):
        return None
    from surgeon.kernels.triton import linear_host

    return linear_host.sparse_linear(x, weight, *rest)  # type: ignore[arg-type]


BACKEND = Backend(takes, _forward, _backward, _sorted_threshold, _sparse_linear)
