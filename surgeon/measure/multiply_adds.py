"""Count the multiply-adds of matrix products, and name the ops that multiply but have no formula.

torch's flop counter knows matrix products, convolutions and attention. The formulas here add grouped products,
recurrent layers, products with vectors, distances and products of whole numbers. Pointwise ops, sums and norms do not
count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = Sequence[int]
# Namespaces of ops without products, or whose products are known.
_KNOWN = {"aten", "prim", "prims", "surgeon", "profiler"}
# Parts of the names of ATen ops that multiply matrices or signals, and of ops with such names that do not.
_MULTIPLIES = re.compile(
    r"(^|_)(\w*mm|matmul|v?dot|\w*mv|addr|conv\w*|\w*linear|lstm|gru|rnn|attention|fft|linalg|[cp]?dist|euclidean"
    r"|encoder|matrix|svd|qr|eigh?|eigvals\w*|cholesky|\w*solve|inverse|\w*det|lu|orgqr|ormqr)(_|\d|$)"
)
_CHEAP = re.compile(r"upsample|_norm|linalg_diagonal|cross|check_errors|convert|fftshift|fftfreq|prepack")


class Counter:
    """Counts the multiply-adds of what runs in its context."""

    def __init__(self) -> None:
        self._flops: Any = FlopCounterMode(display=False, custom_mapping=_formulas())
        self._seen: Any = _Seen(self._flops.flop_registry)

    def __enter__(self) -> Counter:
        # The inner mode is asked first. It takes apart what consists of other ops, so that the outer one sees those.
        self._seen.__enter__()
        self._flops.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._flops.__exit__(*error)
        self._seen.__exit__(*error)

    @property
    def multiply_adds(self) -> int:
        """What was counted. torch counts one multiply-add as two operations."""
        return int(self._flops.get_total_flops() // 2)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The names of the ops that multiply but have no formula, in the order of their first calls."""
        return tuple(self._seen.uncounted)


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the ops that have no formula."""

    supports_higher_order_operators = True

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas, self.uncounted = formulas, dict[str, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.overloadpacket not in self._formulas and _multiplies(func):
            self.uncounted[_name(func)] = None
        return func(*args, **(kwargs or {}))


def _multiplies(op: torch._ops.OpOverload) -> bool:
    if torch.Tag.pointwise in op.tags:
        return False
    name = _name(op).partition("::")[2]
    return op.namespace not in _KNOWN or bool(_MULTIPLIES.search(name) and not _CHEAP.search(name))


def _name(op: torch._ops.OpOverload) -> str:
    """Return `aten::mv` for `aten::mv.out`."""
    return str(op.name()).partition(".")[0]  # type: ignore[no-untyped-call]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _numel(shape: Shape) -> int:
    return math.prod(shape)


def _rows(x: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    """Every number of the output is a product of one row of x [..., k] and one column."""
    return 2 * _numel(out_shape) * x[-1]


def _grouped(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    """Groups of rows of x [N, k], each times its own matrix; or groups of columns that are summed over."""
    if len(x) == len(weight) == 2:
        return 2 * math.prod(x) * weight[-1]
    return 2 * _numel(out_shape) * x[-1]


def _second_and_third(_: Shape, one: Shape, two: Shape, *__: Any, **___: Any) -> int:
    """`addmv`, `addr` and `addbmm`: the product of the second and the third argument is added to the first."""
    return 2 * math.prod(one) * (two[0] if len(one) == 1 else two[-1] if len(two) == 3 else 1)


def _first_numel(x: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x)


def _recurrent(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Every token is multiplied by all matrices of all layers and directions."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


def _recurrent_layer(x: Shape, into: Shape, again: Shape, *_: Any, **__: Any) -> int:
    return _recurrent(x, [into, again])


def _trilinear(a: Shape, b: Shape, c: Shape, *expand: Sequence[int], **_: Any) -> int:
    """The factors get dimensions of size 1 at the places `expand`. Their product is summed afterwards."""
    sizes = []
    for shape, places in zip((a, b, c), expand[:3], strict=True):
        full = list(shape)
        for place in sorted(places):
            full.insert(place, 1)
        sizes.append(full)
    return 2 * _numel([max(places) for places in zip(*sizes, strict=True)])


def _along_time(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    """`conv_tbc`: the weight is [length, d_in, d_out]."""
    return 2 * _numel(out_shape) * weight[0] * weight[1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm_v2": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "aten::mv": _first_numel,
    "aten::dot": _first_numel,
    "aten::vdot": _first_numel,
    "aten::addmv": _second_and_third,
    "aten::addr": _second_and_third,
    "aten::addbmm": _second_and_third,
    "aten::mkldnn_rnn_layer": _recurrent_layer,
    "aten::_cudnn_rnn": _recurrent,
    "aten::miopen_rnn": _recurrent,
    "aten::_trilinear": _trilinear,
    "aten::conv_tbc": _along_time,
    "aten::_cdist_forward": _rows,
    "aten::_euclidean_dist": _rows,
    "aten::_pdist_forward": _rows,
    "aten::_int_mm": _rows,
    "aten::_weight_int8pack_mm": _rows,
    "aten::_weight_int4pack_mm": _rows,
    "aten::_weight_int4pack_mm_for_cpu": _rows,
    "aten::_dyn_quant_matmul_4bit": _rows,
    "aten::mkldnn_linear": _rows,
    "mkldnn::_linear_pointwise": _rows,
    "quantized::linear": _rows,
    "quantized::linear_dynamic": _rows,
}
"""Formulas in operations, two for a multiply-add, by the op's name. They take the shapes of tensors."""


def _formulas() -> dict[Any, Callable[..., int]]:
    """The formulas of the ops that exist now: other packages register theirs when they are imported."""
    found = {}
    for name, formula in _FORMULAS.items():
        namespace, op = name.split("::")
        if hasattr(getattr(torch.ops, namespace), op):
            found[getattr(getattr(torch.ops, namespace), op)] = formula
    return found
