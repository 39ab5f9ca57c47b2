"""The dense layer in other engines with 8-bit weights, as they are meant to be used: their converters and compilers.

The weights and the tokens are given to them in float32. Engines that observe activations first observe the very tokens
that are timed. They use as many threads as torch.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.bench.layer import Problem
from surgeon.bench.method import Method, UnavailableError
from surgeon.kernels.activations import activation


class _Layer(nn.Module):
    """The dense layer with its weights in float32."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        flat = problem.experts.flat().to(torch.float32)
        self.up = self._linear(flat.w1, flat.b1)
        self.gate = None if flat.gate is None else self._linear(flat.gate, flat.b_gate)
        self.down = self._linear(flat.w2.t().contiguous(), problem.b2.float())
        self.act = activation(problem.case.activation).fn

    @staticmethod
    def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        made.weight.data = weight
        if bias is not None:
            made.bias.data = bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        y: Tensor = self.down(h)
        return y


def _on_cpu(problem: Problem) -> tuple[_Layer, Tensor]:
    if problem.x.device.type != "cpu":
        raise UnavailableError("it is compared on CPUs only")
    return _Layer(problem).eval().requires_grad_(False), problem.x.float()


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep progress bars, advice and warnings of converters off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.inference_mode(False):
                yield
    finally:
        logging.disable(before)


def _openvino(problem: Problem, compress: Callable[[Any, Any, Tensor], Any]) -> Callable[[], Tensor]:
    layer, x = _on_cpu(problem)
    with _quietly():
        openvino, nncf = import_module("openvino"), import_module("nncf")
        model = compress(nncf, openvino.convert_model(torch.export.export(layer, (x.clone(),))), x)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    request = openvino.compile_model(model, "CPU", options).create_infer_request()
    given = x.numpy()
    return lambda: torch.from_numpy(request.infer([given], share_inputs=True, share_outputs=True)[0])


def _static(nncf: Any, model: Any, x: Tensor) -> Any:
    # Smoothing activations over one sample makes the error twenty times as large.
    advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1))
    return nncf.quantize(model, nncf.Dataset([x.numpy()]), subset_size=1, advanced_parameters=advanced)


def _weights(nncf: Any, model: Any, x: Tensor) -> Any:
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def _onnxruntime(problem: Problem) -> Callable[[], Tensor]:
    layer, x = _on_cpu(problem)
    runtime, quantization = import_module("onnxruntime"), import_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "layer.onnx", Path(folder) / "int8.onnx"
        with _quietly():
            torch.onnx.export(layer, (x.clone(),), whole, dynamo=True, verbose=False, external_data=False)
            quantization.quantize_dynamic(whole, small, weight_type=quantization.QuantType.QInt8)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        session = runtime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def _torchao(problem: Problem) -> Callable[[], Tensor]:
    layer, x = _on_cpu(problem)
    with _quietly():
        quantization = import_module("torchao.quantization")
        quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    compiled: Callable[[Tensor], Tensor] = torch.compile(layer, dynamic=False, fullgraph=True)
    return lambda: compiled(x)


ENGINES: dict[str, Method] = {
    "openvino": Method(
        "OpenVINO, 8-bit weights and activations by NNCF's static quantisation", lambda p: _openvino(p, _static), True,
        packages=("openvino", "nncf"),
    ),
    "openvino_weights": Method(
        "OpenVINO, 8-bit weights", lambda p: _openvino(p, _weights), True, packages=("openvino", "nncf")
    ),
    "onnxruntime": Method(
        "ONNX Runtime, dynamic quantisation", _onnxruntime, True, packages=("onnxruntime", "onnx", "onnxscript")
    ),
    "torchao": Method(
        "torchao, 8-bit weights and dynamic activations, compiled", _torchao, True, packages=("torchao",)
    ),
}  # fmt: skip
"""Name → method, in the order in which they are shown."""
