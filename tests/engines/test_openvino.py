"""Graphs with 8-bit experts as models of OpenVINO: what they give, where they are loaded, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.engines.openvino import Compiled, convert, extension, quantised
from surgeon.engines.program import Program
from surgeon.errors import UsageError
from surgeon.graph.traced import TracedGraph
from surgeon.kernels.experts import Experts
from surgeon.kernels.int8 import routed_ffn_int8
from surgeon.kernels.panels import Int8Experts, pack, quantise_trunk
from surgeon.passes import Lower, Moeify, Quantize, SparsifyInputs

openvino = pytest.importorskip("openvino")
pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch and OpenVINO, on the way through them
]

EXPERTS, NEURONS, WIDTH, OUT, TRUNK = 6, 20, 40, 36, 24


class Layer(nn.Module):
    """The operator, with random weights."""

    def __init__(self, *, rule: str = "max", shared: int = 0, trunk: bool = True, gated: bool = False,
                 biases: bool = True, scaled: bool = False, activation: str = "relu",
                 group: int | None = None) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)

        def bias(*shape: int) -> Tensor | None:
            return torch.randn(shape) if biases else None

        up = (EXPERTS, NEURONS, WIDTH)
        gate, b_gate = (torch.randn(up), bias(*up[:2])) if gated else (None, None)
        x_scale = torch.rand(WIDTH) + 0.5 if scaled else None
        weights = Int8Experts.of(
            Experts(torch.randn(up), bias(*up[:2]), gate, b_gate, torch.randn(EXPERTS, NEURONS, OUT)), x_scale, group
        )
        fc1, fc1_scale = quantise_trunk(torch.randn(TRUNK, WIDTH))
        scored = EXPERTS - shared
        tensors: Mapping[str, Tensor | None] = {
            "tau": torch.tensor(0.4),
            "x_scale": x_scale,
            "fc1": pack(fc1) if trunk else None,
            "fc1_scale": fc1_scale if trunk else None,
            "fc1_bias": bias(TRUNK) if trunk else None,
            "fc2": torch.randn(scored, TRUNK if trunk else WIDTH),
            "fc2_bias": bias(scored),
            "b2": bias(OUT),
            **weights._asdict(),
        }
        for name, value in tensors.items():
            if value is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, value)
        self._words = rule, shared, activation

    def forward(self, x: Tensor) -> Tensor:
        rule, shared, activation = self._words
        router = [getattr(self, name) for name in ("x_scale", "fc1", "fc1_scale", "fc1_bias", "fc2", "fc2_bias")]
        names = (*Int8Experts._fields[:9], "b2")
        experts, groups = ([getattr(self, name) for name in some] for some in (names, Int8Experts._fields[9:]))
        given = (torch.sin(x), self.tau, rule, shared, *router, "tanh", "sigmoid", *experts, activation, *groups)
        return routed_ffn_int8(*given)


def made(module: nn.Module, *inputs: Tensor) -> tuple[TracedGraph, Program, Any]:
    graph = surgeon.trace(module.eval(), inputs).eval()
    program = Program(graph, inputs)
    return graph, program, convert(graph, program)


@pytest.fixture(scope="module")
def layer() -> tuple[TracedGraph, Program, Any]:
    return made(Layer(), torch.randn(2, 3, WIDTH))


@pytest.mark.parametrize(
    "form",
    [
        {"rule": "top_k", "activation": "gelu"},
        {"rule": "cumulative", "shared": 2},
        {"rule": "energy", "trunk": False, "biases": False},
        {"gated": True, "activation": "silu", "scaled": True},
        {"gated": True, "activation": "silu", "group": 16},
        {"activation": "gelu", "group": 64},
    ],
    ids=lambda form: ", ".join(f"{name}={value}" for name, value in form.items()),
)
def test_the_operator_gives_what_it_gives_in_torch(form: dict[str, Any]) -> None:
    graph, _, model = made(Layer(**form), torch.randn(2, 3, WIDTH))
    for threads in (1, 2):
        compiled = Compiled(model, threads=threads)
        for shape in ((1, 1), (2, 3), (7, 9)):
            x = torch.randn(*shape, WIDTH)
            torch.testing.assert_close(compiled({"x": x})[0], graph(x), rtol=1e-4, atol=1e-4)


def test_a_token_that_is_not_finite_gives_nan(layer: tuple[TracedGraph, Program, Any]) -> None:
    x = torch.randn(1, 3, WIDTH)
    x[0, 1, 5] = float("nan")
    found = Compiled(layer[2])({"x": x})[0]
    assert found.isnan().all(-1).tolist() == [[False, True, False]]


def test_saved_read_again_and_from_the_cache(layer: tuple[TracedGraph, Program, Any], tmp_path: Path) -> None:
    graph, _, model = layer
    file = tmp_path / "model.xml"
    openvino.save_model(model, file, compress_to_fp16=False)
    x = torch.randn(2, 5, WIDTH)
    for _ in range(2):  # the second reads what the first wrote
        core = openvino.Core()
        core.add_extension(extension())
        core.set_property({"CACHE_DIR": str(tmp_path / "cache")})
        found = core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
        torch.testing.assert_close(torch.from_numpy(found), graph(x), rtol=1e-4, atol=1e-4)
    assert list((tmp_path / "cache").iterdir())


def test_weights_that_lie_anywhere_in_memory(layer: tuple[TracedGraph, Program, Any], tmp_path: Path) -> None:
    """A constant of one byte in front moves all others in the file."""
    graph, _, model = layer
    file = tmp_path / "model.xml"
    openvino.save_model(model, file, compress_to_fp16=False)
    text = file.read_text()
    offsets = {int(part.split('"')[0]) for part in text.split(' offset="')[1:]}
    for offset in sorted(offsets, reverse=True):
        text = text.replace(f' offset="{offset}"', f' offset="{offset + 1}"')
    file.write_text(text)
    weights = file.with_suffix(".bin")
    weights.write_bytes(b"\0" + weights.read_bytes())
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(Compiled(str(file), library=extension())({"x": x})[0], graph(x), rtol=1e-4, atol=1e-4)


# --- around the experts -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Experts between linears, with inputs whose order is not that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(32, 32), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor, bias: Tensor) -> dict[str, Tensor]:
        y = self.before(x) + 2 * bias
        y = y + self.down(torch.relu(self.up(y)))
        return {"last": self.after(y), "mean": y.mean(1)}


INPUTS = tuple(torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


@pytest.fixture(scope="module")
def net() -> tuple[TracedGraph, Program, Any]:
    torch.manual_seed(0)
    graph = surgeon.Pipeline([Moeify(expert_size=16), Quantize()]).run(Net().eval(), inputs=INPUTS).graph.eval()
    surgeon.set_tau(graph, 0.3)
    program = Program(graph, INPUTS)
    return graph, program, convert(graph, program)


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def test_names_are_those_of_the_graph(net: tuple[TracedGraph, Program, Any]) -> None:
    _, program, model = net
    assert [port.get_any_name() for port in model.inputs] == ["x", "bias"]
    assert [port.get_any_name() for port in model.outputs] == ["last", "mean"]
    compiled = Compiled(model)
    for _, inputs, expected in program.examples():
        assert off(compiled(inputs), expected) < 0.02


def test_bfloat16_around_the_experts(net: tuple[TracedGraph, Program, Any]) -> None:
    _, program, model = net
    compiled = Compiled(model, precision="bf16")
    for _, inputs, expected in program.examples():
        assert off(compiled(inputs), expected) < 0.1


@pytest.mark.parametrize(("linears", "accepted"), [("int8", 0.2), ("int8-weights", 0.05), ("int4-weights", 0.3)])
def test_quantised_linears(net: tuple[TracedGraph, Program, Any], linears: str, accepted: float) -> None:
    pytest.importorskip("nncf")
    _, program, model = net
    torch.manual_seed(0)
    rows = [{name: torch.randn(1, 5, 32) for name in ("x", "bias")} for _ in range(8)]
    found = quantised(model.clone(), linears, rows)
    types = [node.get_type_name() for node in found.get_ops()]
    assert types.count("RoutedFFNInt8") == 1
    assert ("FakeQuantize" in types) == (linears == "int8")
    assert [port.get_any_name() for port in found.inputs] == ["x", "bias"]
    compiled = Compiled(found)
    for _, inputs, expected in program.examples():
        assert 1e-4 < off(compiled(inputs), expected) < accepted


ALONE = """
import sys
sys.modules["surgeon"] = sys.modules["torch"] = None  # neither can be imported
import numpy, openvino
core = openvino.Core()
core.add_extension(sys.argv[1])
model = core.compile_model(core.read_model(sys.argv[2]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
given = numpy.load(sys.argv[3])
numpy.savez(sys.argv[4], *model({"x": given["x"], "bias": given["bias"]}).values())
"""


def test_a_process_without_surgeon_and_torch(net: tuple[TracedGraph, Program, Any], tmp_path: Path) -> None:
    import numpy as np

    graph, _, model = net
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    shutil.copy(extension(), tmp_path / "experts.so")
    np.savez(tmp_path / "given.npz", x=INPUTS[0].numpy(), bias=INPUTS[1].numpy())
    names = ("experts.so", "model.xml", "given.npz", "found.npz")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in names)],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert off([torch.from_numpy(found[name]) for name in found], list(graph(*INPUTS).values())) < 0.02


@pytest.mark.parametrize("lowered", [True, False])
def test_linear_layers_mask_what_they_skip(lowered: bool) -> None:
    passes = [SparsifyInputs(), *([Lower()] if lowered else [])]
    rows = [dict(zip(("x", "bias"), INPUTS, strict=True))]
    graph = surgeon.Pipeline(passes).run(Net().eval(), inputs=INPUTS, data=rows).graph.eval()
    before = list(graph(*INPUTS).values())
    surgeon.set_tau(graph, 0.4)
    assert off(before, list(graph(*INPUTS).values())) > 0.02
    program = Program(graph, INPUTS)
    compiled = Compiled(convert(graph, program))
    for _, inputs, expected in program.examples():
        assert off(compiled(inputs), expected) < 1e-4


def test_float_experts_are_refused() -> None:
    graph = surgeon.Pipeline([Moeify(expert_size=16)]).run(Net().eval(), inputs=INPUTS).graph
    with pytest.raises(UsageError, match="Quantise them first"):
        convert(graph, Program(graph, INPUTS))


def test_an_unknown_way_to_store_linears(net: tuple[TracedGraph, Program, Any]) -> None:
    with pytest.raises(UsageError, match="There are: float, int8"):
        quantised(net[2], "int3", [])
