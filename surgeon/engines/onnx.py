"""Graphs as ONNX models, for exchange: every expert is computed, and a mask leaves out what a token did not select.

ONNX's standard operators have no way to skip experts, so such a model is no faster than the dense one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.engines.installed import installed, silent
from surgeon.engines.program import Program
from surgeon.errors import SaveError, first_line
from surgeon.kernels.selection import sorted_threshold
from surgeon.moe.ops import dynamic_k_ffn
from surgeon.tracing.quiet import quiet

_ops = torch.ops.surgeon


def save(program: Program, file: Path) -> None:
    """Write a program as an ONNX model, whose inputs and outputs have the graph's names.

    Weights of more than 2 GB lie beside it.

    Raises:
        UsageError: onnxscript is not installed. SaveError: torch cannot convert it.
    """
    installed("onnxscript")
    table = torch.export.default_decompositions()
    table[torch.ops.aten.softplus.default] = _softplus
    table[dynamic_k_ffn] = _ops.masked_ffn
    table[_ops.sorted_threshold.default] = sorted_threshold
    try:
        with quiet(), silent():
            exported = program.export().run_decompositions(table)
            torch.onnx.export(
                exported,
                f=str(file),
                dynamo=True,
                verbose=False,
                input_names=[given.name for given in program.sizes.inputs],
                output_names=program.output_names(),
            )
    except Exception as error:  # torch raises many types
        raise SaveError(f"torch cannot write the model for ONNX: {first_line(error)}.") from error


def quantise(file: Path, to: Path) -> None:
    """Write an ONNX model with 8-bit weights, a scale for each output. Ranges of inputs are measured as it runs.

    Raises:
        UsageError: onnxruntime is not installed.
    """
    installed("onnxruntime")
    with silent():
        quantization = importlib.import_module("onnxruntime.quantization")
        quantization.quantize_dynamic(str(file), str(to), per_channel=True)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """Softplus whose small values differ: ONNX has no log1p, and with a logarithm all of them would be zero.

    Scores that are equal select their experts together.
    """
    small = torch.exp(-(beta * x).abs())
    return torch.relu(x) + 2 * torch.atanh(small / (2 + small)) / beta


class Session:
    """An ONNX model in ONNX Runtime, on the CPU. Call it with tensors by name: it returns its outputs in order."""

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        """Load a model. threads: 0 for as many as ONNX Runtime takes."""
        onnxruntime = installed("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the model on tensors by name."""
        return [torch.from_numpy(value) for value in self._run(inputs)()]

    def bound(self, inputs: Mapping[str, Tensor]) -> Any:
        """Return a call without arguments that runs the model on these tensors."""
        return self._run(inputs)

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        taken = {given.name for given in self._session.get_inputs()}  # one that nothing depends on is gone
        given = {name: value.contiguous().numpy() for name, value in inputs.items() if name in taken}
        return lambda: self._session.run(None, given)
