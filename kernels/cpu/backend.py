"""The native kernels as a backend. It takes the first call on a CPU, which loads the kernels.

Loaded kernels are in PyTorch's dispatcher, which sends later calls on a CPU to them directly. What they do not support,
they hand on to `surgeon::dynamic_k_ffn_torch`. Other backends compute the gradients.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from surgeon.kernels.backends import Backend, Call, say_once
from surgeon.kernels.cpu import loaded, ready
from surgeon.kernels.int8_arguments import Int8Call


def _takes(call: Call) -> bool:
    return call.x.device.type == "cpu" and ready()


def _forward(call: Call) -> Tensor:
    x, scores, threshold, experts, b2, activation = call
    y: Tensor = torch.ops.surgeon.dynamic_k_ffn(x, scores, threshold, *experts, b2, activation)
    return y


def _sparse_linear(x: Tensor, *rest: Tensor | None) -> Tensor | None:
    if x.device.type != "cpu" or not ready():
        return None
    return torch.ops.surgeon.sparse_linear(x, *rest)  # type: ignore[no-any-return]


BACKEND = Backend(_takes, _forward, sparse_linear=_sparse_linear)


def say_if_unknown(call: Call) -> None:
    """Warn if the native kernels do not take a call because of its activation, once for each activation."""
    if call.x.device.type == "cpu" and loaded() and call.activation not in _activations():
        known = ", ".join(_activations())
        say_once("the native kernels", f"they know the activations {known}, not {call.activation}")


def say_if_float8(call: Int8Call) -> None:
    """Warn, once, if the native kernels do not take a call because of its weights in float8."""
    if call.x.device.type == "cpu" and loaded() and call.experts.float8:
        say_once("the native kernels", "they take weights in int8 and int4, not in float8, so every expert is computed")


@cache
def _activations() -> tuple[str, ...]:
    return tuple(torch.ops.surgeon.cpu_activations())
