"""A lowered model, packaged by AOTInductor, in a process that has no Python: the kernels' library is all it needs."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

import surgeon
from surgeon.kernels import cpu
from surgeon.passes import Lower, Moeify

HERE = Path(__file__).parent


class Tensors(nn.Module):
    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)
        self.register_buffer("y", y)


# Of torch itself, on the way through its compiler and TorchScript.
@pytest.mark.filterwarnings("ignore")
def test_a_package_runs_without_python(tmp_path: Path) -> None:
    library = cpu.load().path
    if library is None:
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = torch.randn(5, 32)
    surgery = surgeon.Pipeline([Moeify(experts=8, router_width=8), Lower()]).run(model, inputs=x)
    surgeon.set_tau(surgery.graph, 0.5)
    surgeon.set_rule(surgery.graph, "cumulative")  # an operator of its own
    with torch.no_grad():
        y = surgery.graph.eval()(x)
        program = torch.export.export(surgery.graph, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.jit.script(Tensors(x, y)).save(str(tmp_path / "tensors.pt"))
    assert not torch.allclose(y, model(x))  # experts are skipped

    runner = tmp_path / "runner"
    places = cpp_extension.library_paths()
    command = [
        "c++", "-O0", "-std=c++20", str(HERE / "runner.cpp"), "-o", str(runner),
        *(f"-I{path}" for path in cpp_extension.include_paths()), *(f"-L{path}" for path in places),
        *(f"-Wl,-rpath,{path}" for path in places), "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run(
        [str(runner), str(library), package, str(tmp_path / "tensors.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
