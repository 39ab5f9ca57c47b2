"""Norms are found however they are written, with their gain, shift and eps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.sites.norms import Norm, find_norms
from tests.small_models import WIDTH, Function

GAIN = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) + 2
SHIFT = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def found(compute: Callable[[Any, Tensor], Tensor], dtype: torch.dtype = torch.float64) -> list[Norm]:
    model = Function(compute, gain=torch.nn.Parameter(GAIN.to(dtype)), shift=SHIFT.to(dtype)).eval()
    return find_norms(surgeon.trace(model, X.to(dtype)))


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def standardised(x: Tensor, eps: float = 1e-12) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)


SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool, Tensor | None, Tensor | None, float]] = {
    "layer_norm": (lambda m, x: F.layer_norm(x, [WIDTH], m.gain, m.shift, 1e-5), True, GAIN, SHIFT, 1e-5),
    "layer_norm without gain": (lambda m, x: F.layer_norm(x, [WIDTH]), True, None, None, 1e-5),
    "rms_norm": (lambda m, x: F.rms_norm(x, [WIDTH], m.gain, 1e-6), False, GAIN, None, 1e-6),
    "rms_norm of a computed gain": (lambda m, x: F.rms_norm(x, [WIDTH], 1 + m.gain, 1e-6), False, 1 + GAIN, None, 1e-6),
    "written out": (lambda m, x: m.gain * rms(x), False, GAIN, None, 1e-6),
    "written out, 1 + gain": (lambda m, x: rms(x.float()).type_as(x) * (1.0 + m.gain), False, 1 + GAIN, None, 1e-6),
    "by a root": (lambda m, x: x / torch.sqrt(x.square().mean(-1, True) + 1e-3), False, None, None, 1e-3),
    "by the length": (lambda m, x: WIDTH**0.5 * F.normalize(x, dim=-1) * m.gain, False, GAIN, None, 0.0),
    "standardised": (lambda m, x: standardised(x) * m.gain + m.shift, True, GAIN, SHIFT, 1e-12),
    "var of a sample": (
        lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-3).sqrt(), True,
        torch.full((WIDTH,), ((WIDTH - 1) / WIDTH) ** 0.5, dtype=torch.float64), None, 1e-3 * (WIDTH - 1) / WIDTH,
    ),
    "var": (
        lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(), True, None, None,
        1e-5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str) -> None:
    compute, centred, gain, shift, eps = SPELLINGS[name]
    (norm,) = found(compute)
    assert norm.centred == centred
    assert norm.eps == pytest.approx(eps, rel=1e-6, abs=1e-14)
    for got, want in ((norm.gain, gain), (norm.shift, shift)):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert torch.allclose(got, want.double(), atol=1e-12)
    want = norm.normalised(X) * (1 if gain is None else gain.double()) + (0 if shift is None else shift.double())
    model = Function(compute, gain=torch.nn.Parameter(GAIN.double()), shift=SHIFT.double())
    assert torch.allclose(model(X.double()), want, atol=1e-6)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),  # over tokens
        lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1.0) ** 2,
        lambda m, x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6),
        lambda m, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 0.1),  # eps beside the root
        lambda m, x: F.layer_norm(x, [5, WIDTH]),
        lambda m, x: F.softmax(x, -1),
    ],
)
def test_what_is_no_norm_of_this_kind(compute: Callable[[Any, Tensor], Tensor]) -> None:
    assert found(compute) == []


def test_two_norms_of_one_value() -> None:
    norms = found(lambda m, x: rms(x) * m.gain @ rms(x, 1e-3).transpose(1, 2))
    assert [norm.eps for norm in norms] == [1e-6, 1e-3]
    assert [norm.gain is None for norm in norms] == [False, True]


def test_a_norm_whose_statistics_are_read_elsewhere_is_none() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return torch.tanh(x * torch.rsqrt(mean + 1e-6)) * torch.tanh(mean)

    assert found(compute) == []
