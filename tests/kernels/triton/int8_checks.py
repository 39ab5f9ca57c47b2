"""Compare the operator with weights of 8 or 4 bits on Triton's kernels with its plain twin, as `checks` does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from surgeon.kernels import cpu
from surgeon.kernels.int8 import routed_ffn_int8, router_scores_int8
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.panels import unpack
from surgeon.kernels.triton import backend
from tests.kernels.int8_calls import agree, oracle

from .checks import module

ops = torch.ops.surgeon


@dataclass(frozen=True)
class Sizes:
    """Tiles so small that small layers take several.

    Attributes:
        tile: neurons, depth and columns of every tile.
        rows: of a tile.
        programs: how many share out the tiles.
        ordered: add up pairs in a fixed order.
        room: bytes for hidden values and for what pairs give, if not as many as usual.
    """

    tile: int = 32
    rows: int = 16
    programs: int = 3
    ordered: bool = False
    room: int | None = None


@contextmanager
def on_kernels(sizes: Sizes | None) -> Iterator[None]:
    """Have the operators use Triton's kernels, also on a processor; None for the sizes of the table."""
    if module("launch").INTERPRETED:
        assert not cpu.loaded(), "the dispatcher would send all calls on a processor there: set SURGEON_CPU=torch"
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, SURGEON_GPU="triton"))
        # Thresholds have tests of their own, and take most of the time.
        stack.enter_context(patch.object(backend, "sorts", lambda *_: False))
        if sizes is not None:
            tiles = module("tiles")
            small = tiles.Tiles(sizes.rows, sizes.tile, sizes.tile, sizes.tile, 4, 2)
            names = ("hidden_int8", "combine_int8", "decode_int8", "trunk", "round_rows")
            forced: dict[str, Any] = {name: lambda *_, **__: small for name in names}
            forced |= {
                "rows": lambda *_: sizes.rows,
                "depth_int8": lambda *_: sizes.tile,
                "adds_atomically": lambda *_: not sizes.ordered,
                "programs": lambda *_: sizes.programs,
            }
            stack.enter_context(patch.multiple(tiles, **forced))
            if sizes.room is not None:
                stack.enter_context(patch.object(module("int8_host"), "HIDDEN_BYTES", sizes.room))
        yield


def among_garbage(call: Int8Call, device: str = "cpu") -> Int8Call:
    """The same call with NaN, or large integers, before and behind every tensor: who reads past an end will show it."""

    def between(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value.to(device) if isinstance(value, Tensor) else value
        margin = 64
        filling = float("nan") if value.is_floating_point() else 99
        memory = value.new_full((value.numel() + 2 * margin,), filling)
        memory[margin:-margin] = value.flatten()
        return memory.to(device)[margin:-margin].view(value.shape)

    return Int8Call(*(between(value) for value in call))


def check_int8(call: Int8Call, sizes: Sizes | None = Sizes(), device: str = "cpu") -> None:
    """The scores and the outputs of a call, against the plain twin in torch."""
    call = among_garbage(call, device)
    assert module("backend").supports_int8(call) is None
    with on_kernels(sizes):
        scores, found = router_scores_int8(*call.router), routed_ffn_int8(*call)
    wanted_scores, wanted = ops.router_scores_int8_torch(*call.router), ops.routed_ffn_int8_torch(*call)
    assert scores.shape == wanted_scores.shape
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted_scores, rtol=3e-5, atol=3e-6, equal_nan=True)
    assert found.dtype == call.x.dtype
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert torch.equal(found.isnan(), wanted.isnan())
    agree(found.nan_to_num(), wanted.nan_to_num(), call.x.dtype)


def check_definition(call: Int8Call) -> None:
    """The outputs of a call, against its definition in float64."""
    with on_kernels(Sizes()):
        scores, found = router_scores_int8(*call.router), routed_ffn_int8(*call)
    agree(found, oracle(call, scores), call.x.dtype)


def check_trunk(call: Int8Call) -> None:
    """The product of a trunk of ones in its scales, which is an integer: exactly."""
    assert call.fc1 is not None
    assert call.fc1_scale is not None
    with on_kernels(Sizes()):
        found = module("backend").trunk_int8(call.x, None, call.fc1, torch.ones_like(call.fc1_scale), None)
    step = call.x.abs().amax(-1, keepdim=True) / 2047
    q = (call.x / step).round().double()
    whole = q @ unpack(call.fc1, len(call.fc1_scale), call.x.shape[-1]).double().t()
    assert torch.equal(found, whole.float() * step)
