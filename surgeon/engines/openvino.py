"""Graphs as models of OpenVINO.

Experts with weights of 8 or 4 bits (`surgeon::routed_ffn_int8`) become one node each, an operator of the extension that
`surgeon.kernels.openvino` builds. Everything else is OpenVINO's own: `torch.export` gives the program, OpenVINO's
frontend for PyTorch converts it, and NNCF quantises the other linears if that is wanted.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.engines.installed import installed, silent
from surgeon.engines.program import Program
from surgeon.errors import SaveError, UsageError, first_line
from surgeon.kernels.building import BuildError
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.openvino import build
from surgeon.moe.module import MoE
from surgeon.moe.ops import dynamic_k_ffn, masked_ffn
from surgeon.moe.site import refuse_float8

LINEARS = ("float", "int8", "int8-weights", "int4-weights")
"""What becomes of the linears that are not in experts. int8: weights and inputs, with ranges of the inputs measured on
calibration data. int8-weights, int4-weights: the weights alone."""

_OPERATOR = "RoutedFFNInt8"
_ROUTED = torch.ops.surgeon.routed_ffn_int8.default
_WORDS = ("rule", "shared", "hidden", "output", "activation")  # attributes of the node, not inputs


def has_int8_experts(graph: GraphModule) -> bool:
    """Whether the graph has experts with weights of 8 or 4 bits."""
    return any(node.op == "call_function" and node.target == _ROUTED for node in graph.graph.nodes)


def has_float_experts(graph: GraphModule) -> bool:
    """Whether the graph has experts with float weights."""
    return any(node.target in (dynamic_k_ffn, masked_ffn) for node in graph.graph.nodes) or any(
        isinstance(module, MoE) for module in graph.modules()
    )


def extension() -> Path:
    """Return the library with the operator, built if necessary.

    Raises:
        SaveError: it cannot be built.
    """
    try:
        return build.library()
    except BuildError as error:
        raise SaveError(f"The operator for OpenVINO cannot be built: {error}") from error


def convert(graph: GraphModule, program: Program) -> Any:
    """Convert a graph to an `openvino.Model` that takes and gives tensors by their names in the graph.

    Args:
        graph: with experts in 8 bits, or without experts. program: the same graph.

    Raises:
        UsageError: the experts have float or float8 weights, or OpenVINO is not installed. SaveError: OpenVINO cannot
            convert it, or the operator cannot be built.
    """
    if has_float_experts(graph):
        raise UsageError("OpenVINO runs experts with 8-bit weights only. Quantise them first, with the pass quantize.")
    refuse_float8(graph, "OpenVINO")
    openvino = installed("openvino")
    options = {"extension": conversion()} if has_int8_experts(graph) else {}
    try:
        exported = program.export()
        with silent():
            model = openvino.convert_model(exported, **options)
    except Exception as error:  # torch and OpenVINO raise many types
        raise SaveError(f"OpenVINO cannot convert the model: {first_line(error)}.") from error
    name_ports(model, [given.name for given in program.sizes.inputs], program.output_names())
    return model


def name_ports(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name a model's inputs and outputs, in order. Conversion and quantisation may have changed the names."""
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    for parameter, name in zip(model.get_parameters(), inputs, strict=True):
        parameter.set_friendly_name(name)


def quantised(model: Any, linears: str, calibration: Sequence[Mapping[str, Tensor]]) -> Any:
    """Quantise the linears around the experts.

    Args:
        model: an `openvino.Model`, which may be changed. linears: one of `LINEARS`.
        calibration: inputs by name, for "int8".

    Raises:
        UsageError: there is no such way, or NNCF is not installed. SaveError: it fails.
    """
    if linears not in LINEARS:
        raise UsageError(f"No way to store linears {linears!r}. There are: {', '.join(LINEARS)}.")
    if linears == "float":
        return model
    nncf = installed("nncf")
    inputs, outputs = ([sorted(port.get_names()) for port in ports] for ports in (model.inputs, model.outputs))
    try:
        with silent():
            if linears == "int8":
                rows = [{name: value.numpy() for name, value in row.items()} for row in calibration]
                model = nncf.quantize(
                    model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
                )
            elif linears == "int8-weights":
                model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            else:  # a scale for 128 weights, or fewer where the inputs are no multiple of that
                smaller = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
                mode = nncf.CompressWeightsMode.INT4_ASYM
                model = nncf.compress_weights(model, mode=mode, advanced_parameters=smaller)
    except Exception as error:
        raise SaveError(f"NNCF cannot quantise the model: {first_line(error)}.") from error
    name_ports(model, [names[0] for names in inputs], [names[0] for names in outputs])
    return model


class Compiled:
    """A model of OpenVINO, compiled for this processor.

    Call it with tensors by name: it returns its outputs in order.
    """

    def __init__(self, model: Any, *, threads: int = 0, precision: str = "f32", library: Path | None = None) -> None:
        """Compile an `openvino.Model`, or the file of one.

        threads: 0 for as many as OpenVINO takes. precision: the hint for what is not quantised, such as "bf16".
        library: the extension, for a file.
        """
        openvino = installed("openvino")
        core = openvino.Core()
        if library is not None:
            core.add_extension(str(library))
        options = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": "NO"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        self._request = core.compile_model(model, "CPU", options).create_infer_request()

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the model on tensors by name."""
        found = self._request.infer({name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(np.array(value)) for value in found.values()]

    def bound(self, inputs: Mapping[str, Tensor]) -> Any:
        """Return a call without arguments that runs the model on these tensors and copies nothing in Python."""
        given = {name: value.contiguous().numpy() for name, value in inputs.items()}
        return lambda: self._request.infer(given, share_inputs=True, share_outputs=True)


def conversion() -> Any:
    """How OpenVINO's frontend makes the operator's node: an extension to convert with.

    Raises:
        SaveError: the operator cannot be built.
    """
    openvino = installed("openvino")
    factory = importlib.import_module("openvino.utils.node_factory").NodeFactory()
    factory.add_extension(str(extension()))

    def make(context: Any) -> Any:
        inputs, names, words = [], [], {}
        # The last ones may be left out.
        for place, name in enumerate(Int8Call._fields[: context.get_input_size()]):
            given = context.get_input(place)
            node = given.get_node()
            if name in _WORDS:
                words[name] = int(node.data) if name == "shared" else bytes(node.data).decode()
            elif node.get_type_name() != "PtFrameworkNode":  # None
                if name == "fc1":  # as bytes: the plugin for CPUs would make 32 bits of 16
                    data = np.ascontiguousarray(node.data).view(np.uint8)
                    given = openvino.op.Constant(openvino.Tensor(data)).output(0)
                inputs.append(given)
                names.append(name)
        return factory.create(_OPERATOR, inputs, {**words, "inputs": names}).outputs()

    return importlib.import_module("openvino.frontend.pytorch").ConversionExtension(
        "surgeon.routed_ffn_int8.default", make
    )
