"""A surgery and its dense model in several engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import surgeon
from surgeon.bench import against, timing
from surgeon.engines import torchao
from surgeon.errors import UsageError
from surgeon.passes import Lower, Moeify, Quantize
from tests.small_models import stack, vectors

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_size", lambda: 1024)


def compared(engines: list[str], passes: list[Any]) -> against.Compared:
    model = stack()
    dense = surgeon.trace(model, vectors()).eval()
    graph = surgeon.Pipeline(passes).run(model, inputs=vectors()).graph.eval()
    return against.compare_engines(graph, dense, (), vectors(), engines, [((), vectors())], seconds=0.001, threads=1)


def errors(found: against.Compared) -> Mapping[tuple[str, bool, str], float | None]:
    assert all(row.milliseconds is None or row.milliseconds > 0 for row in found.rows)
    return {(row.engine, row.experts, row.numbers): row.error for row in found.rows}


def test_openvino_runs_both_models_in_every_form() -> None:
    pytest.importorskip("nncf")
    off = errors(found := compared(["eager", "openvino"], [Moeify(expert_size=8), Quantize()]))
    forms = ("float32", "int8", "int8-weights")
    assert set(off) == {
        *(("eager", experts, "float32") for experts in (False, True)),
        *(("openvino", experts, form) for experts in (False, True) for form in forms),
    }
    assert off["eager", False, "float32"] == 0.0
    assert off["openvino", False, "float32"] < 1e-5
    assert 1e-5 < off["openvino", False, "int8"] < 0.4
    assert all(0 < off["openvino", True, how] < 0.3 for how in forms)
    times = {row.experts: [] for row in found.rows}
    for row in found.rows:
        times[row.experts].append(row.milliseconds)
    assert found.gain == min(times[False]) / min(times[True])
    assert set(found.versions) == {"torch", "openvino", "nncf"}


def test_float_experts_are_told_not_to_run_in_openvino() -> None:
    pytest.importorskip("nncf")
    found = compared(["openvino"], [Moeify(expert_size=8), Lower()])
    told = [row for row in found.rows if row.experts]
    assert all(row.milliseconds is None and "Quantise them first" in row.why for row in told)
    assert len(told) == 3
    assert found.gain is None


def test_onnxruntime_runs_the_dense_model() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    off = errors(compared(["onnxruntime"], [Moeify(expert_size=8), Quantize()]))
    assert list(off) == [("onnxruntime", False, "float32"), ("onnxruntime", False, "int8")]
    # Before AVX-512, 8-bit products are summed in 16 bits, and are further off.
    limit = 0.5 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 0.3
    assert off["onnxruntime", False, "float32"] < 1e-5 < off["onnxruntime", False, "int8"] < limit


def test_torchao_gets_the_linears_of_the_graph() -> None:
    pytest.importorskip("torchao")
    graph = surgeon.trace(stack(), vectors()).eval()
    with torch.no_grad():
        made = torchao.quantised(graph, "int8-weights")
        found, expected = made(**vectors()), graph(**vectors())
        off = (found - expected).norm() / expected.norm()
    assert 1e-5 < off < 0.1


def test_engines_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"No engine 'tvm'\. There are eager, compile, torchao"):
        against.check_engines(["eager", "tvm"])
    monkeypatch.setitem(against.ENGINES, "eager", ("not_installed_here",))
    with pytest.raises(UsageError, match="pip install not_installed_here"):
        against.check_engines(["eager"])


def test_a_bench_that_is_stopped_keeps_what_it_has() -> None:
    rounds = 0

    def call() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            raise KeyboardInterrupt

    found = timing.median_seconds({"a": timing.TimedCall(call)}, torch.device("cpu"), seconds=9, threads=1)
    assert rounds == 3
    assert found["a"] >= 0
    rounds = 2
    with pytest.raises(KeyboardInterrupt):
        timing.median_seconds({"a": timing.TimedCall(call)}, torch.device("cpu"), seconds=9, threads=1)


@pytest.mark.parametrize("error", [26000.0, float("nan")])
def test_an_engine_that_computes_something_else_is_not_the_fastest(error: float) -> None:
    rows = [
        against.EngineTime("eager", False, "float32", 4.0, 0.0),
        against.EngineTime("torchao", False, "int8", 1.0, error),
        against.EngineTime("eager", True, "float32", 2.0, 1.2),
        against.EngineTime("torchao", True, "int8", 0.5, error),
    ]
    assert against.Compared(rows, {}).gain == 2.0
