"""What the compiler makes of the kernels for chips that need not be here: resources, instructions, launches."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels would be interpreted, not compiled", allow_module_level=True)

import triton
import triton.language as tl

from surgeon.kernels.experts import Experts
from surgeon.kernels.gpu_model import cost as cost_model
from surgeon.kernels.gpu_model.cost import Way
from surgeon.kernels.gpu_model.devices import DEVICES
from surgeon.kernels.triton import backend, launch, plan, tiles

from .compiling import (
    CHIPS,
    KIB,
    MIB,
    Chip,
    Launch,
    build,
    distinct,
    every_kernel,
    pass_through,
    pass_through_int8,
    products_in_32_bits,
    recorded,
    thresholds,
)

DTYPES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
PLANS = {"count", "add_blocks", "add_experts", "fill"}
INTEGERS = {"trunk", "hidden_int8", "combine_int8", "decode_hidden_int8", "decode_combine_int8"}
MULTIPLIES = {"fused", "hidden", "combine", "decode_tokens", "grad_hidden", "grad_weight"} | INTEGERS
ADDS_TO_MEMORY = {"fused", "combine", "decode_tokens", "decode_one", "combine_int8", "decode_combine_int8"}
# What tensor cores multiply bytes to 32 bits with; `kind::i8` stands behind the size of a group of NVIDIA's newest.
OF_BYTES = re.compile(r"\.s32\.s8\.s8|kind::i8|v_mfma_i32_\w+_i8")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def assert_fits(one: Launch, name: str, scratch: Path) -> None:
    chip, target = CHIPS[name]
    built = build(one, target, scratch)
    assert 0 < built.registers <= (512 if chip.backend == "hip" else 255)
    assert built.shared <= chip.shared_memory, one
    # Without TF32, NVIDIA's tensor cores have no fp32 to multiply.
    full_fp32 = one.arguments[0].dtype == torch.float32 and one.constants.get("PRECISION") == "ieee"
    assert not built.spilled, one
    if one.name in MULTIPLIES and not (full_fp32 and chip.backend == "cuda"):
        assert built.matrix, one
        whole = one.name in INTEGERS and not in_float8(one)
        assert all(bool(OF_BYTES.search(matrix)) == whole for matrix in built.matrix), built.matrix
    else:
        assert not built.matrix
    if one.name in ADDS_TO_MEMORY and not one.constants.get("ORDERED"):
        assert built.atomics, one
        assert not any(atomic.startswith("atom") for atomic in built.atomics), "waits for the value that was there"
        if chip.backend == "cuda" and chip.capability >= 90:
            assert any(".v2" in atomic or ".v4" in atomic for atomic in built.atomics), built.atomics
    else:
        assert not built.atomics


def in_float8(one: Launch) -> bool:
    """Whether a kernel multiplies weights in float8: as bytes, without factors."""
    given = dict(zip(one.kernel.arg_names, one.arguments, strict=False))
    return any(
        name in given and given[name].dtype == torch.uint8 and given[f"{name}_group"] is None for name in ("w1", "w2")
    )


@pytest.mark.parametrize(
    ("name", "kernel", "dtype", "neurons", "gated"),
    [
        ("sm_80", "fused", "bf16", 128, False),
        ("sm_90", "combine", "bf16", 128, False),
        ("sm_100", "hidden", "fp16", 256, False),
        ("gfx942", "fused", "bf16", 24, False),
        ("sm_90", "grad_weight", "tf32", 24, False),
        ("sm_80", "fill", "bf16", 24, False),
    ],
)
def test_fits_the_chip(name: str, kernel: str, dtype: str, neurons: int, gated: bool, tmp_path: Path) -> None:
    torch_dtype, tf32 = DTYPES[dtype]
    with recorded(adding_atomically(name), tf32=tf32) as launches:
        for backward in (False, True):
            pass_through(4096, 3072 // neurons, neurons, 768, torch_dtype, gated=gated, backward=backward)
    (one, *_) = [one for one in launches if one.name == kernel]
    assert_fits(one, name, tmp_path)


def adding_atomically(name: str) -> Chip:
    """A chip whose cache is never too small for that."""
    return CHIPS[name][0]._replace(cache=2**40)


@pytest.mark.parametrize("tokens", [1, 16])
def test_decoding_fits_the_chip(tokens: int, tmp_path: Path) -> None:
    with recorded(CHIPS["sm_90"][0]) as launches:
        pass_through(tokens, 24, 128, 768, torch.bfloat16, gated=False)
    assert_fits(launches[0], "sm_90", tmp_path)


@pytest.mark.parametrize(
    ("name", "kernel", "weights", "gated"),
    [
        ("sm_80", "hidden_int8", {}, True),
        ("sm_90", "combine_int8", {"group": 32}, False),
        ("sm_100", "trunk", {}, False),
        ("gfx942", "hidden_int8", {"group": 32}, True),
        ("gfx942", "combine_int8", {}, False),
        ("sm_80", "hidden_int8", {"float8": True}, True),
        ("sm_90", "combine_int8", {"float8": True}, False),
        ("gfx942", "hidden_int8", {"float8": True}, True),
    ],
)
def test_weights_of_8_and_4_bits_fit_the_chip(
    name: str, kernel: str, weights: dict[str, Any], gated: bool, tmp_path: Path
) -> None:
    with recorded(adding_atomically(name)) as launches:
        pass_through_int8(4096, 24, 128, 768, gated=gated, **weights)
    (one,) = [one for one in launches if one.name == kernel]
    assert_fits(one, name, tmp_path)


# sm_100 has the tiles for fp32 of sm_80 and sm_90. sm_86 and sm_120 are here for their shared memory.
TABLE = [(name, dtype) for name in ("sm_80", "sm_90", "sm_100") for dtype in ("bf16", "tf32", "fp32")]
TABLE.remove(("sm_100", "fp32"))
TABLE += [("gfx942", "bf16"), ("gfx942", "fp32"), ("sm_86", "bf16"), ("sm_120", "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), TABLE)
def test_the_whole_table_fits(name: str, dtype: str, tmp_path: Path) -> None:
    for one in distinct(whole_table(name, dtype)):
        assert_fits(one, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_the_whole_table_for_weights_of_8_and_4_bits_fits(name: str, tmp_path: Path) -> None:
    with recorded(adding_atomically(name)) as launches:
        for gated, weights, neurons in (
            (True, {}, 128), (False, {"group": 32}, 24), (True, {"float8": True}, 128), (False, {"float8": True}, 24)
        ):  # fmt: skip
            for tokens in (1, 4096):
                pass_through_int8(tokens, 3072 // neurons, neurons, 768, gated=gated, **weights)
        pass_through_int8(4096, 24, 24, 768, gated=False, ordered=True)
    for one in distinct([one for one in launches if one.name in INTEGERS | {"round_rows"}]):
        assert_fits(one, name, tmp_path)


def whole_table(name: str, dtype: str) -> list[Launch]:
    """Launches with all tiles for a chip and a dtype; those of TF32, which are those of fp32, only if gated.

    The most neurons that are fused, so many that they take several tiles, and a number that is no multiple of 16, so
    that addresses are not either.
    """
    torch_dtype, tf32 = DTYPES[dtype]
    little = name in ("sm_86", "sm_120")
    chip = adding_atomically(name)
    with recorded(chip, tf32=tf32) as launches:
        for gated in (True,) if tf32 else (False, True):
            run = partial(pass_through, width=768, dtype=torch_dtype, gated=gated)
            for backward in (False, True):
                run(4096, 50, tiles.most_fused(chip, torch_dtype, gated=gated) or 64, backward=backward)
                run(4096, 50, 256, backward=backward)
                if not little:
                    run(4096, 512, 24, backward=backward)
                    run(4096, 50, 256, ordered=True, backward=backward)
                if not little and dtype == "bf16":
                    run(16, 10, 128, backward=backward)
            run(4096, 50, 24, way="masked")
            run(4096, 50, 24, way="masked", backward=True)
            run(4096, 50, tiles.most_fused(chip, torch_dtype, gated=gated) or 64, way="spread")
            if not little:
                run(1, 50, 128)
                run(16, 50, 128)
        for rule in ("energy", "top_k"):
            for experts in (24, 8192):
                thresholds(4096, experts, rule)
    # Plans and thresholds do not depend on the dtype.
    return [one for one in launches if dtype == "bf16" or one.name not in PLANS | {"sorted_threshold"}]


def test_launches() -> None:
    chip = CHIPS["sm_90"][0]

    def names(tokens: int, neurons: int = 32, *, gated: bool = True, backward: bool = False, **how: Any) -> list[str]:
        with recorded(chip) as launches:
            sizes = tokens, 3072 // neurons, neurons, 768, torch.bfloat16
            pass_through(*sizes, gated=gated, backward=backward, **how)
        return [one.name for one in launches]

    planned = ["count", "add_blocks", "add_experts", "fill"]
    assert len(planned) == plan.LAUNCHES
    assert names(1) == ["decode_one"]
    assert names(2) == names(16) == ["decode_tokens"]
    assert names(17, neurons=512) == [*planned, "hidden", "combine"]
    assert names(4096) == [*planned, "fused"]
    assert names(4096, neurons=256) == [*planned, "hidden", "combine"]
    assert names(16384, neurons=256) == [*planned, "hidden", "combine", "reduce"]
    assert names(64, ordered=True) == [*planned, "hidden", "combine", "reduce"]
    assert names(8, way="spread") == names(4096, way="spread", ordered=True) == [*planned, "hidden"]
    assert names(8, way="masked") == names(4096, way="masked", ordered=True) == ["mask"]
    with recorded(chip) as launches:
        thresholds(4096, 96, "top_k")
    assert [(one.name, one.programs) for one in launches] == [("sorted_threshold", (4096,))]
    weights = ["grad_weight"] * 3
    # One plan and one set of hidden values, whether gradients of x are added atomically or in order.
    assert names(64, ordered=True, backward=True) == [*planned, "grad_hidden", "combine", "reduce", *weights]
    assert names(4096, backward=True) == [*planned, "grad_hidden", "combine", *weights]
    assert names(4096, gated=False, backward=True) == [*planned, "grad_hidden", "combine", *weights[:2]]
    for way in ("spread", "masked"):
        assert names(8, way=way, backward=True) == names(4096, way=way, ordered=True, backward=True) == ["grad_mask"]


def test_launches_with_weights_of_8_bits() -> None:
    def names(tokens: int, *, ordered: bool = False) -> list[str]:
        with recorded(CHIPS["sm_90"][0]) as launches:
            pass_through_int8(tokens, 24, 128, 768, gated=True, ordered=ordered)
        return [one.name for one in launches]

    before = ["round_rows", "trunk", "round_rows"]
    planned = [*before, "count", "add_blocks", "add_experts", "fill", "hidden_int8", "combine_int8"]
    assert names(1) == names(16) == [*before, "decode_hidden_int8", "decode_combine_int8"]
    assert names(17) == names(4096) == planned
    assert names(16, ordered=True) == names(10000) == [*planned, "reduce"]


@pytest.mark.parametrize(("name", "device"), [("sm_90", "h100"), ("sm_80", "a100")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cost_model_has_the_tiles_of_the_table(name: str, device: str, dtype: str) -> None:
    chip, model, torch_dtype = CHIPS[name][0], DEVICES[device], getattr(torch, dtype)
    for tokens in (17, 100, 1000, 100_000):
        assert cost_model._rows(model, tokens, dtype) == tiles.rows(chip, torch_dtype, tokens)
    for gated in (False, True):
        assert cost_model._most_fused(model, gated, dtype) == tiles.most_fused(chip, torch_dtype, gated=gated)


def test_the_grid_depends_on_shapes_alone() -> None:
    """Nothing asks a tensor for its values: tensors without any will do."""
    chip = Chip("cuda", 90, 7, 227 * KIB, 50 * MIB)
    with recorded(chip) as launches:
        pass_through(5000, 30, 100, 64, torch.bfloat16, gated=False)
    assert launches[-1].name == "fused"
    assert launches[-1].programs == (7 * 2,)


@triton.jit
def _overflows(x, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + row * width, tl.load(x + row.to(tl.int64) * width))


def test_offsets_have_64_bits() -> None:
    chip, target = CHIPS["sm_90"]
    x = torch.empty(8, device="meta")
    assert len(products_in_32_bits(Launch(_overflows, (1,), (x, x, 10), 4, 1, {"block": 16}), target)) == 1
    launches = every_kernel(chip)
    assert {one.name for one in launches} == MULTIPLIES | PLANS | {
        "decode_one",
        "mask",
        "grad_mask",
        "reduce",
        "sorted_threshold",
        "round_rows",
    }
    for one in launches:
        assert products_in_32_bits(one, target) == [], one.name


@pytest.mark.parametrize(("tokens", "experts", "neurons", "width"), [(1, 1, 1, 1), (20, 1, 1, 1), (20, 3, 1, 20)])
def test_sizes_of_one_compile(tokens: int, experts: int, neurons: int, width: int) -> None:
    """Triton makes an argument that is 1 a constant, on which kernels cannot do all that they can with a value."""
    chip, target = CHIPS["sm_90"]
    with recorded(chip) as launches:
        for way in get_args(Way):
            pass_through(tokens, experts, neurons, width, torch.bfloat16, gated=False, way=way)
        pass_through(tokens, experts, neurons, width, torch.bfloat16, gated=True, ordered=True, backward=True)
        pass_through(tokens, experts, neurons, width, torch.bfloat16, gated=True, way="masked", backward=True)
        thresholds(tokens, experts, "cumulative")
        for group, float8 in ((None, False), (8, False), (None, True)):
            pass_through_int8(tokens, experts, neurons, width, gated=True, group=group, float8=float8)
    for one in launches:
        assert products_in_32_bits(one, target) == [], one.name


def test_tf32_is_for_fp32_where_torch_may_use_it() -> None:
    assert launch.precision(torch.float32, "cuda") == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert launch.precision(torch.float32, "cuda") == "tf32"
        assert launch.precision(torch.float32, "hip") == launch.precision(torch.bfloat16, "cuda") == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_what_is_not_supported_is_said() -> None:
    w = torch.empty(2, 3, 4)
    weights = Experts(w, None, None, None, w)
    reason = backend.supports(torch.empty(5, 4), weights, "relu")
    assert reason is not None
    assert "not on cpu" in reason
    assert backend.supports_router(torch.empty(5, 4)) == reason
