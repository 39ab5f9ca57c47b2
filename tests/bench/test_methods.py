"""Every method computes the layer it is timed on."""

from __future__ import annotations

import os
from types import SimpleNamespace as Namespace

import pytest
import torch

from surgeon.bench.engines import ENGINES
from surgeon.bench.layer import Case, Problem, make_problem
from surgeon.bench.method import UnavailableError
from surgeon.bench.methods import METHODS
from surgeon.kernels import cpu
from surgeon.kernels.cpu import crossover
from surgeon.kernels.gpu_model.cost import LayerShape
from surgeon.kernels.triton import backend as triton

# torch.compile takes longer than all the others together; that it may fail is tested in test_run.
NAMES = [name for name in METHODS if name != "compiled" and name not in ENGINES]


def problem(dtype: str = "float32", *, gated: bool = False, tokens: int = 20, share: float = 0.3) -> Problem:
    case = Case(LayerShape(16, 48, 8, gated), dtype, tokens, "uniform", share, "gelu")
    return make_problem(case, torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "gated"),
    [(name, gated) for name in NAMES for gated in (False, True) if not (gated and name == "published")],
)
def test_a_method_computes_the_layer(name: str, gated: bool, dtype: str) -> None:
    method = METHODS[name]
    for tokens, share in ((20, 0.3), (1, 0.2), (3, 1.0)):
        asked = problem(dtype, gated=gated, tokens=tokens, share=share)
        with method.around(asked):
            found = method.prepare(asked)()
        assert found.shape == (tokens, 16)
        mask = None if method.mask is None else method.mask(asked)
        rounded = dtype == "bfloat16" or name == "ours_int8"
        limit = {"ours_int4": 0.2, "ours_fp8": 0.1}.get(name, 0.05 if rounded else 1e-6)
        assert asked.error(found, every=method.every, mask=mask) < limit


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's, when it is compiled
@pytest.mark.parametrize("name", ENGINES)
def test_another_engine_computes_the_dense_layer(name: str) -> None:
    for package in ENGINES[name].packages:
        pytest.importorskip(package)
    asked = problem()
    # Before AVX-512, 8-bit products are summed in 16 bits by OpenVINO, and are further off.
    limit = 0.5 if name == "openvino" and torch.backends.cpu.get_cpu_capability() == "AVX2" else 0.1
    assert asked.error(ENGINES[name].prepare(asked)(), every=True) < limit


def test_where_experts_with_8_bit_weights_are_not_timed() -> None:
    case = Case(LayerShape(16, 48, 8, False), "float32", 20, "skewed", 0.3)
    with pytest.raises(UnavailableError, match="its own router selects"):
        METHODS["ours_int8"].prepare(make_problem(case, torch.device("cpu")))


def test_a_method_that_selects_is_not_the_dense_layer() -> None:
    asked = problem()
    assert {name for name in NAMES if METHODS[name].every} == {"dense", "ours_dense"}
    for name in NAMES:
        assert asked.error(METHODS[name].prepare(asked)(), every=not METHODS[name].every) > 0.01


def test_the_published_method_has_no_gated_layers() -> None:
    with pytest.raises(UnavailableError, match="the published method has no gated layers"):
        METHODS["published"].prepare(problem(gated=True))


def test_a_torch_without_grouped_mm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    with pytest.raises(UnavailableError, match="has no grouped_mm"):
        METHODS["grouped_mm"].prepare(problem())


def test_with_every_expert_on_the_kernels_run_and_what_was_measured_stays() -> None:
    if not cpu.ready():
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")

    def measured() -> list[float]:
        return [torch.ops.surgeon.cpu_get_crossover(False, tokens, 8) for tokens in crossover.TOKENS]

    before, method = measured(), METHODS["ours_dense"]
    call = method.prepare(problem())
    with crossover.taking("dense"), torch.profiler.profile() as dense:
        call()
    with method.around(problem()), torch.profiler.profile() as ours:
        call()
    assert "aten::addmm" in {event.name for event in dense.events()}
    assert "aten::addmm" not in {event.name for event in ours.events()}
    assert measured() == before


@pytest.mark.parametrize(("asked", "inside"), [(None, "triton"), ("triton", "triton"), ("torch", "torch")])
def test_on_a_gpu_every_expert_goes_through_the_kernels(
    asked: str | None, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SURGEON_GPU", raising=False)
    if asked is not None:
        monkeypatch.setenv("SURGEON_GPU", asked)
    on_gpu = Namespace(x=Namespace(device=torch.device("cuda")))
    with METHODS["ours_dense"].around(on_gpu):  # type: ignore[arg-type]
        assert os.environ["SURGEON_GPU"] == inside
    assert os.environ.get("SURGEON_GPU") == asked


def test_the_kernels_can_be_asked_for_where_the_dense_product_should_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Namespace(name="NVIDIA H100 80GB HBM3"))
    x = Namespace(device=torch.device("cuda"), shape=(2048, 768), dtype=torch.bfloat16)
    experts = Namespace(w1=torch.empty(128, 24, 768, device="meta"), gate=None)
    for asked, way in (("", "masked"), ("triton", "experts")):
        monkeypatch.setenv("SURGEON_GPU", asked)
        assert triton.fastest_way(x, experts) == way  # type: ignore[arg-type]
    x.shape = (8, 768)
    monkeypatch.delenv("SURGEON_GPU")
    assert triton.fastest_way(x, experts) == "experts"  # type: ignore[arg-type]
