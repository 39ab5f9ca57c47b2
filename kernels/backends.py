"""The interface of the operators' backends, and the search for them.

A backend is a folder beside this file with a module `backend` whose `BACKEND` is a `Backend`. Nothing else names it:
the first call searches the folders, once. So a new backend is a folder here and its test in tests/kernels/.
After it has taken a call, a backend may also register kernels of its own with PyTorch's dispatcher, as cpu does. Later
calls then reach those directly.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

import surgeon.kernels
from surgeon.kernels.experts import Experts, Gradients

log = logging.getLogger("surgeon")

GENERAL = "torch"
"""The folder of the backend that takes every call, and is therefore asked last."""


class Call(NamedTuple):
    """A call of `surgeon::dynamic_k_ffn` whose arguments fit together, with the tokens in one dimension.

    x [N, d_in], floating; scores [N, E] and threshold [N], any floating dtype; experts, and b2 [d_out] or None, of the
    dtype and on the device of `x`; activation: a name of `surgeon.kernels.activations.ACTIVATIONS`.
    """

    x: Tensor
    scores: Tensor
    threshold: Tensor
    experts: Experts
    b2: Tensor | None
    activation: str


@dataclass(frozen=True)
class Backend:
    """One way to compute the operators.

    Attributes:
        takes: `takes(call)`: whether `forward` and `backward` are to compute this call. It is asked at every call, so
            it must be quick.
        forward: `forward(call)`: Σ over the selected experts of h_e w2_e, plus b2, as a new contiguous tensor
            [N, d_out] in the dtype of `x`. Sums over experts are accumulated in fp32 at least.
        backward: `backward(call, grad, need_x, need_weights)`: the gradients for `grad` [N, d_out], in the shapes and
            dtypes of their inputs, None where not needed. b2 is None in this call: its gradient is not asked for.
            None: the next backend that takes the call computes them.
        sorted_threshold: `sorted_threshold(scores, tau, rule)`: the result of `surgeon::sorted_threshold` (see
            `surgeon.kernels.selection`), or None for scores that it does not take. None: it takes no scores.
        sparse_linear: `sparse_linear(x, weight, ...)`: the result of `surgeon::sparse_linear` (see
            `surgeon.kernels.sparse_linear`) for arguments that fit together, or None for those that it does not take.
            None: it takes none.
    """

    takes: Callable[[Call], bool]
    forward: Callable[[Call], Tensor]
    backward: Callable[[Call, Tensor, bool, bool], Gradients] | None = None
    sorted_threshold: Callable[[Tensor, Tensor, str], Tensor | None] | None = None
    sparse_linear: Callable[..., Tensor | None] | None = None


@cache
def backends() -> tuple[Backend, ...]:
    """Return all backends in the order in which they are asked: sorted by name, with the general one last."""
    folders = {module.name for module in pkgutil.iter_modules(surgeon.kernels.__path__) if module.ispkg}
    modules = (f"{surgeon.kernels.__name__}.{name}.backend" for name in [*sorted(folders - {GENERAL}), GENERAL])
    return tuple(import_module(name).BACKEND for name in modules if find_spec(name) is not None)


@cache
def say_once(kernels: str, why: str) -> None:
    """Warn that the torch backend runs instead of `kernels`, and why. Each reason is given once per process."""
    log.warning("The torch backend runs instead of %s: %s.", kernels, why)
