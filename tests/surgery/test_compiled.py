"""Compiling a graph: inputs that are no tensors, optional ones, outputs in any container, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.engines.program import plain
from surgeon.errors import SaveError, UsageError
from surgeon.surgery import compiled
from surgeon.surgery.compiled import compile_graph

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
    monkeypatch.setattr(compiled, "_compile", lambda program, file: None)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda file: lambda *args: plain(graph(*args, True)))
    with pytest.raises(SaveError, match=r"The compiled model (fails|differs)"):
        compile_graph(graph, INPUTS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_outputs_without_what_is_no_tensor() -> None:
    x = torch.ones(1)
    given = {"a": x, "b": None, "c": [x, "text", (x, 1)], "d": {"e": 3.0}}
    assert plain(given) == {"a": x, "c": (x, (x,))}
    assert plain(x) is x
