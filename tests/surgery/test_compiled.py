"""Compiling a graph: inputs that are no tensors, optional ones, outputs in any container, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.engines.program import plain
from surgeon.errors import SaveError, UsageError
from surgeon.kernels import cpu
from surgeon.passes import Lower, Moeify, SparsifyInputs, SparsifyNeurons
from surgeon.surgery import compiled
from surgeon.surgery.compiled import compile_graph
from tests.small_models import Gated

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch, on the way through its compiler
]


class Pair(NamedTuple):
    first: Tensor
    rest: dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, double: bool = False, scale: Tensor | None = None, extra: Any = None) -> Pair:
        y = self.fc(x[:, -16:] if x.shape[1] > 16 else x) * (2 if double else 1)
        return Pair(y if scale is None else y * scale[:, :, None], {"none": None, "sum": y.sum(), "text": "a"})


def graph_of_net() -> surgeon.TracedGraph:
    return surgeon.trace(Net().eval(), (torch.randn(2, 5, 4), True, torch.rand(2, 5)))


INPUTS = (torch.randn(2, 5, 4), True, torch.rand(2, 5))


def test_constants_and_optional_inputs_are_no_inputs(tmp_path: Path) -> None:
    graph = graph_of_net()
    made = compile_graph(graph, INPUTS, tmp_path / "out", leave_out=["scale"])
    assert made.inputs == {"x": "torch.float32"}
    assert made.outputs == ["0", "1.sum"]
    assert made.tau == {}
    assert not (tmp_path / "out" / "surgeon_cpu.so").exists()  # there are no experts
    model = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    for size in ((1, 1), (3, 16)):
        x = torch.randn(*size, 4)
        first, rest = model(x)
        expected = graph(x, True)
        torch.testing.assert_close(first, expected.first)
        torch.testing.assert_close(rest["sum"], expected.rest["sum"])
    with pytest.raises(RuntimeError, match="tokens is not 0 to 16"):
        model(torch.randn(1, 17, 4))


class Scaled(nn.Module):
    """A feed-forward layer with a factor that follows from a weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.log = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) * self.log.exp()


def test_what_follows_from_weights_is_computed_once_and_tau_stays(tmp_path: Path) -> None:
    if cpu.load().path is None:
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    x = torch.randn(4, 8)
    graph = surgeon.Pipeline([Moeify(experts=4, rule="top_k"), Lower()]).run(Scaled().eval(), inputs=(x,)).graph
    made = compile_graph(graph, (x,), tmp_path / "out")
    model = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    constants = model.get_constant_fqns()
    assert "log" not in constants
    assert {*made.tau} <= {*constants}
    surgeon.set_tau(graph, 0.5)
    assert not torch.allclose(model(x), graph(x))
    model.load_constants(dict.fromkeys(made.tau, torch.tensor(0.5)), check_full_update=False)
    torch.testing.assert_close(model(x), graph(x))


class Both(nn.Module):
    """A layer that can skip inputs, and one that can skip neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scaled(), Gated(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def skipping(x: Tensor, *passes: surgeon.Pass) -> surgeon.TracedGraph:
    return surgeon.Pipeline(passes).run(Both().eval(), inputs=(x,), data=[x]).graph


INPUTS_SKIPPED, NEURONS_SKIPPED = SparsifyInputs(only=("first.*",)), SparsifyNeurons()


@pytest.mark.parametrize("lowered", [True, False])
def test_tau_of_layers_that_skip_can_be_set(lowered: bool, tmp_path: Path) -> None:
    x = torch.randn(64, 8)
    graph = skipping(x, NEURONS_SKIPPED, INPUTS_SKIPPED, *([Lower()] if lowered else []))
    made = compile_graph(graph, (x,), tmp_path / "out")
    model = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    paths = ("first.up.inputs", "first.down.inputs", "second.neurons")
    assert set(made.tau) == {f"{path}.tau" for path in paths}
    torch.testing.assert_close(model(x), graph(x))
    for path in paths:  # each of them on its own
        surgeon.set_tau(graph, {path: 0.5, "*": 0.0})
        assert not torch.allclose(model(x), graph(x), rtol=1e-3, atol=1e-4)
        taus = {name: torch.tensor(0.5 * (name == f"{path}.tau")) for name in made.tau}
        model.load_constants(taus, check_full_update=False)
        torch.testing.assert_close(model(x), graph(x))
    native = lowered and cpu.load().path is not None
    assert compiled.keeps_operator(graph) == (tmp_path / "out" / "surgeon_cpu.so").exists() == native
    code = """
import sys, torch
sys.modules["surgeon"] = None
from pathlib import Path
place = Path(sys.argv[1])
if (place / "surgeon_cpu.so").exists():
    torch.ops.load_library(place / "surgeon_cpu.so")
model = torch._inductor.aoti_load_package(str(place / "model.pt2"))
example = torch.load(place / "example.pt")
torch.testing.assert_close(model(*example["inputs"]), example["outputs"][0])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [INPUTS_SKIPPED, NEURONS_SKIPPED], ids=["inputs", "neurons"])
def test_layers_that_are_lowered_keep_their_operator(kind: Any) -> None:
    x = torch.randn(64, 8)
    assert not compiled.keeps_operator(skipping(x, kind))
    assert compiled.keeps_operator(skipping(x, kind, Lower())) == (cpu.load().path is not None)


def test_a_model_without_its_tau_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.load().path is None:
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    x = torch.randn(4, 8)
    graph = surgeon.Pipeline([Moeify(experts=4), Lower()]).run(Scaled().eval(), inputs=(x,)).graph
    monkeypatch.setattr(compiled, "_compile", lambda program, graph, file: None)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda file: SimpleNamespace(get_constant_fqns=list))
    with pytest.raises(SaveError, match=r"moe\.tau cannot be set"):
        compile_graph(graph, (x,), tmp_path / "out")


def test_what_cannot_be_left_out(tmp_path: Path) -> None:
    for name in ("x", "nonsense"):
        with pytest.raises(UsageError, match=rf"{name} cannot be left out. Optional inputs of this graph: .*scale"):
            compile_graph(graph_of_net(), INPUTS, tmp_path / "out", leave_out=[name])
    assert not list(tmp_path.iterdir())


def test_nothing_wrong_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of_net()

    def pretend(program: Any, *, package_path: str, **_: Any) -> None:
        Path(package_path).write_bytes(b"package")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", pretend)
    with pytest.raises(SaveError, match="without the check of its inputs"):
        compile_graph(graph, INPUTS, tmp_path / "out")
    monkeypatch.setattr(compiled, "_compile", lambda program, graph, file: None)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda file: lambda *args: plain(graph(*args, True)))
    with pytest.raises(SaveError, match=r"The compiled model (fails|differs)"):
        compile_graph(graph, INPUTS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_outputs_without_what_is_no_tensor() -> None:
    x = torch.ones(1)
    given = {"a": x, "b": None, "c": [x, "text", (x, 1)], "d": {"e": 3.0}}
    assert plain(given) == {"a": x, "c": (x, (x,))}
    assert plain(x) is x
