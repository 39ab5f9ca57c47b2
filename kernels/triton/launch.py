"""Start kernels, here and nowhere else, and describe the chip and the process for that."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the processor: `TRITON_INTERPRET=1` when triton was imported."""


class Chip(NamedTuple):
    """The properties of a chip that tile sizes depend on.

    Attributes:
        backend: "cuda" for NVIDIA, "hip" for AMD.
        capability: 10 · major + minor of the compute capability; 0 for AMD.
        processors: streaming multiprocessors, or compute units.
        shared_memory: bytes that one program may use.
        cache: bytes of the L2 cache.
    """

    backend: Literal["cuda", "hip"]
    capability: int
    processors: int
    shared_memory: int
    cache: int

    @property
    def hopper(self) -> bool:
        """Whether it is an NVIDIA data-centre chip, H100 or later: these have warp-group matrix products."""
        return self.backend == "cuda" and self.capability >= 90 and self.roomy

    @property
    def roomy(self) -> bool:
        """Whether it has the shared memory of an NVIDIA data-centre chip: others have about 100 KiB, AMD's 64 KiB."""
        return self.backend == "cuda" and self.shared_memory > 160 * 1024


@cache
def chip(device: torch.device) -> Chip:
    """Return the chip of a device, or a small made-up one if kernels are interpreted."""
    if device.type != "cuda":
        return Chip("cuda", 80, 3, 99 * 1024, 1 << 20)
    found: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Chip("hip", 0, found.multi_processor_count, 64 * 1024, found.L2_cache_size)
    capability = 10 * found.major + found.minor
    return Chip(
        "cuda", capability, found.multi_processor_count, found.shared_memory_per_block_optin, found.L2_cache_size
    )


def precision(dtype: torch.dtype, backend: str) -> str:
    """Say how `tl.dot` multiplies. TF32 is only for fp32 on NVIDIA, if PyTorch's own products may use it."""
    if dtype != torch.float32 or backend != "cuda":
        return "ieee"
    # This attribute, unlike `allow_tf32`, can be read whichever of PyTorch's two interfaces has set it.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def upcasts(dtype: torch.dtype) -> bool:
    """Whether loaded values are converted to fp32 at once.

    The interpreter keeps bf16 as bare 16-bit integers and calculates with those.
    """
    return INTERPRETED and dtype != torch.float32


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, warps: int, stages: int, **constants: Any) -> None:
    """Start `kernel` on a grid of `programs`, on the device of its first tensor."""
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[programs](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)
