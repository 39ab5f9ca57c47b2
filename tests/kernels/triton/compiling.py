"""Compile what the host code launches for chips that are not here, and read the resources off the result."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from surgeon.kernels.experts import Experts
from surgeon.kernels.gpu_model.cost import Way
from surgeon.kernels.panels import factors_shape, groups_of, halves_shape, panels_shape
from surgeon.kernels.triton.launch import Chip

from ..int8_calls import int8_call
from .checks import module

KIB, MIB = 1024, 2**20
# Shared memory that one block may use: CUDA C++ Programming Guide, technical specifications per compute capability; L2
# caches: data sheets of the A100, the RTX 3090, the H100, the B200, the RTX 5090 and the MI300X.
CHIPS = {
    "sm_80": (Chip("cuda", 80, 108, 163 * KIB, 40 * MIB), GPUTarget("cuda", 80, 32)),
    "sm_86": (Chip("cuda", 86, 84, 99 * KIB, 6 * MIB), GPUTarget("cuda", 86, 32)),
    "sm_90": (Chip("cuda", 90, 132, 227 * KIB, 50 * MIB), GPUTarget("cuda", 90, 32)),
    "sm_100": (Chip("cuda", 100, 148, 227 * KIB, 126 * MIB), GPUTarget("cuda", 100, 32)),
    "sm_120": (Chip("cuda", 120, 170, 99 * KIB, 96 * MIB), GPUTarget("cuda", 120, 32)),
    "gfx942": (Chip("hip", 0, 304, 64 * KIB, 4 * MIB), GPUTarget("hip", "gfx942", 64)),
}
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and what it would have been started with."""

    kernel: Any
    programs: tuple[int, ...]
    arguments: tuple[Any, ...]
    warps: int
    stages: int
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).lstrip("_")


@contextmanager
def recorded(chip: Chip, *, tf32: bool = False) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, with sizes as they are for `chip`."""
    launches: list[Launch] = []

    def record(
        kernel: Any, programs: tuple[int, ...], *arguments: Any, warps: int, stages: int, **constants: Any
    ) -> None:
        launches.append(Launch(kernel, programs, arguments, warps, stages, constants))

    def precision(dtype: torch.dtype, backend: str) -> str:
        return "tf32" if tf32 and dtype == torch.float32 and backend == "cuda" else "ieee"

    with patch.multiple(module("launch"), launch=record, chip=lambda device: chip, precision=precision):
        yield launches


def pass_through(
    tokens: int,
    experts: int,
    neurons: int,
    width: int,
    dtype: torch.dtype,
    *,
    gated: bool,
    way: Way = "experts",
    ordered: bool = False,
    backward: bool = False,
) -> None:
    """A forward or backward pass over tensors without values, with every bias."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    up, bias = (experts, neurons, width), (experts, neurons)
    weights = Experts(
        empty(*up), empty(*bias), empty(*up) if gated else None, empty(*bias) if gated else None, empty(*up)
    )
    x, activation = empty(tokens, width), "silu" if gated else "gelu"
    scores, threshold = empty(tokens, experts, dtype=torch.float32), empty(tokens, dtype=torch.float32)
    if backward:
        module("host").backward(x, x, scores, threshold, weights, activation, way=way, ordered=ordered)
    else:
        module("host").forward(x, scores, threshold, weights, empty(width), activation, way=way, ordered=ordered)


def pass_through_int8(
    tokens: int,
    experts: int,
    neurons: int,
    width: int,
    *,
    gated: bool,
    group: int | None = None,
    float8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    ordered: bool = False,
) -> None:
    """A router's trunk and the experts of the operator with weights of 8 bits, or of 4 bits, over tensors without
    values."""
    weights: dict[str, Any] = {"group": None if group is None else 8, "float8": float8}
    call = int8_call((1,), 2, 16, 16, 16, gated=gated, scaled=True, dtype=dtype, **weights)
    rows, up, down = (experts, neurons), (neurons, width), (width, neurons)
    sizes: dict[str, tuple[int, ...]] = {
        "x": (tokens, width), "x_scale": (width,), "y_scale": (width,), "b2": (width,),
        "fc1": panels_shape(96, width, torch.int16), "fc1_scale": (96,), "fc1_bias": (96,),
        "w1_scale": rows, "gate_scale": rows, "w2_scale": rows, "b1": rows, "b_gate": rows,
    }  # fmt: skip
    for name, matrix in (("w1", up), ("gate", up), ("w2", down)):
        shape = panels_shape(*matrix, torch.int8) if group is None else halves_shape(*matrix)
        sizes[name] = (experts, *shape)
        if group is not None:
            sizes[f"{name}_group"] = (experts, *factors_shape(matrix[0], groups_of(matrix[1], group)))
    tensors = {name: getattr(call, name) for name in sizes}
    call = call._replace(
        activation="silu" if gated else "relu",
        **{
            name: torch.empty(sizes[name], dtype=tensor.dtype, device="meta")
            for name, tensor in tensors.items()
            if tensor is not None
        },
    )
    host = module("int8_host")
    host.trunk(call.x, call.x_scale, call.fc1, call.fc1_scale, call.fc1_bias)
    scores, threshold = (torch.empty(shape, device="meta") for shape in ((tokens, experts), (tokens,)))
    host.forward(call, scores, threshold, ordered=ordered)


