"""Models that cannot become a graph of their own weights: each is refused in words, by every way in."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import distributed, nn
from torch.testing._internal.two_tensor import TwoTensor

import surgeon
from surgeon.errors import SurgeonError, TraceError, UsageError
from surgeon.models.readiness import check_ready
from surgeon.models.source import check_finite
from surgeon.tracing.trace import from_program


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).eval()


def with_weight(change: Callable[[torch.Tensor], Any]) -> nn.Module:
    model = net()
    model[2].weight = nn.Parameter(change(model[2].weight.detach()), requires_grad=False)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})


def script() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net(), torch.ones(1, 3))


def inference() -> nn.Module:
    with torch.inference_mode():
        return net()


class Packed(nn.Parameter):
    """Such as libraries keep the weights of 4-bit and 8-bit layers in."""


def packed() -> nn.Module:
    model = net()
    model[2].weight = Packed(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    return model


def quantised_buffer() -> nn.Module:
    model = net()
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return model


def named(name: str) -> nn.Module:
    model = net()
    model.add_module(name, nn.Linear(3, 3))
    return model


def with_buffer(name: str) -> nn.Module:
    model = net()
    model.register_buffer(name, torch.ones(3))
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "function": (lambda: net, "is a function, not a torch.nn.Module"),
    "script": (script, "is TorchScript"),
    "meta": (on_meta, "'0.weight' is on the device meta.*device_map"),
    "offloaded": (lambda: cpu_offload(net(), torch.device("cpu")), "'0.weight' is on the device meta.*remove_hook"),
    "quantised": (quantised, r"'0' \(torch.ao.nn.quantized.*is quantised. Run the surgery on the model before"),
    "subclass": (lambda: with_weight(lambda w: TwoTensor(w, w)), "'2.weight' is stored as .*TwoTensor.*quantise the"),
    "packed": (packed, "'2.weight' is stored as .*Packed in torch.int8.*before it was quantised"),
    "quantised buffer": (quantised_buffer, "'table' is stored in torch.qint8.*before it was quantised"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "'0.weight' has no shape yet.*Call the model once"),
    "sparse": (lambda: with_weight(lambda w: w.to_sparse()), "'2.weight' is sparse.*to_dense"),
    "float8": (lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), "'2.weight' is stored in torch.float8_e4m3fn"),
    "inference": (inference, "'0.weight' was made in inference mode.*deepcopy"),
    "meta as a name": (lambda: named("meta"), "part named 'meta', which is an attribute.*Rename"),
    "shape_env as a name": (lambda: named("shape_env"), "part named 'shape_env'.*Rename"),
    "graph as a buffer": (lambda: with_buffer("graph"), "part named 'graph'.*Rename"),
    "self as a buffer": (lambda: with_buffer("self"), "part named 'self'.*Rename"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    model = make()
    for enter in (check_ready, check_finite, lambda given: surgeon.trace(given, torch.ones(2, 3))):
        with pytest.raises(SurgeonError, match=message) as error:
            enter(model)
        assert type(error.value) is (UsageError if kind == "function" else TraceError)


def test_module_for_distributed_training() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(net()))
    finally:
        distributed.destroy_process_group()
    with pytest.raises(TraceError, match=r"in DistributedDataParallel. Give the module inside it: model.0.module"):
        check_ready(model)
    check_ready(model[0].module)


def test_advice_works() -> None:
    offloaded = cpu_offload(net(), torch.device("cpu"))
    remove_hook_from_submodules(offloaded)
    x = torch.ones(2, 3)
    for model in (offloaded, copy.deepcopy(inference()), nn.Sequential(named("meta"))):
        assert torch.allclose(surgeon.trace(model, x)(x), model(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.DataParallel(net()),
        lambda: torch.compile(net(), backend="eager"),
        lambda: torch.optim.swa_utils.AveragedModel(net()),
        lambda: named("self"),
    ],
)
def test_wrappers_that_a_graph_sees_through(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.ones(2, 3)
    assert torch.allclose(surgeon.trace(model, x)(x), model(x))


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_weights_of_torchao_are_brought_back_as_the_message_says(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = net()
    quantization.quantize_(model, getattr(quantization, config)())
    with pytest.raises(TraceError, match=r"'0\.weight' is stored as torchao.*module\.weight\.dequantize\(\)"):
        surgeon.trace(model, torch.ones(2, 3))
    for module in (model[0], model[2]):
        module.weight = nn.Parameter(module.weight.dequantize())
    assert len(surgeon.find_ffns(surgeon.trace(model, torch.ones(2, 3)))[0]) == 1


def test_a_graph_that_torchao_quantised_is_refused() -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    example = (torch.ones(2, 3),)
    prepared = pt2e.prepare_pt2e(torch.export.export(net(), example).module(), quantizer)
    prepared(*example)
    graph = pt2e.convert_pt2e(prepared)
    with pytest.raises(TraceError, match=r"a graph that was quantised \(it has quantized_decomposed\.dequantize"):
        surgeon.trace(graph, example)
    # A program of it, such as a file has, is a graph like others, and each of its layers is refused.
    sites, refused = surgeon.find_ffns(from_program(torch.export.export(graph, example)))
    assert not sites
    assert [rejection.code for rejection in refused] == ["unreadable-linear"]
    assert "its weight is stored in int8" in refused[0].reason
