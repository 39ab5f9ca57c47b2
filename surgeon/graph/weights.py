"""Read weights in bulk without copying them, and free those that nothing needs any more."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgeon.graph.traced import attribute

QUANTISED = (
    "Run the surgery on the model before it was quantised, and quantise the result (moeify, quantize). If there is "
    "only the quantised one, bring its weights back first: model.dequantize() in transformers, and "
    "module.weight = nn.Parameter(module.weight.dequantize()) in torchao."
)
"""What to do about a model whose weights are stored as quantised numbers."""


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Real numbers are read once, and but for float8 nothing of the tensor's size
    is made."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return True
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no such functions for float8
    if tensor.layout != torch.strided or tensor.dtype not in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16
    ):  # fmt: skip
        return bool(tensor.isfinite().all())
    # NaN is the smallest and the largest of any values that it is among.
    return all(bool(value.isfinite()) for value in tensor.aminmax())


def free_unused(graph: GraphModule, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Free the memory of those parameters that no node of the graph needs. Return the others.

    A freed parameter is empty for all that hold it. Dead nodes of the graph are removed first.
    """
    graph.graph.eliminate_dead_code()
    used: set[int] = set()
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = attribute(graph, str(node.target))
            tensors = [value] if isinstance(value, Tensor) else [*value.parameters(), *value.buffers()]
            used.update(tensor.untyped_storage().data_ptr() for tensor in tensors)
    kept = []
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() in used:
            kept.append(parameter)
        else:
            _free(parameter)
    return kept


def _free(parameter: nn.Parameter) -> None:
    if sys.platform == "linux" and parameter.device.type == "cpu":
        _drop_pages(parameter.data_ptr(), parameter.numel() * parameter.element_size())
    parameter.data = parameter.data.new_empty(0)


def _drop_pages(start: int, length: int) -> None:
    """Give back the pages of a private map of a file, as safetensors makes. Other memory is left alone.

    The map itself stays for as long as any tensor of the file is used. A page that is read again comes from the file.
    """
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        low, high = (int(address, 16) for address in addresses.split("-"))
        if low <= first < last <= high and permissions.endswith("p") and inode != "0":
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