def thresholds(tokens: int, experts: int, rule: str) -> None:
    """Those of scores without values."""
    module("host").sorted_threshold(torch.empty(tokens, experts, device="meta"), torch.empty((), device="meta"), rule)


def every_kernel(chip: Chip) -> list[Launch]:
    """Each kernel at least once, with sizes of which none is 1 or known to be a multiple of 16."""
    with recorded(chip) as launches:
        for tokens in (1, 8, 5000):
            pass_through(tokens, 500, 50, 75, torch.bfloat16, gated=True)
        pass_through(40, 50, 200, 75, torch.bfloat16, gated=True)
        pass_through(40, 50, 50, 75, torch.bfloat16, gated=True, ordered=True)
        pass_through(40, 50, 50, 75, torch.bfloat16, gated=True, way="spread")
        pass_through(40, 50, 50, 75, torch.bfloat16, gated=True, way="masked")
        pass_through(40, 50, 50, 75, torch.bfloat16, gated=True, backward=True)
        pass_through(40, 50, 50, 75, torch.bfloat16, gated=True, way="masked", backward=True)
        thresholds(40, 50, "energy")
        for tokens in (8, 5000):
            for group in (None, 16):
                pass_through_int8(tokens, 50, 50, 75, gated=True, group=group)
            pass_through_int8(tokens, 50, 50, 75, gated=True, float8=True)
        pass_through_int8(40, 50, 50, 75, gated=True, ordered=True)
    kinds = {(one.name, one.constants.get("SPREAD"), *map(_kind, one.arguments)): one for one in launches}
    return list(kinds.values())


def _kind(argument: Any) -> Any:
    """What decides about the code that a kernel has: whether a tensor is there, and whether it is of bytes."""
    return argument.dtype == torch.uint8 if isinstance(argument, torch.Tensor) else argument is None


@dataclass(frozen=True)
class Built:
    """What the compiler made of a launch.

    registers: of a thread; spilled: bytes of a thread's stack and local memory, or spilled registers on AMD; shared:
    bytes; matrix: tensor-core instructions; atomics: instructions that add to memory; text: PTX or AMD assembly.
    """

    registers: int
    spilled: int
    shared: int
    matrix: tuple[str, ...]
    atomics: tuple[str, ...]
    text: str = field(repr=False)


def source_of(one: Launch) -> ASTSource:
    """What Triton would compile when the launch starts: pointers and multiples of 16 are known to be such."""
    names = one.kernel.arg_names
    given = {**dict(zip(names, one.arguments, strict=False)), **one.constants}
    assert set(given) == set(names)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(names):
        value = given[name]
        if isinstance(value, Tensor):
            signature[name], attributes[i,] = "*" + _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif name in one.constants or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(one.kernel, signature=signature, constexprs=constants, attrs=attributes)


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each that Triton would compile anew."""
    return list({(source_of(one).hash(), one.warps, one.stages): one for one in launches}.values())


def build(one: Launch, target: GPUTarget, scratch: Path) -> Built:
    """Compile a launch for a chip."""
    options = {"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True}
    made = triton.compile(source_of(one), target=target, options=options)
    shared = made.metadata.shared
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers, which costs no memory.
        spilled = _most(r"\.vgpr_spill_count:\s+(\d+)", text) + _most(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return Built(
            _most(r"\.vgpr_count:\s+(\d+)", text),
            spilled,
            shared,
            tuple(sorted(set(re.findall(r"v_mfma_\w+", text)))),
            tuple(sorted(set(re.findall(r"(?:global|buffer|flat)_atomic_\w+", text)))),
            text,
        )
    binary = scratch / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None
    text = made.asm["ptx"]
    matrix = re.findall(r"wgmma\.mma_async[\w.]*|mma\.sync[\w.]*|tcgen05\.mma[\w.:]*", text)
    return Built(
        int(found[1]),
        int(found[2]) + int(found[3]),
        shared,
        tuple(sorted(set(matrix))),
        tuple(sorted(set(re.findall(r"\b(?:red|atom)\.global[\w.]*", text)))),
        text,
    )


def _most(pattern: str, text: str) -> int:
    return max((int(number) for number in re.findall(pattern, text)), default=0)


def products_in_32_bits(one: Launch, target: GPUTarget) -> list[str]:
    """The operations of a kernel that multiply two values, neither a constant, in 32 bits.

    Products of sizes overflow there; all others are a size, which fits, times a constant that has been divided by
    before. Read from what Triton's front end makes of a kernel, before anything is optimised away.
    """
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(options)
    module = source_of(one).make_ir(target, options, implementation, backend.get_module_map(), context)
    found = []
    constants: set[str] = set()
    for line in str(module).splitlines():
        if "tt.func" in line:
            constants = set()
        match = re.match(r"\s*(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"? ?(.*)", line)
        if match is None:
            continue
        name, operation, rest = match.groups()
        operands = re.findall(r"%[\w#]+", rest)
        if operation == "arith.constant" or (operation in _KEEP_CONSTANTS and set(operands) <= constants):
            constants.add(name)
        elif operation == "arith.muli" and re.search(r": (tensor<[\dx]*)?i32", rest) and not set(operands) & constants:
            found.append(line.strip())
    return found


_KEEP_CONSTANTS = {"tt.splat", "tt.expand_dims", "tt.broadcast", "arith.extsi"}
