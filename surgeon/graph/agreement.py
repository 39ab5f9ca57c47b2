"""Compare two ways of computing the same: run both under the same conditions and compare their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Largest accepted difference between graph and model, relative to the model's largest output.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

_PIECE = 1 << 20  # values that are compared at a time


def call_reproducibly(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the model without gradients and with a fixed random state, so that two runs of a noisy model agree."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # torch's fused encoder layer sets padded positions to zero. No other form of the same model does that.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _seed(0)
            return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _seed(seed: int) -> None:
    """Seed the random numbers of all devices. Where there is only the processor, torch would write down its callers."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference between two outputs, relative to the largest expected value.

    Each floating-point tensor is compared on its own, and the worst error is returned. Values of other types must be
    equal. The error is infinite if structure, shape, or the positions of NaN and infinity differ.
    """
    left, right = pytree.tree_leaves(without_none(actual)), pytree.tree_leaves(without_none(expected))
    if len(left) != len(right):
        return float("inf")
    return max((_leaf_error(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def tolerance_for(outputs: Any, model: nn.Module | None = None) -> float:
    """Return the accepted relative error. The coarsest dtype among the outputs and the model's parameters decides."""
    dtypes = {leaf.dtype for leaf in pytree.tree_leaves(without_none(outputs)) if isinstance(leaf, Tensor)}
    if model is not None:
        dtypes |= {parameter.dtype for parameter in model.parameters()}
    return max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=TOLERANCE[torch.float32])


def without_none(outputs: Any) -> Any:
    """Return output mappings as plain dicts without the fields that are None, because an export drops those."""
    if isinstance(outputs, Mapping):
        return {key: value for key, value in outputs.items() if value is not None}
    return outputs


def _leaf_error(actual: object, expected: object) -> float:
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if actual is expected or bool(actual == expected) else float("inf")
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    difference = largest = 0.0
    # In pieces: the logits of a language model are large, and are compared in float64.
    for a, b in zip(_pieces(actual), _pieces(expected), strict=True):
        a, b = a.double(), b.double()
        finite = torch.isfinite(b)
        if not torch.equal(torch.nan_to_num(a, 1.5, 2.5, -2.5)[~finite], torch.nan_to_num(b, 1.5, 2.5, -2.5)[~finite]):
            return float("inf")
        a, b = a[finite], b[finite]
        if b.numel() == 0:
            continue
        if not bool(torch.isfinite(a).all()):
            return float("inf")
        difference, largest = max(difference, float((a - b).abs().max())), max(largest, float(b.abs().max()))
    return difference / max(largest, 1e-12)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.detach().flatten(), _PIECE)
